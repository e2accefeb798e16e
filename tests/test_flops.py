"""FLOPs by formula against torch's counter, over real forward and backward passes on CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from jobs.flops import Work, training_flops
from spct_ray.errors import ConfigError
from spct_ray.learn import attention, model
from spct_ray.learn.batch import make_batch
from spct_ray.learn.model import TokenLogprobs
from spct_ray.stages.plan_check import ModelShape

SIZES: dict[str, Any] = {
    "vocab_size": 960, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES),
    "all layers windowed": MistralConfig(**SIZES, sliding_window=20),
    "one layer windowed": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=20, max_window_layers=2),
}


def attended(products: int, first: int) -> Any:
    """FLOPs of the attention kernel by its mask: what it lets through, counted one by one."""

    def flops(*args: Any, attn_mask: Any = None, **_: Any) -> int:
        (_, heads, queries, width), keys = args[first].shape, args[first + 1].shape[2]
        causal = torch.ones(queries, keys).tril() if attn_mask is None else attn_mask == 0
        return products * 2 * heads * width * int(causal.sum())

    flops._get_raw = True  # type: ignore[attr-defined]  # tensors, not shapes
    return flops


COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attended(2, first=0),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attended(5, first=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_flops_are_those_that_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_MAX_LOGITS", {"cpu": 1 << 14})  # several slices of the vocabulary
    attention.register()
    causal_lm = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention.NAME)
    prompt = list(range(3, 40))
    sequences = [[*prompt, *range(50, 62)], [*prompt, *range(60, 83)], list(range(100, 170))]
    rows = [make_batch(sequences, [37, 37, 30]), make_batch([list(range(5, 95))], [60])]
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        for row in rows:
            TokenLogprobs(causal_lm)(row).sum().backward()
    assert training_flops(CONFIGS[name], rows) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_frozen_weights_have_no_gradients() -> None:
    shape = ModelShape.of(CONFIGS["llama"].to_dict())
    assert shape is not None
    work = Work(100, 0, 0)
    assert (work.forward(shape), work.backward(shape, frozen=True)) == (200 * 3 * shape.layer_weights,) * 2
    assert work.backward(shape) == 2 * work.forward(shape)


def test_a_mixture_of_experts_is_not_guessed() -> None:
    config: PretrainedConfig = MixtralConfig(**SIZES)
    with pytest.raises(ConfigError, match="MixtralConfig: FLOPs are known of dense decoders"):
        training_flops(config, [make_batch([[1, 2]], [1])])
