"""The nano judge: a Qwen3 of half a million weights, initialised at random, whose tokens are whole phrases.

Small enough that two CPU cores train it from nothing in minutes. Leaves out training; see `stages.rft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
