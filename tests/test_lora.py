"""LoRA against plain peft: what the adapters compute, which weights are trained, what leaves the trainer."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from spct_ray.errors import ConfigError
from spct_ray.learn.batch import make_batch
from spct_ray.learn.lora import add_adapters, whole_weights
from spct_ray.learn.model import TokenLogprobs, load_model
from spct_ray.learn.train_config import LoraConfig
from spct_ray.stages.grpo import GrpoConfig

SEQUENCES, PROMPTS = [[5, 9, 11, 200, 3, 40], [7, 8, 9], [30, 31, 32, 33, 34, 35, 36, 37, 38]], [2, 1, 4]
LORA = LoraConfig(rank=4, alpha=6.0, target_modules=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = str(tmp_path_factory.mktemp("tiny") / "model")
    make_tiny_model(directory, tied=False, hidden=32, layers=2)
    return directory


def plain_peft(model_dir: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def fill(parameters: Any) -> None:
    """Random adapters, B included, which begins at 0; the same for models with the same names."""
    generator = torch.Generator().manual_seed(7)
    for _, parameter in sorted((n.removeprefix("base_model.model."), p) for n, p in parameters if p.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def test_log_probs_gradients_and_merged_weights_equal_plain_peft(tiny: str) -> None:
    policy = TokenLogprobs(load_model(tiny, "lm", torch.float32, on_gpu=False))
    add_adapters(policy.model, LORA)
    plain = plain_peft(tiny)
    fill(policy.model.named_parameters())
    fill(plain.named_parameters())
    logp_N = policy(make_batch(SEQUENCES, PROMPTS))
    expected = []
    for ids, prompt in zip(SEQUENCES, PROMPTS, strict=True):
        logits = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected += [logits[t, ids[t + 1]] for t in range(prompt - 1, len(ids) - 1)]
    torch.testing.assert_close(logp_N, torch.stack(expected), atol=1e-5, rtol=0)
    logp_N.sum().backward()
    torch.stack(expected).sum().backward()
    theirs = {name.removeprefix("base_model.model."): p for name, p in plain.named_parameters()}
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, p in theirs.items() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # A and B of two layers' two modules
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=2e-5, rtol=1e-4)

    merged = {whole.name: whole.value() for whole in whole_weights(policy.model)}
    expected_weights = dict(plain.merge_and_unload().named_parameters())
    assert merged.keys() == expected_weights.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected_weights[name].detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_change_nothing_and_all_linear_layers_of_the_trunk_get_them(tiny: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = load_model(tiny, "scalar", dtype, on_gpu=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_adapters(model, LoraConfig(rank=2, dropout=0.5))
    assert {p.dtype for p in model.parameters()} == {dtype}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in trained
    assert len(trained) == 1 + 2 * 7 * 2  # q, k, v, o, gate, up, down of two layers
    merged = {whole.name: whole.value() for whole in whole_weights(model)}
    assert merged.keys() == before.keys()
    assert all(torch.equal(merged[name], weight) for name, weight in before.items())


def test_a_model_without_adapters_gives_its_live_weights(tiny: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    weights = {whole.name: whole.value().data_ptr() for whole in whole_weights(model)}
    assert weights == {name: p.data_ptr() for name, p in model.named_parameters()}


@pytest.mark.parametrize("target", ["q_prj", "embed_tokens", "lm_head", "mlp"])
def test_targets_that_are_no_linear_layer_of_the_trunk_are_refused(tiny: str, target: str) -> None:
    model = load_model(tiny, "lm", torch.float32, on_gpu=False)
    with pytest.raises(ConfigError, match=rf"lora.target_modules: {target} names no linear layer .* it has down_proj"):
        add_adapters(model, LoraConfig(rank=2, target_modules=("q_proj", target)))
    assert all(p.requires_grad for p in model.parameters())


def test_values_that_cannot_work_are_refused() -> None:
    for wrong in ({"rank": -1}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match=r"lora: rank .* alpha .* dropout"):
            LoraConfig(**wrong)
    with pytest.raises(ConfigError, match=r"lora.dropout is 0.1; the engine samples without"):
        GrpoConfig(lora=LoraConfig(rank=2, dropout=0.1))
