"""The nano judge: a Llama of a few million weights with a byte-level BPE of its own, initialised at random.

Small enough that two CPU cores train it from nothing in minutes. Leaves out training; see `stages.rft`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class NanoConfig:
    """Shape of the model. Head dimension 64, which every vLLM attention back end takes."""

    vocab_size: int = 1536
    hidden_size: int = 256
    num_layers: int = 4
    intermediate_size: int = 768
    max_length: int = 1024


def write_nano(directory: str, config: NanoConfig, texts: Iterable[str], frame: Sequence[str], seed: int) -> int:
    """Train the tokenizer on `texts`, initialise the weights, write both to `directory`; returns the weight count.

    Each string of `frame` becomes one token: what is always written alike is then short, and easy to find again.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_tokenizer(config.vocab_size, texts, frame),
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=config.max_length,
    )
    heads = config.hidden_size // 64
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=True,
            initializer_range=0.05,  # so narrow a model learns more slowly at transformers' 0.02
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def _train_tokenizer(vocab_size: int, texts: Iterable[str], frame: Sequence[str]):  # type: ignore[no-untyped-def]
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer(models.BPE())
    marks = pre_tokenizers.Split(
        Regex(r" ?[^\w\s]| ?\d"), "isolated"
    )  # what decides a constraint is a token of its own
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([marks, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(frame),
            special_tokens=[PAD, USER, ASSISTANT, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in frame])
    return tokenizer
