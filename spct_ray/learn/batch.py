"""Padded batches: from token ids to tensors, and which sequences go together.

Sequences are padded on the right, so under a causal model padding never reaches a real token. Leaves out the loss:
it is normalised by the caller over the whole batch, so the split into micro-batches and ranks never changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B right-padded sequences of up to T tokens.

    `loss_mask` is True where the NEXT token (position t + 1 of `input_ids`) is trained on. `extras` carries what a loss
    needs beside it: tensors whose first axis is B, e.g. advantages [B] or old log-probs [B, T-1].
    """

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool, False at padding
    loss_mask: Tensor  # [B, T-1] bool
    extras: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            loss_mask=self.loss_mask.to(device),
            extras={name: value.to(device) for name, value in self.extras.items()},
        )


def make_batch(
    sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], extras: dict[str, Tensor] | None = None
) -> Batch:
    """Pad token ids (with 0, which is masked) to the longest; everything after a sequence's prompt is trained on."""
    num_tokens = max(2, max(len(ids) for ids in sequences))
    input_ids = torch.zeros(len(sequences), num_tokens, dtype=torch.long)
    attention_mask = torch.zeros(len(sequences), num_tokens, dtype=torch.bool)
    loss_mask = torch.zeros(len(sequences), num_tokens - 1, dtype=torch.bool)
    for row, (ids, prompt_length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, : len(ids)] = True
        loss_mask[row, max(prompt_length, 1) - 1 : len(ids) - 1] = True
    return Batch(input_ids, attention_mask, loss_mask, extras or {})


def plan_micro_batches(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Indices of the sequences of each micro-batch: alike in length, padded size (count x longest) <= micro_tokens.

    A sequence longer than `micro_tokens` gets a micro-batch of its own.
    """
    plan: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if plan and (len(plan[-1]) + 1) * lengths[plan[-1][0]] <= micro_tokens:
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan


def share_of_rank(lengths: Sequence[int], rank: int, world_size: int) -> list[int]:
    """Indices of the sequences that one rank trains on: about equal work for all, every sequence on exactly one rank.

    Longest first, dealt out to and fro.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    to_and_fro = [*range(world_size), *reversed(range(world_size))]
    return [index for place, index in enumerate(order) if to_and_fro[place % (2 * world_size)] == rank]
