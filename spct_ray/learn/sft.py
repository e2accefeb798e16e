"""Supervised fine-tuning on judgements: next-token loss on the judgement alone, never on its prompt."""

from __future__ import annotations

from torch import Tensor

from spct_ray.learn.batch import Batch, BatchSize
from spct_ray.learn.trainer import Trainer


def sft_loss(trainer: Trainer, batch: Batch, size: BatchSize) -> Tensor:
    """Minus log p of the judgements' tokens, mean over all such tokens of the whole update."""
    return -trainer.logprobs(batch).sum() / size.num_tokens
