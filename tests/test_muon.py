"""DeepSpeed's Muon on CPU: against Muon by singular values, and over ranks, ZeRO stages, adapters and restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_learn_ranks import Results, assert_same, data_of_step, launch
from tiny import make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from spct_ray.errors import ConfigError
from spct_ray.learn.train_config import OptimConfig, TrainResources
from spct_ray.learn.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All jobs, in three launches; gives (weights, {"log", "state"}, directory) by name."""
    root = tmp_path_factory.mktemp("muon")
    tied, untied = str(root / "tied"), str(root / "untied")
    make_tiny_model(tied, tied=True, hidden=32, layers=2)
    make_tiny_model(untied, tied=False, hidden=32, layers=1)

    def job(name: str, model: str, stage: int, **options: Any) -> dict[str, Any]:
        return {"model": model, "stage": stage, "out": str(root / name), "muon": True, **options}

    def saved(name: str) -> dict[str, Any]:
        return {"save": str(root / name), "save_at": 2}

    launch(root, 1, [
        job("one", tied, 1, **saved("of_one")),
        job("one_stage2", tied, 2, micro_tokens=40),
        job("one_stage3", tied, 3, micro_tokens=40),
        job("one_resumed", tied, 1, resume=str(root / "of_one")),
        job("scalar", untied, 1, head="scalar"),
        job("lora", tied, 1, lora=True),
    ])  # fmt: skip
    launch(root, 2, [
        job("two_stage1", tied, 1, **saved("of_two_stage1")),
        job("two_stage2", tied, 2, micro_tokens=40),
        job("two_stage3", tied, 3, micro_tokens=40, **saved("of_two_stage3")),
        job("two_stage1_resumed", tied, 1, resume=str(root / "of_two_stage1")),
        job("two_stage3_resumed", tied, 3, micro_tokens=40, resume=str(root / "of_two_stage3")),
        job("one_resumed_by_two_at_stage2", tied, 2, resume=str(root / "of_one")),
        job("stage1_resumed_at_stage3", tied, 3, resume=str(root / "of_two_stage1")),
        job("scalar_two", untied, 3, head="scalar"),
        job("scalar_two_stage1", untied, 1, head="scalar"),
        job("lora_two", tied, 3, lora=True, **saved("of_lora_two")),
        job("lora_two_stage1", tied, 1, lora=True),
        *(job(f"bf16_stage{s}", tied, s, dtype="bfloat16", micro_tokens=60, **saved(f"of_bf16_{s}"))
          for s in (1, 2, 3)),
        *(job(f"bf16_stage{s}_resumed", tied, s, dtype="bfloat16", micro_tokens=60, resume=str(root / f"of_bf16_{s}"))
          for s in (1, 2, 3)),
    ])  # fmt: skip
    launch(root, 1, [
        job("two_resumed_by_one", tied, 1, resume=str(root / "of_two_stage1")),
        job("stage3_resumed_by_one", tied, 1, resume=str(root / "of_two_stage3")),
        job("lora_resumed_by_one", tied, 2, lora=True, resume=str(root / "of_lora_two")),
    ])  # fmt: skip

    def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
        report = json.loads((root / f"{name}.json").read_text())
        return load_file(root / f"{name}.safetensors"), report, root

    return read


@pytest.mark.parametrize(("name", "other"), [
    ("one_stage2", "one"), ("one_stage3", "one"), ("two_stage1", "one"), ("two_stage2", "one"), ("two_stage3", "one"),
    ("one_resumed_by_two_at_stage2", "one"), ("stage1_resumed_at_stage3", "one"), ("two_resumed_by_one", "one"),
    ("stage3_resumed_by_one", "one"), ("scalar_two", "scalar"), ("scalar_two_stage1", "scalar"), ("lora_two", "lora"),
    ("lora_two_stage1", "lora"), ("lora_resumed_by_one", "lora"),
])  # fmt: skip
def test_ranks_stages_and_restarts_do_not_change_what_is_learned(results: Results, name: str, other: str) -> None:
    assert_same(results, name, other, 2e-5)


