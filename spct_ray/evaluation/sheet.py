"""What a benchmark's scoring gets to see: what is known of its items, one way to decide, and the credit of an item.

Axes: I items, O options (responses; for n = 1 "wrong" and "right", see `spct_ray.evaluation.curves`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spct_ray.evaluation.curves import Bools, Floats, Ints
from spct_ray.evaluation.readers import facts_of
from spct_ray.records import Item


@dataclass(frozen=True, slots=True)
class Sheet:
    """What is known of a benchmark's items before anyone judges them."""

    option_IO: Bools
    right_IO: Bools
    single_I: Bools  # n = 1
    names: tuple[str, ...]  # of the subsets
    subset_I: Ints  # index into `names`
    question_I: Ints  # items of one row of the benchmark share a number
    facts_I: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, items: Sequence[Item]) -> Sheet:
        """The sheet of the items, in their order."""
        width = max(max(2, len(item.responses)) for item in items)
        option_IO, right_IO = np.zeros((len(items), width), bool), np.zeros((len(items), width), bool)
        numbers: dict[str, int] = {}
        names = tuple(sorted({item.subset for item in items}))
        facts = tuple(facts_of(item) for item in items)
        for i, item in enumerate(items):
            option_IO[i, : max(2, len(item.responses))] = True
            if len(item.responses) == 1:
                right_IO[i, int(item.rewards[0] > 0.5)] = True
            else:
                right_IO[i, : len(item.rewards)] = [r == max(item.rewards) for r in item.rewards]
        return cls(
            option_IO,
            right_IO,
            np.array([len(item.responses) == 1 for item in items]),
            names,
            np.array([names.index(item.subset) for item in items]),
            np.array([numbers.setdefault(f["question"], len(numbers)) for f in facts]),
            facts,
        )

    @property
    def num_questions(self) -> int:
        """Rows of the benchmark that gave at least one item."""
        return int(self.question_I.max()) + 1


@dataclass(frozen=True, slots=True)
class Decision:
    """One way to decide: a score an option [I, O], rows of NaN where no judgement could be used.

    `forward_IO` and `backward_IO` hold the same from the judgements that saw the pair as it is and the other way.
    """

    scores_IO: Floats
    forward_IO: Floats
    backward_IO: Floats


def decided(scores_IO: Floats) -> Bools:
    """[I] whether any judgement of the item could be used."""
    return np.asarray(~np.isnan(scores_IO).any(axis=-1))


def best_credit(sheet: Sheet, scores_IO: Floats) -> Floats:
    """[I] chance that a right response is chosen when ties for the first place are broken at random."""
    held = np.where(sheet.option_IO, scores_IO, -np.inf)
    winner_IO = held == held.max(axis=-1, keepdims=True)  # all False in a row of NaN
    return np.asarray((winner_IO & sheet.right_IO).sum(axis=-1) / np.maximum(1, winner_IO.sum(axis=-1)))


def strict_credit(sheet: Sheet, scores_IO: Floats) -> Floats:
    """[I] 1 where a right response scores above every wrong one (Eq. 10 for one right response), else 0."""
    right = np.where(sheet.right_IO, scores_IO, -np.inf).max(axis=-1)
    wrong = np.where(sheet.option_IO & ~sheet.right_IO, scores_IO, -np.inf).max(axis=-1)
    return np.asarray(right > wrong, dtype=np.float64)
