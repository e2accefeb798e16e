"""The data of an evaluation as arrays: one judge's judgements, the facts of their items, and the credit of a decision.

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


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """All samples of one judge on I items; unparsable samples have zeros in `scores_IKO` and False in `used_IK`."""

    scores_IKO: Floats
    option_IO: Bools  # False beyond the item's own number of options
    used_IK: Bools
    tokens_IK: Floats
    truth_I: Ints  # index of the right option
    order_IK: Ints  # equal for equal orders of an item's responses
    num_responses_I: Ints
    logits_IK: Floats | None  # meta-RM logits; None without meta RM
    first_IK: Ints  # index of the response that was shown first

    @property
    def num_samples(self) -> int:
        """K, the number of samples per item."""
        return int(self.used_IK.shape[1])


def options_of(scores: Sequence[float], middle: float) -> tuple[float, ...]:
    """The score of each option by one judgement, or by the mean of several; for n = 1 "wrong" scores `middle`."""
    return tuple(float(s) for s in scores) if len(scores) > 1 else (middle, float(scores[0]))


def right_option(item: Item) -> int:
    """Index of the right option of an item."""
    return item.best if len(item.responses) > 1 else int(item.rewards[0] > 0.5)


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
    table = _blank(items, next(iter(counts)), logits is not None)
    order_numbers: dict[tuple[int, ...], int] = {}
    for i, item in enumerate(items):
        for k, (_, t) in enumerate(sorted(samples[item.id].items())):
            table.tokens_IK[i, k], table.first_IK[i, k] = t.completion_tokens, t.order[0]
            table.order_IK[i, k] = order_numbers.setdefault(t.order, len(order_numbers))
            if t.failure:
                continue
            table.used_IK[i, k] = True
            given = options_of(t.scores, middle)
            table.scores_IKO[i, k, : len(given)] = given
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
    table = _blank(items, 1)
    table.used_IK[:] = True
    for i, item in enumerate(items):
        given = options_of(scores[item.id], 0.0)
        table.scores_IKO[i, 0, : len(given)] = given
    return table


def _blank(items: Sequence[Item], num_samples: int, with_logits: bool = False) -> ScoreTable:
    """The table of items none of whose samples could be parsed, to be filled in."""
    shape, num_responses_I = (len(items), num_samples), np.array([len(item.responses) for item in items])
    num_options_I = np.maximum(2, num_responses_I)
    return ScoreTable(
        scores_IKO=np.zeros((*shape, num_options_I.max())),
        option_IO=np.arange(num_options_I.max()) < num_options_I[:, None],
        used_IK=np.zeros(shape, dtype=bool),
        tokens_IK=np.zeros(shape),
        truth_I=np.array([right_option(item) for item in items]),
        order_IK=np.zeros(shape, dtype=np.int64),
        num_responses_I=num_responses_I,
        logits_IK=np.full(shape, -np.inf) if with_logits else None,
        first_IK=np.zeros(shape, dtype=np.int64),
    )


def in_all_orders(greedy: Sequence[Trajectory]) -> list[Trajectory]:
    """Greedy judgements, equally many per item: a single response has one order, whose judgement stands for all."""
    by_item: dict[str, list[Trajectory]] = {}
    for t in greedy:
        by_item.setdefault(t.item_id, []).append(t)
    num = max(map(len, by_item.values()), default=0)
    return [
        replace(t, sample=j) if len(of_item) < num else t
        for of_item in by_item.values()
        for t in of_item
        for j in range(num if len(of_item) < num else 1)
    ]


def winners(option_IO: Bools, scores: Floats) -> Bools:
    """Which options have the highest score, none in a row of NaN; scores [I, O] or [I, anything, O]."""
    option = option_IO if scores.ndim == 2 else option_IO[:, None, :]
    held = np.where(option, scores, -np.inf)
    return np.asarray(held == held.max(axis=-1, keepdims=True))


def correct_samples(table: ScoreTable) -> Bools:
    """[I, K] whether a sample is right by Eq. 10 (strict: ties and unparsable samples are wrong)."""
    truth_first = np.take_along_axis(winners(table.option_IO, table.scores_IKO), table.truth_I[:, None, None], axis=-1)[
        ..., 0
    ]
    return np.asarray(table.used_IK & truth_first & ~tied_samples(table))


def tied_samples(table: ScoreTable) -> Bools:
    """[I, K] whether a parsed sample gives its highest score to several options."""
    return np.asarray(table.used_IK & (winners(table.option_IO, table.scores_IKO).sum(axis=-1) > 1))


def tie_rate(table: ScoreTable) -> float | None:
    """Share of the parsed samples of items with n >= 2 whose highest score is shared; None without such samples."""
    counted_IK = table.used_IK & (table.num_responses_I > 1)[:, None]
    return float(tied_samples(table)[counted_IK].mean()) if counted_IK.any() else None


def position_consistency(table: ScoreTable) -> float | None:
    """The share of pairs of parsed samples of one item in different orders that have the same set of winners.

    None without such pairs (only n = 1, one sample, or nothing parsed).
    """
    winners_IKO = winners(table.option_IO, table.scores_IKO)
    set_IK = winners_IKO @ (1 << np.arange(winners_IKO.shape[-1]))
    pair_IKK = table.used_IK[:, :, None] & table.used_IK[:, None, :]
    pair_IKK &= table.order_IK[:, :, None] != table.order_IK[:, None, :]
    same_IKK = set_IK[:, :, None] == set_IK[:, None, :]
    return float(same_IKK[pair_IKK].mean()) if pair_IKK.any() else None


def rates(table: ScoreTable) -> dict[str, Any]:
    """The rates of one judge over all its samples, by their names in summary.json."""
    return {
        "parse_rate": float(table.used_IK.mean()),
        "tie_rate": tie_rate(table),
        "correct_rate": float(correct_samples(table).mean()),
        "position_consistency": position_consistency(table),
        "tokens_per_judgement": float(table.tokens_IK.mean()),
    }


@dataclass(frozen=True, slots=True)
class Sheet:
    """The facts of a benchmark's items, known before any judgement."""

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
        """Rows of the benchmark with at least one item."""
        return int(self.question_I.max()) + 1


