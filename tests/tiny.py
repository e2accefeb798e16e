"""A random Llama of a few hundred thousand weights with tokenizer and chat template, for tests of the real parts."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spct_ray.learn.examples import Example

CONTROL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "Specific Criteria: instruction adherence (weight 60%), usefulness (40%). Analysis: Response 1 is short and "
    "right; Response 2 breaks the rule. Scores: \\boxed{8, 3}. Name a prime number and say the weather in two words."
)


def make_tiny_tokenizer(vocab_size: int = 384) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text round-trips) with ChatML control tokens; the end-of-turn token is also EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=CONTROL[0],
        eos_token=CONTROL[2],
        additional_special_tokens=[CONTROL[1]],
        chat_template=TEMPLATE,
    )


def make_tiny_model(
    directory: str | Path,
    tied: bool = True,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 384,
    max_length: int = 1024,
    seed: int = 0,
) -> None:
    """Write config, random bf16 weights (safetensors) and tokenizer; `vocab` is a multiple of 32 and at least 288."""
    tokenizer = make_tiny_tokenizer(vocab)
    config = LlamaConfig(
        vocab_size=vocab,  # may exceed len(tokenizer): the corpus allows only so many merges
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def same(one: Example, other: Example) -> bool:
    """Whether two examples are equal, be their ids a list or an array."""
    return (list(one.ids), one.prompt_length, one.label) == (list(other.ids), other.prompt_length, other.label)
