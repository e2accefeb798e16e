"""Estimates votes: draws k of the K judgements, and aggregates them to one decision.

Every smaller k and every aggregator is computed from the same samples. Axes: I items, R draws, K samples, O options
(see `spct_ray.evaluation.judgements`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from spct_ray.errors import ConfigError, DataError
from spct_ray.evaluation.judgements import (
    Bools,
    Decision,
    Floats,
    Ints,
    ScoreTable,
    Sheet,
    best_credit,
    winners,
)
from spct_ray.evaluation.statistics import paired_difference
from spct_ray.judge.vote import meta_weights

PLAIN = ("sum", "mean", "median", "majority")
GUIDED = ("best_by_meta", "meta_top", "meta_weighted")  # need meta-RM logits
FILTERS = ("random", "shortest", "longest")  # baselines that keep k_meta of k samples without a meta RM


ORDER_DRAWS = 200


def draw(table: ScoreTable, k: int, num_draws: int, seed: int) -> Bools:
    """[I, R, K] ways to draw k of the K samples of each item: all K ways for k = 1 (the exact mean over samples), the
    one way for k = K, `num_draws` random ones in between.

    Draws are balanced as a run of k samples would be: a round of n successive samples, which shows each of n responses
    once at each position, stays together as far as k allows. An incomplete last round is drawn only after all complete
    ones, because it is no random part of a round. Raises ConfigError for k > K.
    """
    num_samples = table.num_samples
    if not 1 <= k <= num_samples:
        raise ConfigError(f"a vote with k = {k} needs at least {k} samples per item, but {num_samples} were drawn")
    num_items = len(table.used_IK)
    if k == num_samples:
        return np.ones((num_items, 1, num_samples), dtype=bool)
    if k == 1:
        return np.broadcast_to(np.eye(num_samples, dtype=bool), (num_items, num_samples, num_samples))
    rng = np.random.default_rng(seed)
    size_I1 = np.maximum(1, table.num_responses_I)[:, None]
    place_1K = np.arange(num_samples)[None, :]
    round_IK, short_IK = place_1K // size_I1, place_1K >= num_samples // size_I1 * size_I1
    of_round_IRK = rng.random((num_items, num_draws, num_samples))
    priority_IRK = np.take_along_axis(of_round_IRK, np.broadcast_to(round_IK[:, None, :], of_round_IRK.shape), axis=-1)
    priority_IRK = np.where(short_IK[:, None, :], 2.0, priority_IRK)
    within_IRK = rng.random((num_items, num_draws, num_samples))
    place_IRK = np.lexsort((within_IRK, priority_IRK), axis=-1).argsort(axis=-1)
    return np.asarray(place_IRK < k)


def meta_weight(table: ScoreTable) -> Floats:
    """[I, K] `judge.vote.meta_weights` of each usable sample, 0 for the others. Raises DataError without meta RM."""
    if table.logits_IK is None:
        raise DataError("a meta vote needs meta-RM logits; add the meta_scores step")
    return meta_weights(np.where(table.used_IK, table.logits_IK, -np.inf))


def decide(name: str, table: ScoreTable, take_IRK: Bools, k_meta: int | Ints, seed: int = 0) -> list[Decision]:
    """One Decision per draw. Scores of items with n = 1 are means, so that they are comparable across items.

    `name` is one of PLAIN, GUIDED or FILTERS; `k_meta` may differ between items [I]. Raises DataError for GUIDED
    without meta-RM logits.
    """
    single_IK = (table.num_responses_I == 1)[:, None]
    forward_IK = (table.first_IK == 0) | single_IK
    ways = (take_IRK, take_IRK & forward_IK[:, None], take_IRK & (~forward_IK | single_IK)[:, None])
    scores = [_aggregate(name, table, way & table.used_IK[:, None], k_meta, seed) for way in ways]
    return [Decision(*(s[:, r] for s in scores)) for r in range(take_IRK.shape[1])]


def _aggregate(name: str, table: ScoreTable, take_IRK: Bools, k_meta: int | Ints, seed: int) -> Floats:
    """[I, R, O], NaN where no usable sample was drawn."""
    weight_IRK = _weights(name, table, take_IRK, k_meta, seed)
    count_IR1 = weight_IRK.sum(axis=-1, keepdims=True)
    if name == "median":
        held = np.where(take_IRK[..., None], table.scores_IKO[:, None], np.nan)
        empty = ~take_IRK.any(axis=-1)
        held[empty] = 0  # the median of nothing would warn; NaN below
        total = np.asarray(np.nanmedian(held, axis=2))
    else:
        total = weight_IRK @ (_ballots(table) if name == "majority" else table.scores_IKO)
        per_sample = (table.num_responses_I == 1)[:, None, None] | (name == "mean")
        total = np.where(per_sample, total / np.maximum(count_IR1, 1e-12), total)
    total = total.round(9)  # equal sums stay equal
    return np.where(take_IRK.any(axis=-1, keepdims=True), total, np.nan)


def _ballots(table: ScoreTable) -> Floats:
    """[I, K, O] one vote per sample, shared among its winners."""
    winner = winners(table.option_IO, table.scores_IKO)
    return np.asarray(winner / winner.sum(axis=-1, keepdims=True))


def _weights(name: str, table: ScoreTable, take_IRK: Bools, k_meta: int | Ints, seed: int) -> Floats:
    """[I, R, K] the weight of each drawn sample."""
    if name in PLAIN:
        return take_IRK.astype(np.float64)
    if name in FILTERS:
        noise_IK = np.random.default_rng(seed).random(table.used_IK.shape)
        rank_IK = {"random": noise_IK, "shortest": -table.tokens_IK, "longest": table.tokens_IK}[name]
        return _top(rank_IK, take_IRK, k_meta)
    if table.logits_IK is None:
        raise DataError(f"the aggregator {name!r} needs meta-RM logits")
    if name == "meta_weighted":
        return np.asarray(take_IRK * meta_weight(table)[:, None])
    return _top(table.logits_IK, take_IRK, 1 if name == "best_by_meta" else k_meta)


def _top(rank_IK: Floats, take_IRK: Bools, keep: int | Ints) -> Floats:
    """The `keep` drawn samples of highest rank; equal ranks in order of the samples."""
    held = np.where(take_IRK, rank_IK[:, None], -np.inf)
    place = np.argsort(np.argsort(-held, axis=-1, kind="stable"), axis=-1)
    return np.asarray(take_IRK & (place < np.reshape(keep, (-1, 1, 1))), dtype=np.float64)


def draw_independent(table: ScoreTable, k: int, num_draws: int, seed: int) -> Bools:
    """[I, R, K] `num_draws` ways to draw k of the K samples of each pair, each in a random order of the pair.

    Needs k samples of each order, so k <= K / 2.
    """
    rng = np.random.default_rng(seed)
    num_items, num_samples = table.used_IK.shape
    as_it_is_IR1 = rng.binomial(k, 0.5, size=(num_items, num_draws, 1))
    noise_IRK = rng.random((num_items, num_draws, num_samples))
    taken_IRK = np.zeros(noise_IRK.shape, dtype=bool)
    for of_order_IK, count_IR1 in ((table.first_IK == 0, as_it_is_IR1), (table.first_IK != 0, k - as_it_is_IR1)):
        held = np.where(of_order_IK[:, None], noise_IRK, np.inf)
        place = np.argsort(np.argsort(held, axis=-1), axis=-1)
        taken_IRK |= of_order_IK[:, None] & (place < count_IR1)
    return taken_IRK


def compare_orders(table: ScoreTable, sheet: Sheet, k: int, seed: int) -> dict[str, Any] | None:
    """Compares votes of k on pairs with balanced and with independent orders: accuracy, variance of an item's outcome
    over draws, and their differences with 95 % intervals over items. Balanced votes see either response first equally
    often; independent ones shuffle before every sample (paper, Section 3.3).

    None without pairs that have k samples of each order.
    """
    enough_I = np.minimum((table.first_IK == 0).sum(axis=-1), (table.first_IK != 0).sum(axis=-1)) >= k
    inside_I = (table.num_responses_I == 2) & enough_I
    if not inside_I.any() or k < 2:
        return None
    right, noise = {}, {}
    for name, drawn in (("balanced", draw), ("independent", draw_independent)):
        decisions = decide("sum", table, drawn(table, k, ORDER_DRAWS, seed), k_meta=1)
        credit_RI = np.array([best_credit(sheet, decision.scores_IO) for decision in decisions])[:, inside_I]
        right[name], noise[name] = credit_RI.mean(axis=0), credit_RI.var(axis=0, ddof=1)
    differences = {
        what: dataclasses.asdict(paired_difference(by["balanced"], by["independent"], seed))
        for what, by in (("accuracy", right), ("variance", noise))
    }
    return {
        "num_items": int(inside_I.sum()),
        **{name: {"accuracy": float(right[name].mean()), "variance": float(noise[name].mean())} for name in right},
        "difference": differences,
    }