@dataclass(frozen=True, slots=True)
class Decision:
    """The result of one way to decide: a score per option [I, O], rows of NaN where no judgement could be used.

    `forward_IO` and `backward_IO` are the same from the judgements that saw a pair as it is and in reverse.
    """

    scores_IO: Floats
    forward_IO: Floats
    backward_IO: Floats


def decided(scores_IO: Floats) -> Bools:
    """[I] whether any judgement of the item could be used."""
    return np.asarray(~np.isnan(scores_IO).any(axis=-1))


def best_credit(sheet: Sheet, scores_IO: Floats) -> Floats:
    """[I] probability that a right response is chosen when ties are broken at random."""
    winner_IO = winners(sheet.option_IO, scores_IO)
    return np.asarray((winner_IO & sheet.right_IO).sum(axis=-1) / np.maximum(1, winner_IO.sum(axis=-1)))


def verdicts(sheet: Sheet, scores_IO: Floats) -> Floats:
    """[I] 1 where a right response scores above every wrong one, -1 where a wrong one does, 0 if tied or undecided."""
    right = np.where(sheet.right_IO, scores_IO, -np.inf).max(axis=-1)
    wrong = np.where(sheet.option_IO & ~sheet.right_IO, scores_IO, -np.inf).max(axis=-1)
    return np.asarray((right > wrong).astype(float) - (right < wrong))


def strict_credit(sheet: Sheet, scores_IO: Floats) -> Floats:
    """[I] 1 where a right response scores above every wrong one (Eq. 10 for one right response), else 0."""
    return np.asarray(verdicts(sheet, scores_IO) > 0, dtype=np.float64)