@pytest.mark.parametrize(("name", "other"), [
    ("one_resumed", "one"), ("two_stage1_resumed", "two_stage1"), ("two_stage3_resumed", "two_stage3"),
    *((f"bf16_stage{s}_resumed", f"bf16_stage{s}") for s in (1, 2, 3)),
])  # fmt: skip
def test_resumed_run_is_bit_equal_to_an_undisturbed_one(results: Results, name: str, other: str) -> None:
    assert results(name)[1]["state"] == {"note": "kept", "done": 2}
    assert_same(results, name, other, 0.0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_learns_as_fp32_up_to_rounding(results: Results, stage: int) -> None:
    log, expected = results(f"bf16_stage{stage}")[1]["log"], results("one")[1]["log"]
    assert [s["loss"] for s in log] == pytest.approx([s["loss"] for s in expected], rel=0.03)


def muon_update(grad: Tensor, momentum: Tensor) -> Tensor:
    """By singular values, on which the quintic iteration acts one by one: U p(p(p(p(p(s))))) V^T in float64."""
    momentum.mul_(0.95).add_(grad, alpha=0.05)
    u, s, vh = torch.linalg.svd((0.05 * grad + 0.95 * momentum).double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    rows, columns = grad.shape
    return ((u * s) @ vh * max(1, rows / columns) ** 0.5).float()


@pytest.mark.parametrize("name", ["one", "two_stage1", "two_stage3"])
def test_first_steps_equal_muon_by_singular_values_and_adamw_for_embeddings_and_norms(
    results: Results, name: str
) -> None:
    weights, report, root = results(name)
    model = AutoModelForCausalLM.from_pretrained(root / "tied", dtype=torch.float32)
    matrices = {n: p for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    assert len(matrices) == 14
    momentum = {n: torch.zeros_like(p) for n, p in matrices.items()}
    rest = [p for n, p in model.named_parameters() if n not in matrices]
    optimizer = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(4):
        sequences, prompts = data_of_step(step)
        total, count = torch.zeros(()), 0
        for ids, prompt in zip(sequences, prompts, strict=True):
            logits = model(torch.tensor([ids])).logits[0, prompt - 1 : -1]
            total = total + F.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum")
            count += len(ids) - prompt
        (total / count).backward()
        factor = [0.5, 1.0, 1.0, 0.5][step]  # two warm-up steps, then half a cosine
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        optimizer.step()
        with torch.no_grad():
            for key, p in matrices.items():
                p.mul_(1 - 2e-2 * factor * 0.1).sub_(2e-2 * factor * muon_update(p.grad, momentum[key]))
        model.zero_grad()
        assert report["log"][step]["loss"] == pytest.approx(float(total.detach() / count), rel=1e-4)
        assert report["log"][step]["lr"] == pytest.approx(1e-2 * factor)
    for key, value in model.named_parameters():
        torch.testing.assert_close(weights[key], value.detach(), atol=2e-5, rtol=0)


def test_checkpoints_hold_momentum_for_matrices_and_adamws_moments_for_the_rest(results: Results) -> None:
    directory = results("scalar")[2] / "of_two_stage3" / "step-00000002"
    found = [key.split("/", 1) for file in directory.glob("*.safetensors") for key in load_file(file)]
    for kind, name in found:
        is_matrix = name.endswith("_proj.weight")
        assert kind in (("fp32", "momentum_buffer") if is_matrix else ("fp32", "exp_avg", "exp_avg_sq"))
    assert {kind for kind, _ in found} == {"fp32", "momentum_buffer", "exp_avg", "exp_avg_sq"}


def test_muon_with_offloaded_optimizer_is_refused(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, hidden=32, layers=1)
    with pytest.raises(ConfigError, match="set offload_optimizer to false"):
        Trainer(
            str(tmp_path),
            head="lm",
            optim=OptimConfig(muon_lr=0.02, grad_clip=0.0, dtype="float32"),
            resources=TrainResources(offload_optimizer=True, threads=1),
            total_steps=1,
            seed=0,
        )
