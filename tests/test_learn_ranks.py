"""Real DeepSpeed on gloo: micro-batches, ranks, ZeRO stages and restarts must not change what is learned.

Run as a script, this file is one training rank that works off a list of jobs (JSON) and writes what came out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from spct_ray.judge.seeds import derive_seed
from spct_ray.learn import model as learn_model
from spct_ray.learn.batch import Batch, make_batch, plan_rows

pytestmark = pytest.mark.slow
SEQUENCES = 7  # odd, so that two ranks never hold equal shares


def data_of_step(step: int) -> tuple[list[list[int]], list[int]]:
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(4, 30, (SEQUENCES,), generator=generator).tolist()
    return [torch.randint(3, 380, (n,), generator=generator).tolist() for n in lengths], [n // 3 for n in lengths]


def run_job(job: dict[str, Any]) -> None:
    from spct_ray.learn.trainer import LoraConfig, OptimConfig, Trainer, TrainResources

    learn_model._MAX_LOGITS = {"cpu": job.get("max_logits", 1 << 26)}
    head = job.get("head", "lm")
    muon = {"muon_lr": 2e-2, "grad_clip": 0.0} if job.get("muon") else {}
    trainer = Trainer(
        job["model"],
        head=head,
        optim=OptimConfig(lr=1e-2, warmup_steps=2, dtype=job.get("dtype", "float32"), weight_decay=0.1, **muon),
        resources=TrainResources(
            zero_stage=job["stage"], threads=1, gradient_checkpointing=job.get("recompute", False)
        ),
        total_steps=4,
        seed=0,
        lora=LoraConfig(rank=4) if job.get("lora") else None,
    )
    state = trainer.resume(job["resume"]) if "resume" in job else None
    if "initial_export" in job:
        trainer.export(job["initial_export"])
    log = []
    while trainer.steps_done < job.get("until", 4):
        sequences, prompts = data_of_step(trainer.steps_done)
        tokens = sum(len(s) - p for s, p in zip(sequences, prompts, strict=True))
        num_ranks = 1 if job.get("lonely") else trainer.world_size  # lonely: the other ranks have nothing to do
        plan = plan_rows(sequences, prompts, micro_tokens=job.get("micro_tokens", 4096), num_ranks=num_ranks)
        rows = plan[trainer.rank] if trainer.rank < num_ranks else []
        batches = [make_batch([sequences[i] for i in row], [prompts[i] for i in row]) for row in rows]

        def lm_loss(batch: Batch, tokens: int = tokens) -> Tensor:
            return -trainer.logprobs(batch).sum() / tokens

        def scalar_loss(batch: Batch) -> Tensor:
            return (
                F.binary_cross_entropy_with_logits(
                    trainer.scores(batch), (batch.position_ids[0, batch.last_B] % 2).float(), reduction="sum"
                )
                / SEQUENCES
            )

        log.append(trainer.step(batches, lm_loss if head == "lm" else scalar_loss))
        if trainer.steps_done == job.get("save_at"):
            trainer.save(job["save"], {"note": "kept", "done": trainer.steps_done})
    weights = {name: w.clone() for name, w in trainer.named_weights()}
    assert trainer.weight_shapes() == [(name, tuple(w.shape)) for name, w in weights.items()]
    assert {w.dtype for w in weights.values()} == {trainer.dtype}
    if "export" in job:
        trainer.export(job["export"])
    if trainer.rank == 0:
        save_file(weights, job["out"] + ".safetensors")
        Path(job["out"] + ".json").write_text(json.dumps({"log": log, "state": state}))


def launch(directory: Path, world_size: int, jobs: list[dict[str, Any]]) -> None:
    (directory / "jobs.json").write_text(json.dumps(jobs))
    (directory / "meeting").unlink(missing_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LOCAL_WORLD_SIZE": str(world_size)}
    command = [sys.executable, __file__, str(directory), str(world_size)]
    ranks = [
        subprocess.Popen([*command, str(r)], env={**env, "LOCAL_RANK": str(r)}, stderr=subprocess.STDOUT,
                         stdout=(directory / f"rank-{r}.log").open("w"))
        for r in range(world_size)
    ]  # fmt: skip
    codes = [r.wait(timeout=400) for r in ranks]
    logs = "\n".join((directory / f"rank-{r}.log").read_text()[-4000:] for r in range(world_size))
    assert codes == [0] * world_size, logs


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[dict[str, Tensor], dict[str, Any], Path]]:
    """All jobs, in three launches; gives (weights, {"log", "state"}, directory) by name."""
    root = tmp_path_factory.mktemp("ranks")
    tied, untied = str(root / "tied"), str(root / "untied")
    make_tiny_model(tied, tied=True, hidden=32, layers=2)
    make_tiny_model(untied, tied=False, hidden=32, layers=1)

    def job(name: str, model: str, stage: int, **options: Any) -> dict[str, Any]:
        return {"model": model, "stage": stage, "out": str(root / name), **options}

    launch(root, 1, [
        job("tied", tied, 1),
        job("tied_micro", tied, 2, micro_tokens=40),
        job("untied", untied, 1, export=str(root / "untied_export")),
        job("scalar", untied, 1, head="scalar"),
        job("lora", tied, 1, lora=True),
        job("lora_scalar", untied, 1, lora=True, head="scalar"),
        job("bf16", tied, 1, dtype="bfloat16"),
        job("bf16_half", tied, 1, dtype="bfloat16", until=2, save=str(root / "half"), save_at=2),
    ])  # fmt: skip
    launch(root, 2, [
        job("tied_two", tied, 3, micro_tokens=40, save=str(root / "two"), save_at=2, export=str(root / "tied_export"),
            initial_export=str(root / "initial_export")),
        job("untied_two", untied, 3, max_logits=384 * 8, recompute=True, export=str(root / "untied_two_export")),
        job("lonely", tied, 3, lonely=True, micro_tokens=40),
        job("scalar_two", untied, 3, head="scalar"),
        job("stage1_two", tied, 1),
        job("stage2_two", tied, 2, micro_tokens=40),
        job("lora_two", tied, 3, lora=True, micro_tokens=40, recompute=True, save=str(root / "lora_half"), save_at=2,
            export=str(root / "lora_export")),
        job("lora_stage2_two", tied, 2, lora=True, micro_tokens=40),
        job("lora_scalar_two", untied, 3, lora=True, head="scalar"),
        job("bf16_two", tied, 3, dtype="bfloat16", micro_tokens=40),
        job("bf16_stage3_half", tied, 3, dtype="bfloat16", until=2, save=str(root / "half3"), save_at=2),
        job("bf16_stage3", tied, 3, dtype="bfloat16"),
    ])  # fmt: skip
    launch(root, 2, [job("bf16_stage3_resumed", tied, 3, dtype="bfloat16", resume=str(root / "half3"))])
    launch(root, 1, [
        job("bf16_resumed", tied, 1, dtype="bfloat16", resume=str(root / "half")),
        job("two_resumed_by_one", tied, 1, resume=str(root / "two")),
        job("lora_resumed_by_one", tied, 1, lora=True, resume=str(root / "lora_half")),
    ])  # fmt: skip

    def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
        report = json.loads((root / f"{name}.json").read_text())
        return load_file(root / f"{name}.safetensors"), report, root

    return read


Results = Callable[[str], tuple[dict[str, Tensor], dict[str, Any], Path]]


def assert_same(results: Results, name: str, other: str, tolerance: float) -> None:
    (weights, report, _), (expected, expected_report, _) = results(name), results(other)
    assert weights.keys() == expected.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value.float(), expected[key].float(), atol=tolerance, rtol=0)
    last = len(report["log"])
    for step, step_expected in zip(report["log"], expected_report["log"][-last:], strict=True):
        assert step == pytest.approx(step_expected, rel=max(tolerance, 1e-9), abs=tolerance)


@pytest.mark.parametrize("name", ["tied_micro", "tied_two", "lonely", "stage1_two", "stage2_two", "two_resumed_by_one"])
def test_micro_batches_ranks_stages_and_restarts_do_not_change_what_is_learned(results: Results, name: str) -> None:
    assert_same(results, name, "tied", 5e-5)


def test_chunked_output_layer_and_recomputation_under_zero_3_change_nothing(results: Results) -> None:
    assert_same(results, "untied_two", "untied", 5e-5)


def test_two_ranks_learn_the_same_scalar_head(results: Results) -> None:
    assert_same(results, "scalar_two", "scalar", 5e-5)


@pytest.mark.parametrize(("name", "other"), [
    ("lora_two", "lora"), ("lora_stage2_two", "lora"), ("lora_resumed_by_one", "lora"),
    ("lora_scalar_two", "lora_scalar"),
])  # fmt: skip
def test_ranks_stages_and_restarts_do_not_change_what_adapters_learn(results: Results, name: str, other: str) -> None:
    assert_same(results, name, other, 5e-5)


def test_checkpoints_hold_the_adapters_alone(results: Results) -> None:
    directory = results("lora_two")[2] / "lora_half" / "step-00000002"
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) == 2
    assert all(".lora_A." in name or ".lora_B." in name for file in files for name in load_file(file))


def test_bf16_ranks_agree_up_to_rounding(results: Results) -> None:
    log, expected = results("bf16_two")[1]["log"], results("bf16")[1]["log"]
    assert [s["loss"] for s in log] == pytest.approx([s["loss"] for s in expected], rel=0.03)


@pytest.mark.parametrize(("name", "other"), [("bf16_resumed", "bf16"), ("bf16_stage3_resumed", "bf16_stage3")])
def test_resumed_run_is_bit_equal_to_an_undisturbed_one(results: Results, name: str, other: str) -> None:
    assert results(name)[1]["state"] == {"note": "kept", "done": 2}
    assert_same(results, name, other, 0.0)


@pytest.mark.parametrize("name", ["tied", "lora"])
def test_first_steps_equal_plain_torch(results: Results, name: str) -> None:
    """The same four updates by torch.optim.AdamW on transformers' own logits and loss."""
    weights, report, root = results(name)
    model = AutoModelForCausalLM.from_pretrained(root / "tied", dtype=torch.float32)
    if name == "lora":
        torch.manual_seed(derive_seed(0, "adapters"))
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1
    )
    for step in range(4):
        sequences, prompts = data_of_step(step)
        total, count = torch.zeros(()), 0
        for ids, prompt in zip(sequences, prompts, strict=True):
            logits = model(torch.tensor([ids])).logits[0, prompt - 1 : -1]
            total = total + F.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum")
            count += len(ids) - prompt
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = [5e-3, 1e-2, 1e-2, 5e-3][step]  # two warm-up steps, then half a cosine
        optimizer.step()
        optimizer.zero_grad()
        assert report["log"][step]["loss"] == pytest.approx(float(total.detach() / count), rel=1e-4)
        assert report["log"][step]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    if name == "lora":
        model = model.merge_and_unload()
    for key, value in model.named_parameters():
        torch.testing.assert_close(weights[key], value.detach(), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("job", "directory"), [
    ("tied_two", "tied_export"), ("untied", "untied_export"), ("untied_two", "untied_two_export"),
    ("lora_two", "lora_export"),
])  # fmt: skip
def test_export_reloads_with_equal_weights_tokenizer_and_template(results: Results, job: str, directory: str) -> None:
    weights, _, root = results(job)
    model = AutoModelForCausalLM.from_pretrained(root / directory, dtype=torch.float32)
    assert model.config.tie_word_embeddings == ("untied" not in job)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), weights[name], rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(root / directory)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(root / "tied").chat_template
    assert (root / directory / "generation_config.json").exists()
    assert not list(root.glob("*.tmp"))


def test_export_before_any_step_gives_the_initial_model(results: Results) -> None:
    root = results("tied_two")[2]
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = [AutoModelForCausalLM.from_pretrained(root / d)(ids).logits for d in ("initial_export", "tied")]
    torch.testing.assert_close(logits[0].float(), logits[1].float(), rtol=0.02, atol=0.02)


if __name__ == "__main__":
    import torch.distributed as dist

    directory_, world_size_, rank_ = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{directory_}/meeting", rank=rank_, world_size=world_size_)
    for job_ in json.loads(Path(directory_, "jobs.json").read_text()):
        print("job", job_["out"], flush=True)
        run_job(job_)
    dist.destroy_process_group()
