"""What a judge's samples are worth: accuracy over the number of samples and over tokens, and rates of every failure.

Works on arrays, so that 600 items x 32 samples take a fraction of a second; a test holds it to `judge.vote.vote`.
Axes: I items, K samples, B blocks of k samples, O options of an item.

The options are what the vote chooses between. With n >= 2 they are the responses. With n = 1 there is nothing to
compare, so the options are "wrong" and "right": each sample gives "right" its score and "wrong" the middle of the
scale. The response is then held right when the mean of the used scores is above the middle (0.5 or 5.5), and the same
rule decides n = 1 and n >= 2.

Counting: a sample that could not be parsed is left out of the vote, never scored. An item without any usable sample is
undecided; it counts as wrong, and `undecided_rate` tells how often. A tie of m options counts as 1/m where the right
option is among them, which is what breaking ties at random gives on average.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spct_ray.errors import ConfigError, DataError
from spct_ray.evaluation.metrics import bootstrap_ci
from spct_ray.judge.vote import meta_weights
from spct_ray.records import Item, Trajectory

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """All samples of one judge on I items; unparsable samples have zeros in `scores_IKO` and False in `used_IK`."""

    scores_IKO: Floats
    option_IO: Bools  # False where the item has fewer options than the widest one
    used_IK: Bools
    tokens_IK: Floats
    truth_I: Ints  # index of the right option
    order_IK: Ints  # equal numbers within an item mean equal orders of its responses
    num_responses_I: Ints
    logits_IK: Floats | None  # meta-RM logits; None without meta RM
    first_IK: Ints  # index of the response that was shown first
    prompt_tokens_IK: Floats

    @property
    def num_samples(self) -> int:
        """K, the number of samples an item."""
        return int(self.used_IK.shape[1])


@dataclass(frozen=True, slots=True)
class Votes:
    """Outcome of voting with k samples: expected accuracy, tie and no-decision shares [I], and mean tokens spent."""

    accuracy_I: Floats
    tied_I: Floats
    undecided_I: Floats
    tokens: float

    def summary(self, seed: int, resamples: int) -> dict[str, Any]:
        """The entry of one vote in summary.json."""
        return {
            "accuracy": float(self.accuracy_I.mean()),
            "ci": list(bootstrap_ci(self.accuracy_I, seed, resamples)),
            "tie_rate": float(self.tied_I.mean()),
            "undecided_rate": float(self.undecided_I.mean()),
            "tokens": self.tokens,
        }


def options_of(scores: Sequence[float], middle: float) -> tuple[float, ...]:
    """What one judgement, or the mean of several, gives to each option of its item (see the top of the file); `middle`
    is used for n = 1."""
    return tuple(float(s) for s in scores) if len(scores) > 1 else (middle, float(scores[0]))


def right_option(item: Item) -> int:
    """Index of the right option of an item."""
    return item.best if len(item.responses) > 1 else int(item.rewards[0] > 0.5)


def chance(items: Sequence[Item]) -> Floats:
    """Accuracy of a blind guess on each item [I]: 1/n, and 1/2 for n = 1."""
    return np.array([1 / max(2, len(item.responses)) for item in items])


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
        found = ", ".join(f"{num} items with {k} samples" for k, num in sorted(counts.items()))
        raise DataError(f"every item needs the same number (>= 1) of samples, found {found or 'no items'}")
    num_samples = next(iter(counts))
    num_options = max(max(2, len(item.responses)) for item in items)
    scores_IKO = np.zeros((len(items), num_samples, num_options))
    option_IO = np.zeros((len(items), num_options), dtype=bool)
    used_IK = np.zeros((len(items), num_samples), dtype=bool)
    tokens_IK, logits_IK = np.zeros(used_IK.shape), np.full(used_IK.shape, -np.inf)
    order_IK, first_IK = np.zeros(used_IK.shape, dtype=np.int64), np.zeros(used_IK.shape, dtype=np.int64)
    prompt_tokens_IK = np.zeros(used_IK.shape)
    order_numbers: dict[tuple[int, ...], int] = {}
    for i, item in enumerate(items):
        option_IO[i, : max(2, len(item.responses))] = True
        for k, (_, t) in enumerate(sorted(samples[item.id].items())):
            tokens_IK[i, k], prompt_tokens_IK[i, k], first_IK[i, k] = t.completion_tokens, t.prompt_tokens, t.order[0]
            order_IK[i, k] = order_numbers.setdefault(t.order, len(order_numbers))
            if t.failure:
                continue
            used_IK[i, k] = True
            given = options_of(t.scores, middle)
            scores_IKO[i, k, : len(given)] = given
            if logits is not None:
                logits_IK[i, k] = logits.get(t.key, np.nan)
                if not np.isfinite(logits_IK[i, k]):
                    raise DataError(f"judge {t.model!r}: sample {t.key} has no finite meta-RM logit; rerun meta_scores")
    return ScoreTable(
        scores_IKO,
        option_IO,
        used_IK,
        tokens_IK,
        np.array([right_option(item) for item in items]),
        order_IK,
        np.array([len(item.responses) for item in items]),
        None if logits is None else logits_IK,
        first_IK,
        prompt_tokens_IK,
    )


def in_all_orders(greedy: Sequence[Trajectory]) -> list[Trajectory]:
    """Greedy judgements, as many of each item: a single response has one order, and its judgement stands for all."""
    by_item: dict[str, list[Trajectory]] = {}
    for t in greedy:
        by_item.setdefault(t.item_id, []).append(t)
    num = max(map(len, by_item.values()), default=0)
    return [
        replace(t, sample=j) if len(found) < num else t
        for found in by_item.values()
        for t in found
        for j in range(num if len(found) < num else 1)
    ]


def tabulate_scores(items: Sequence[Item], scores: Mapping[str, Sequence[float]]) -> ScoreTable:
    """The table of a scalar reward model: one sample an item, the score of each response; for n = 1 "wrong" has 0.

    Raises DataError for items without scores.
    """
    if missing := [item.id for item in items if item.id not in scores]:
        raise DataError(f"no scores of {len(missing)} items, the first is {missing[0]!r}")
    num_options = max(max(2, len(item.responses)) for item in items)
    scores_IKO, option_IO = np.zeros((len(items), 1, num_options)), np.zeros((len(items), num_options), dtype=bool)
    for i, item in enumerate(items):
        given = scores[item.id] if len(item.responses) > 1 else (0.0, *scores[item.id])
        scores_IKO[i, 0, : len(given)] = given
        option_IO[i, : len(given)] = True
    none_IK, truth_I = np.zeros((len(items), 1), dtype=np.int64), np.array([right_option(item) for item in items])
    return ScoreTable(
        scores_IKO, option_IO, none_IK == 0, none_IK.astype(np.float64), truth_I, none_IK,
        np.array([len(item.responses) for item in items]), None, none_IK, none_IK.astype(np.float64),
    )  # fmt: skip


def _winners(scores: Floats, option_IO: Bools) -> Bools:
    """True at the options with the highest score; scores [I, anything, O]."""
    held = np.where(option_IO[:, None, :], scores, -np.inf)
    return np.asarray(held == held.max(axis=-1, keepdims=True))


def vote_curve_point(table: ScoreTable, k: int, k_meta: int | None = None, weighted: bool = False) -> Votes:
    """Vote with k of the K samples (Eq. 14); with `k_meta`, sum only the k_meta usable ones of best meta-RM logit;
    `weighted`, sum all of them, each times `meta_weight`.

    For k < K each item is voted on by every full block of k successive samples, and the outcomes are averaged. Blocks
    share no sample and keep the balanced orders of a real run of k samples. k = 1 is thus the mean over all samples.
    """
    num_samples = table.num_samples
    if not 1 <= k <= num_samples:
        raise ConfigError(f"vote with k = {k} needs at least {k} samples an item, evaluation drew {num_samples}")
    place = np.arange(num_samples)
    block_BK = place[None, :] // k == place[: num_samples // k, None]
    take_IBK = block_BK[None] & table.used_IK[:, None, :]
    if k_meta is not None:
        if table.logits_IK is None:
            raise DataError("a meta vote needs meta-RM logits; add the meta_scores step")
        logits_IBK = np.where(take_IBK, table.logits_IK[:, None, :], -np.inf)
        best_IBK = np.argsort(np.argsort(-logits_IBK, axis=-1, kind="stable"), axis=-1) < k_meta
        take_IBK &= best_IBK
    weight_IBK = take_IBK.astype(np.float64)
    if weighted:
        weight_IBK *= meta_weight(table)[:, None]
    winners_IBO = _winners((weight_IBK @ table.scores_IKO).round(9), table.option_IO)  # equal sums stay equal
    decided_IB, num_winners_IB = take_IBK.any(axis=-1), winners_IBO.sum(axis=-1)
    hit_IB = np.take_along_axis(winners_IBO, table.truth_I[:, None, None], axis=-1)[..., 0]
    right_IB = decided_IB * hit_IB / num_winners_IB
    tied_IB = decided_IB & (num_winners_IB > 1)
    tokens = float(table.tokens_IK.mean() * k)
    return Votes(right_IB.mean(axis=1), tied_IB.mean(axis=1), (~decided_IB).mean(axis=1), tokens)


def meta_weight(table: ScoreTable) -> Floats:
    """[I, K] `judge.vote.meta_weights` of each usable sample, 0 for the others. Raises DataError without meta RM."""
    if table.logits_IK is None:
        raise DataError("a meta vote needs meta-RM logits; add the meta_scores step")
    return meta_weights(np.where(table.used_IK, table.logits_IK, -np.inf))


def correct_samples(table: ScoreTable) -> Bools:
    """[I, K] True where a sample is right by Eq. 10 (strict: a tie is wrong, and so is an unparsable sample)."""
    truth_first = np.take_along_axis(
        _winners(table.scores_IKO, table.option_IO), table.truth_I[:, None, None], axis=-1
    )[..., 0]
    return np.asarray(table.used_IK & truth_first & ~tied_samples(table))


def tied_samples(table: ScoreTable) -> Bools:
    """[I, K] True where a parsed sample gives its highest score to more than one option."""
    return np.asarray(table.used_IK & (_winners(table.scores_IKO, table.option_IO).sum(axis=-1) > 1))


def tie_rate(table: ScoreTable) -> float | None:
    """Share of the parsed samples of items with n >= 2 whose highest score is shared; None without such samples."""
    counted_IK = table.used_IK & (table.num_responses_I > 1)[:, None]
    return float(tied_samples(table)[counted_IK].mean()) if counted_IK.any() else None


def position_consistency(table: ScoreTable) -> float | None:
    """Over all pairs of parsed samples of one item that saw different orders: the share with the same set of winners.

    None when there is no such pair (n = 1 only, one sample only, or nothing parsed).
    """
    winners_IKO = _winners(table.scores_IKO, table.option_IO)
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
