"""Supervised fine-tuning on judgements: next-token loss on the judgement alone, never on its prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from spct_ray.chat import encode_example
from spct_ray.learn.batch import Batch, BatchSize
from spct_ray.learn.examples import Example
from spct_ray.learn.trainer import Trainer
from spct_ray.records import Message


def sft_loss(trainer: Trainer, batch: Batch, size: BatchSize) -> Tensor:
    """Minus log p of the judgements' tokens, mean over all such tokens of the whole update."""
    return -trainer.logprobs(batch).sum() / size.num_tokens


def encode_rows(tokenizer: Any, rows: Iterable[Mapping[str, Any]], max_tokens: int) -> Iterator[Example | None]:
    """Examples from rows {prompt: messages, completion: text}; None where it would exceed `max_tokens`."""
    for row in rows:
        ids, prompt_length = encode_example(tokenizer, [Message(**m) for m in row["prompt"]], row["completion"])
        yield Example(ids, prompt_length) if len(ids) <= max_tokens else None
