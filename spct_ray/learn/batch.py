"""Packed rows: many sequences in one row without padding, each prompt once; and the plan of what goes in which row.

A judge's prompt is several times its completion, and all completions of a group share it. A row therefore holds trees:
a trunk (the prompt) and the branches (its completions), each of which attends to the trunk and to itself (see
`attention.py`). Losses are normalised over the whole update, so how sequences are spread over rows and ranks never
changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Tokens = Sequence[int] | npt.NDArray[np.int32]  # ids; arrays are copied only when they are put into a row


@dataclass(frozen=True, slots=True)
class Tree:
    """Tokens of a trunk, followed in the row by those of each branch. A sequence alone is one trunk."""

    trunk: int
    branches: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """One row of T tokens with B sequences, N of whose tokens are trained on, sequence after sequence.

    Trained token n is `target_N[n]`, predicted by the hidden state at `source_N[n]`; the first tokens of all branches
    of a tree have the same source. `extras` has what else a loss needs, as tensors over N or B.
    """

    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T], from 0 in each sequence
    trees: tuple[Tree, ...]
    source_N: Tensor  # places in the row
    target_N: Tensor  # token ids
    sequence_N: Tensor  # 0 .. B-1
    last_B: Tensor  # place of each sequence's last token
    num_trained: tuple[int, ...]  # trained tokens of each sequence
    num_naive: int  # tokens of all sequences, each with its own prompt
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        tensors = ("input_ids", "position_ids", "source_N", "target_N", "sequence_N", "last_B")
        moved = {name: getattr(self, name).to(device) for name in tensors}
        return replace(self, **moved, extras={name: value.to(device) for name, value in self.extras.items()})

    def split(self, values_N: Tensor) -> tuple[Tensor, ...]:
        """Values of trained tokens, one tensor per sequence."""
        return torch.split(values_N, list(self.num_trained))


@dataclass(frozen=True)
class BatchSize:
    """The size of one update over all ranks, by which losses are normalised."""

    num_sequences: int
    num_tokens: int  # trained on


def make_batch(sequences: Sequence[Tokens], prompt_lengths: Sequence[int], share_prompts: bool = True) -> Batch:
    """All sequences in one row, equal prompts once. What follows a sequence's prompt (at least its first token) is
    trained on."""
    ids_B, trunks = _arrays(sequences), [max(1, length) for length in prompt_lengths]
    ids: list[npt.NDArray[np.int32]] = []
    positions: list[npt.NDArray[np.int64]] = []
    sources: list[npt.NDArray[np.int64]] = [np.arange(0)] * len(ids_B)
    trees: list[Tree] = []
    last, end = [0] * len(ids_B), 0
    for group in _groups(ids_B, trunks, share_prompts):
        trunk = trunks[group[0]]
        ids.append(ids_B[group[0]][:trunk])
        positions.append(np.arange(trunk))
        end += trunk
        trunk_end = end - 1
        branches = []
        for index in group:
            branch = ids_B[index][trunk:]
            ids.append(branch)
            positions.append(np.arange(trunk, trunk + len(branch)))
            sources[index] = np.arange(end - 1, end - 1 + len(branch))
            sources[index][:1] = trunk_end
            end += len(branch)
            last[index] = end - 1 if len(branch) else trunk_end
            branches.append(len(branch))
        # A sequence alone is one trunk: plain causal attention is the fastest.
        trees.append(Tree(trunk, tuple(branches)) if len(group) > 1 else Tree(trunk + branches[0]))
    num_trained = tuple(map(len, sources))
    targets = [ids[trunk:] for ids, trunk in zip(ids_B, trunks, strict=True)]
    return Batch(
        input_ids=_joined(ids)[None],
        position_ids=_joined(positions)[None],
        trees=tuple(trees),
        source_N=_joined(sources),
        target_N=_joined(targets),
        sequence_N=torch.arange(len(ids_B)).repeat_interleave(torch.tensor(num_trained)),
        last_B=torch.tensor(last),
        num_trained=num_trained,
        num_naive=sum(map(len, ids_B)),
    )


def packed_rows(
    sequences: Sequence[Tokens],
    prompt_lengths: Sequence[int],
    micro_tokens: int,
    ranks: tuple[int, int] = (0, 1),
    share_prompts: bool = True,
) -> tuple[list[tuple[list[int], Batch]], int]:
    """The rows of one rank, each with the indices of its sequences, and how many rows the rank with the most has.

    `ranks` are this rank and their number. See `plan_rows`.
    """
    rank, num_ranks = ranks
    plan = plan_rows(
        sequences, prompt_lengths, micro_tokens=micro_tokens, num_ranks=num_ranks, share_prompts=share_prompts
    )
    rows = [
        (row, make_batch([sequences[i] for i in row], [prompt_lengths[i] for i in row], share_prompts))
        for row in plan[rank]
    ]
    return rows, max(map(len, plan))


def plan_rows(
    sequences: Sequence[Tokens],
    prompt_lengths: Sequence[int],
    *,
    micro_tokens: int,
    num_ranks: int = 1,
    share_prompts: bool = True,
) -> list[list[list[int]]]:
    """Indices of the sequences of each row of each rank; every sequence is in exactly one.

    Sequences with equal prompts stay together where `micro_tokens` allows, as they then cost their prompt once. Ranks
    get about equally many tokens (longest first, to the rank with the least). A row holds at most `micro_tokens`, but
    for a sequence that alone is longer. The longest row comes first, so that the memory it frees fits all others.
    """
    trunks = [max(1, length) for length in prompt_lengths]
    units: list[tuple[int, list[int]]] = []  # tokens, indices
    for group in _groups(_arrays(sequences), trunks, share_prompts):
        size, members = 0, []  # type: int, list[int]
        for index in group:
            branch = len(sequences[index]) - trunks[index]
            if members and size + branch > micro_tokens:
                units.append((size, members))
                members = []
            size = size + branch if members else trunks[index] + branch
            members = [*members, index]
        units.append((size, members))
    units.sort(key=lambda unit: (-unit[0], unit[1]))
    loads = [0] * num_ranks
    rows: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    sizes: list[list[int]] = [[] for _ in range(num_ranks)]
    for size, members in units:
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        loads[rank] += size
        for row, used in enumerate(sizes[rank]):  # first fit
            if used + size <= micro_tokens:
                rows[rank][row] += members
                sizes[rank][row] += size
                break
        else:
            rows[rank].append(list(members))
            sizes[rank].append(size)
    return [
        [row for _, row in sorted(zip(used, planned, strict=True), key=lambda pair: -pair[0])]
        for used, planned in zip(sizes, rows, strict=True)
    ]


def _groups(ids_B: Sequence[npt.NDArray[np.int32]], trunks: Sequence[int], share_prompts: bool) -> list[list[int]]:
    """Indices of sequences that share their first `trunks` tokens, in order of first appearance."""
    groups: dict[object, list[int]] = {}
    for index, (ids, trunk) in enumerate(zip(ids_B, trunks, strict=True)):
        groups.setdefault(ids[:trunk].tobytes() if share_prompts else index, []).append(index)
    return list(groups.values())


def _arrays(sequences: Sequence[Tokens]) -> list[npt.NDArray[np.int32]]:
    return [np.asarray(sequence, np.int32) for sequence in sequences]


def _joined(parts: Sequence[npt.NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts, dtype=np.int64))


@torch.no_grad()
def forward_rows(forward: Callable[[Batch], Tensor], rows: Sequence[Batch], num_passes: int) -> list[Tensor]:
    """`forward` of each row, without gradients. Every rank makes `num_passes` passes, if need be of an empty row:
    ZeRO-3 gathers weights in each of them. Collective."""
    outputs = [forward(row) for row in [*rows, *[EMPTY] * (num_passes - len(rows))]]
    return outputs[: len(rows)]


EMPTY = make_batch([[0, 0]], [1])  # one trained token, for ranks that keep others company without work of their own
