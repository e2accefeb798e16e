"""The losses of supervised training, and the packed rows of each rank.

SFT (RFT's judgements) trains the language model's head; the meta RM and the Bradley-Terry baseline a scalar one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spct_ray.learn.batch import Batch, BatchSize, Tokens, make_batch, packed_rows, plan_rows
from spct_ray.learn.examples import Example
from spct_ray.learn.model import Head
from spct_ray.learn.trainer import Trainer


def sft_loss(trainer: Trainer, batch: Batch, size: BatchSize) -> Tensor:
    """Minus log p of the completions' tokens, never of the prompts': the mean over all such tokens of the update."""
    return -trainer.logprobs(batch).sum() / size.num_tokens


def meta_loss(trainer: Trainer, batch: Batch, size: BatchSize) -> Tensor:
    """Binary cross-entropy of the logits against `batch.extras["label"]`, the mean over the whole update."""
    labels = batch.extras["label"].to(trainer.device)
    return F.binary_cross_entropy_with_logits(trainer.scores(batch), labels, reduction="sum") / size.num_sequences


def bradley_terry_loss(trainer: Trainer, batch: Batch, size: BatchSize) -> Tensor:
    """-log sigmoid(score of the chosen - score of the rejected response), the mean over all pairs of the update."""
    scores = trainer.scores(batch)
    return -F.logsigmoid(scores[0::2] - scores[1::2]).sum() / size.num_sequences


def rank_rows(examples: Sequence[Example], rank: int, num_ranks: int, micro_tokens: int) -> list[Batch]:
    """One rank's share as packed rows of at most `micro_tokens`, with the examples' labels."""
    ids, prompts = [e.ids for e in examples], [e.prompt_length for e in examples]
    rows, _ = packed_rows(ids, prompts, micro_tokens, (rank, num_ranks))
    return [replace(row, extras={"label": torch.tensor([examples[i].label for i in indices])}) for indices, row in rows]


def pair_rows(examples: Sequence[Example], rank: int, num_ranks: int, micro_tokens: int) -> list[Batch]:
    """One rank's share of the examples of `make_pair`: a row's sequences alternate between chosen and rejected ones,
    and both of a pair are in the same row."""
    ids, prompts = [e.ids for e in examples], [e.prompt_length for e in examples]
    plan = plan_rows(ids, prompts, micro_tokens=micro_tokens, num_ranks=num_ranks, share_prompts=False)
    batches = []
    for row in plan[rank]:
        sequences: list[Tokens] = []
        for example in (examples[i] for i in row):
            prompt, end = example.ids[: example.prompt_length], example.prompt_length + int(example.label)
            sequences += [example.ids[:end], np.concatenate([prompt, example.ids[end:]])]
        batches.append(make_batch(sequences, [prompts[i] for i in row for _ in range(2)]))
    return batches


@dataclass(frozen=True)
class SupervisedLoss:
    """What a model with `head` learns: `loss_fn(trainer, row, size of the update)`, summed over all rows of all ranks,
    which `make_rows(examples, rank, number of ranks, micro_tokens)` packs for each rank."""

    head: Head
    loss_fn: Callable[[Trainer, Batch, BatchSize], Tensor]
    make_rows: Callable[[Sequence[Example], int, int, int], list[Batch]]


LOSSES = {
    "sft": SupervisedLoss("lm", sft_loss, rank_rows),
    "meta": SupervisedLoss("scalar", meta_loss, rank_rows),
    "bradley_terry": SupervisedLoss("scalar", bradley_terry_loss, pair_rows),
}
