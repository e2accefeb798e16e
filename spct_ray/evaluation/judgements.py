"""Judgements as arrays: the items of a benchmark (`Sheet`), one judge's samples of them (`ScoreTable`), one way to
decide (`Decision`), and the credit that an item earns.

Axes: I items, K samples, O options of an item, between which a vote chooses. With n >= 2 the options are the responses.
With n = 1 they are "wrong" and "right": each sample gives "right" its score and "wrong" the middle of the scale. So the
response counts as right when the mean of the used scores is above the middle (0.5 or 5.5), and one rule decides n = 1
and n >= 2.

A sample that could not be parsed does not vote and is never scored. An item without any usable sample is undecided and
counts as wrong. A tie of m options counts 1/m for each, which is the exact mean over random tie-breaks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spct_ray.errors import DataError
from spct_ray.records import Item, Trajectory

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def facts_of(item: Item) -> dict[str, Any]:
    """The facts noted when the item was read, and "question", the row that it came from."""
    noted = json.loads(item.facts) if item.facts else {}
    return {"question": item.id, **(noted if isinstance(noted, dict) else {})}


def options_of(scores: Sequence[float], middle: float) -> tuple[float, ...]:
    """The score of each option by one judgement, or by the mean of several; for n = 1 "wrong" scores `middle`."""
    return tuple(float(s) for s in scores) if len(scores) > 1 else (middle, float(scores[0]))


def right_options(item: Item) -> list[bool]:
    """Which options of an item are right."""
    if len(item.responses) == 1:
        return [item.rewards[0] <= 0.5, item.rewards[0] > 0.5]
    return [reward == max(item.rewards) for reward in item.rewards]


@dataclass(frozen=True, slots=True)
class Sheet:
    """The items of a benchmark, as known before any judgement."""

    option_IO: Bools  # False beyond the item's own number of options
    right_IO: Bools
    num_responses_I: Ints
    names: tuple[str, ...]  # of the subsets
    subset_I: Ints  # index into `names`
    question_I: Ints  # items of one row of the benchmark share a number
    facts_I: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, items: Sequence[Item]) -> Sheet:
        """The sheet of the items, in their order."""
        num_responses_I = np.array([len(item.responses) for item in items])
        num_options_I = np.maximum(2, num_responses_I)
        option_IO = np.arange(num_options_I.max()) < num_options_I[:, None]
        right_IO = np.zeros(option_IO.shape, dtype=bool)
        right_IO[option_IO] = [right for item in items for right in right_options(item)]
        names, facts = tuple(sorted({item.subset for item in items})), tuple(map(facts_of, items))
        questions = {question: number for number, question in enumerate(dict.fromkeys(f["question"] for f in facts))}
        subset_I = np.array([names.index(item.subset) for item in items])
        question_I = np.array([questions[f["question"]] for f in facts])
        return cls(option_IO, right_IO, num_responses_I, names, subset_I, question_I, facts)

    @property
    def num_questions(self) -> int:
        """Rows of the benchmark with at least one item."""
        return int(self.question_I.max()) + 1

    @property
    def single_I(self) -> Bools:
        """[I] whether n = 1."""
        return np.asarray(self.num_responses_I == 1)


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """All samples of one judge; unparsable samples have zeros in `scores_IKO` and False in `used_IK`."""

    sheet: Sheet
    scores_IKO: Floats
    used_IK: Bools
    tokens_IK: Floats
    order_IK: Ints  # equal for equal orders of an item's responses
    first_IK: Ints  # index of the response that was shown first
    logits_IK: Floats | None  # meta-RM logits; None without meta RM

    @classmethod
    def blank(cls, items: Sequence[Item], num_samples: int, with_logits: bool = False) -> ScoreTable:
        """The table of items none of whose samples could be parsed, to be filled in."""
        sheet, shape = Sheet.of(items), (len(items), num_samples)
        return cls(
            sheet=sheet,
            scores_IKO=np.zeros((*shape, sheet.option_IO.shape[1])),
            used_IK=np.zeros(shape, dtype=bool),
            tokens_IK=np.zeros(shape),
            order_IK=np.zeros(shape, dtype=np.int64),
            first_IK=np.zeros(shape, dtype=np.int64),
            logits_IK=np.full(shape, -np.inf) if with_logits else None,
        )

    @property
    def num_samples(self) -> int:
        """K, the number of samples per item."""
        return int(self.used_IK.shape[1])

    @property
    def winners_IKO(self) -> Bools:
        """The options to which each sample gives its highest score."""
        return winners(self.sheet, self.scores_IKO)

    @property
    def tied_IK(self) -> Bools:
        """Whether a parsed sample gives its highest score to several options."""
        return np.asarray(self.used_IK & (self.winners_IKO.sum(axis=-1) > 1))

    @property
    def correct_IK(self) -> Bools:
        """Whether a sample is right by Eq. 10 (strict: ties and unparsable samples are wrong)."""
        best_I11 = self.sheet.right_IO.argmax(axis=1)[:, None, None]
        best_wins_IK = np.take_along_axis(self.winners_IKO, best_I11, axis=-1)[..., 0]
        return np.asarray(self.used_IK & best_wins_IK & ~self.tied_IK)

    def tie_rate(self) -> float | None:
        """Share of the parsed samples of items with n >= 2 whose highest score is shared; None without such samples."""
        counted_IK = self.used_IK & ~self.sheet.single_I[:, None]
        return float(self.tied_IK[counted_IK].mean()) if counted_IK.any() else None

    def position_consistency(self) -> float | None:
        """The share of pairs of parsed samples of one item in different orders that have the same set of winners.

        None without such pairs (only n = 1, one sample, or nothing parsed).
        """
        set_IK = self.winners_IKO @ (1 << np.arange(self.scores_IKO.shape[-1]))
        pair_IKK = self.used_IK[:, :, None] & self.used_IK[:, None, :]
        pair_IKK &= self.order_IK[:, :, None] != self.order_IK[:, None, :]
        same_IKK = set_IK[:, :, None] == set_IK[:, None, :]
        return float(same_IKK[pair_IKK].mean()) if pair_IKK.any() else None


def tabulate(
    items: Sequence[Item],
    trajectories: Sequence[Trajectory],
    middle: float,
    logits: Mapping[str, float] | None = None,
) -> ScoreTable:
    """Arrays from records. `logits` maps Trajectory.key to the meta RM's logit.

    Raises DataError when the items have unequal numbers of samples, a sample occurs twice, or a usable sample has no
    finite logit.
    """
    samples: dict[str, dict[int, Trajectory]] = {item.id: {} for item in items}
    for t in trajectories:
        if t.sample in samples[t.item_id]:
            raise DataError(f"judge {t.model!r}: sample {t.key} occurs twice; was one step's output written twice?")
        samples[t.item_id][t.sample] = t
    counts = Counter(len(by_number) for by_number in samples.values())
    if len(counts) != 1 or 0 in counts:
        numbers = ", ".join(f"{num} items with {k} samples" for k, num in sorted(counts.items()))
        raise DataError(f"every item needs the same number (>= 1) of samples, found {numbers or 'no items'}")
    table = ScoreTable.blank(items, next(iter(counts)), logits is not None)
    order_numbers: dict[tuple[int, ...], int] = {}
    for i, item in enumerate(items):
        for k, (_, t) in enumerate(sorted(samples[item.id].items())):
            table.tokens_IK[i, k], table.first_IK[i, k] = t.completion_tokens, t.order[0]
            table.order_IK[i, k] = order_numbers.setdefault(t.order, len(order_numbers))
            if t.failure:
                continue
            table.used_IK[i, k] = True
            scores = options_of(t.scores, middle)
            table.scores_IKO[i, k, : len(scores)] = scores
            if logits is not None and table.logits_IK is not None:
                table.logits_IK[i, k] = logits.get(t.key, np.nan)
                if not np.isfinite(table.logits_IK[i, k]):
                    raise DataError(f"judge {t.model!r}: sample {t.key} has no finite meta-RM logit; rerun meta_scores")
    return table


def tabulate_scores(items: Sequence[Item], scores: Mapping[str, Sequence[float]]) -> ScoreTable:
    """The table of a scalar reward model: one sample per item, the score of each response; for n = 1 "wrong" has 0.

    Raises DataError for items without scores.
    """
    if missing := [item.id for item in items if item.id not in scores]:
        raise DataError(f"no scores of {len(missing)} items, the first is {missing[0]!r}")
    table = ScoreTable.blank(items, 1)
    table.used_IK[:] = True
    table.scores_IKO[:, 0][table.sheet.option_IO] = [s for item in items for s in options_of(scores[item.id], 0.0)]
    return table


def in_all_orders(greedy: Sequence[Trajectory]) -> list[Trajectory]:
    """Greedy judgements, equally many per item: a single response has one order, whose judgement stands for all."""
    by_item: dict[str, list[Trajectory]] = {}
    for t in greedy:
        by_item.setdefault(t.item_id, []).append(t)
    num = max(map(len, by_item.values()), default=0)
    filled = (ts if len(ts) == num else [replace(ts[0], sample=j) for j in range(num)] for ts in by_item.values())
    return [t for ts in filled for t in ts]


@dataclass(frozen=True, slots=True)
class Decision:
    """One way to decide: a score per option [I, O], rows of NaN where no judgement could be used.

    `forward_IO` and `backward_IO` are the same from the judgements that saw a pair as it is and in reverse.
    """

    scores_IO: Floats
    forward_IO: Floats
    backward_IO: Floats


def winners(sheet: Sheet, scores: Floats) -> Bools:
    """Which options have the highest score, none in a row of NaN; scores [I, O] or [I, anything, O]."""
    option = sheet.option_IO if scores.ndim == 2 else sheet.option_IO[:, None, :]
    held = np.where(option, scores, -np.inf)
    return np.asarray(held == held.max(axis=-1, keepdims=True))


def decided(scores_IO: Floats) -> Bools:
    """[I] whether any judgement of the item could be used."""
    return np.asarray(~np.isnan(scores_IO).any(axis=-1))


def best_credit(sheet: Sheet, scores_IO: Floats) -> Floats:
    """[I] probability that a right response is chosen when ties are broken at random."""
    winner_IO = winners(sheet, scores_IO)
    return np.asarray((winner_IO & sheet.right_IO).sum(axis=-1) / np.maximum(1, winner_IO.sum(axis=-1)))


def verdicts(sheet: Sheet, scores_IO: Floats) -> Floats:
    """[I] 1 where a right response scores above every wrong one, -1 where a wrong one does, 0 if tied or undecided."""
    right = np.where(sheet.right_IO, scores_IO, -np.inf).max(axis=-1)
    wrong = np.where(sheet.option_IO & ~sheet.right_IO, scores_IO, -np.inf).max(axis=-1)
    return np.asarray((right > wrong).astype(float) - (right < wrong))


def strict_credit(sheet: Sheet, scores_IO: Floats) -> Floats:
    """[I] 1 where a right response scores above every wrong one (Eq. 10 for one right response), else 0."""
    return np.asarray(verdicts(sheet, scores_IO) > 0, dtype=np.float64)
