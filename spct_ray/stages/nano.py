"""The nano student, made from nothing: a Qwen3 of half a million random weights, whose tokens are whole phrases.

It knows no language, no format and no task; the cold start teaches it all of them. Two CPU cores train it in minutes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spct_ray.config import UNLESS_DEFAULT
from spct_ray.data.builtin import KINDS, NAMES, kinds_at
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext

_MOST = 6  # responses and principles whose frame is whole tokens
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class NanoConfig:
    """Shape of the model. Head dimension 32, which vLLM's attention takes on CPUs and GPUs."""

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 8  # more than hidden_size / 32: what looks back by one token and by two needs a head each
    intermediate_size: int = 256
    max_length: int = 512


@dataclass(frozen=True)
class NanoStudentConfig:
    """Shape of the model. The run's `items.builtin.kinds` become its `kinds`, whose words are tokens, too."""

    shape: NanoConfig = field(default_factory=NanoConfig)
    kinds: tuple[str, ...] = field(default=(), metadata=UNLESS_DEFAULT)


@stage(version=3)
def run(context: StepContext, config: NanoStudentConfig, _: None) -> dict[str, Any]:
    """Write model/; started again after a kill, it makes the same model again."""
    model = Path(context.out) / "model"
    shutil.rmtree(model, ignore_errors=True)  # of an attempt that was killed
    num_weights = write_nano(str(model), config.shape, phrases(config.kinds), context.seed)
    context.log(f"nano student with {num_weights / 1e6:.2f} M random weights")
    return {"weights": num_weights}


def phrases(outside: tuple[str, ...] = ()) -> list[str]:
    """The frame of the compact prompt, of the meta RM's and of a judgement, and the words of the built-in set, with
    those of the kinds at the import paths `outside`.

    Single characters are tokens anyway.
    """
    places = range(1, _MOST + 1)
    found = ["Score 1-10.\nQuery:", "Score 0-1.\nQuery:", "Please score the responses.\nQuery:", "\nPrinciples:"]
    found += [f"\n[Response {p}]\n{start}" for p in places for start in ("", "The")]
    found += [f"\n[End {p}]" for p in places]
    found += ["Specific Criteria:", "\nAnalysis:", "\nScores: \\boxed{"]
    found += [f" ({100 // p}%);" for p in places]
    found += [f" total {score}." for score in range(11)] + ["10", *(f" {score}" for score in range(1, 11))]
    found += [" Write for", *(f" {name}" for split in NAMES.values() for name in split)]
    for kind in (*KINDS.values(), *kinds_at(outside)):
        found += [f" {kind.name}", *(f" ({kind.name}: {answer})" for answer in ("yes", "no"))]
        found += [f" {word}" for word in kind.words]
    return list(dict.fromkeys(found))


def write_nano(directory: str, config: NanoConfig, phrases: Sequence[str], seed: int) -> int:
    """Write tokenizer and random weights to `directory`; returns the weight count.

    Each phrase is one token, the longest that fits is taken; all other text is encoded byte by byte.
    """
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(phrases),
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=config.max_length,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=-(-len(tokenizer) // 32) * 32,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            head_dim=32,
            max_position_embeddings=config.max_length,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},  # texts of a hundred tokens
            tie_word_embeddings=True,
            initializer_range=0.05,  # so narrow a model learns more slowly at transformers' 0.02
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def _tokenizer(phrases: Sequence[str]):  # type: ignore[no-untyped-def]
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([PAD, USER, ASSISTANT, END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, USER, ASSISTANT, END])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer
