"""Estimates votes: draws k of the K judgements, and aggregates them to one decision.

Every smaller k and every aggregator is computed from the same samples. Axes: I items, R draws, K samples, O options
(see `spct_ray.evaluation.judgements`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from spct_ray.errors import ConfigError, DataError
from spct_ray.evaluation.judgements import Bools, Decision, Floats, Ints, ScoreTable, best_credit
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
    num_items, num_samples = table.used_IK.shape
    if not 1 <= k <= num_samples:
        raise ConfigError(f"a vote with k = {k} needs at least {k} samples per item, but {num_samples} were drawn")
    if k == num_samples:
        return np.ones((num_items, 1, num_samples), dtype=bool)
    if k == 1:
        return np.broadcast_to(np.eye(num_samples, dtype=bool), (num_items, num_samples, num_samples))
    rng, shape = np.random.default_rng(seed), (num_items, num_draws, num_samples)
    size_I1 = table.sheet.num_responses_I[:, None]
    place_1K = np.arange(num_samples)[None, :]
    round_IK, short_IK = place_1K // size_I1, place_1K >= num_samples // size_I1 * size_I1
    priority_IRK = np.take_along_axis(rng.random(shape), np.broadcast_to(round_IK[:, None, :], shape), axis=-1)
    priority_IRK = np.where(short_IK[:, None, :], 2.0, priority_IRK)
    place_IRK = np.lexsort((rng.random(shape), priority_IRK), axis=-1).argsort(axis=-1)
    return np.asarray(place_IRK < k)


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
        taken_IRK |= _lowest(np.where(of_order_IK[:, None], noise_IRK, np.inf), count_IR1) & of_order_IK[:, None]
    return taken_IRK


def decide(name: str, table: ScoreTable, take_IRK: Bools, k_meta: int | Ints, seed: int = 0) -> list[Decision]:
    """One Decision per draw. Scores of items with n = 1 are means, so that they are comparable across items.

    `name` is one of PLAIN, GUIDED or FILTERS; `k_meta` may differ between items [I]. Raises DataError for GUIDED
    without meta-RM logits.
    """
    single_IK = table.sheet.single_I[:, None]
    forward_IK = (table.first_IK == 0) | single_IK
    ways = (take_IRK, take_IRK & forward_IK[:, None], take_IRK & (~forward_IK | single_IK)[:, None])
    scores = [_aggregate(name, table, way & table.used_IK[:, None], k_meta, seed) for way in ways]
    return [Decision(*(s[:, r] for s in scores)) for r in range(take_IRK.shape[1])]


def _aggregate(name: str, table: ScoreTable, take_IRK: Bools, k_meta: int | Ints, seed: int) -> Floats:
    """[I, R, O], NaN where no usable sample was drawn."""
    if name == "median":
        held = np.where(take_IRK[..., None], table.scores_IKO[:, None], np.nan)
        held[~take_IRK.any(axis=-1)] = 0  # the median of nothing would warn; NaN below
        total = np.asarray(np.nanmedian(held, axis=2))
    else:
        weight_IRK, ballot_IKO = _weights(name, table, take_IRK, k_meta, seed), table.scores_IKO
        if name == "majority":  # one vote per sample, shared among its winners
            ballot_IKO = table.winners_IKO / table.winners_IKO.sum(axis=-1, keepdims=True)
        total = weight_IRK @ ballot_IKO
        per_sample = table.sheet.single_I[:, None, None] | (name == "mean")
        total = np.where(per_sample, total / np.maximum(weight_IRK.sum(axis=-1, keepdims=True), 1e-12), total)
    total = total.round(9)  # equal sums stay equal
    return np.where(take_IRK.any(axis=-1, keepdims=True), total, np.nan)


def _weights(name: str, table: ScoreTable, take_IRK: Bools, k_meta: int | Ints, seed: int) -> Floats:
    """[I, R, K] the weight of each drawn sample."""
    if name in PLAIN:
        return take_IRK.astype(np.float64)
    if name in FILTERS:
        noise_IK = np.random.default_rng(seed).random(table.used_IK.shape)
        rank_IK = {"random": noise_IK, "shortest": -table.tokens_IK, "longest": table.tokens_IK}[name]
    elif table.logits_IK is None:
        raise DataError(f"the aggregator {name!r} needs meta-RM logits; add the meta_scores step")
    else:
        rank_IK = table.logits_IK
    if name == "meta_weighted":
        return np.asarray(take_IRK * meta_weights(np.where(table.used_IK, rank_IK, -np.inf))[:, None])
    keep = 1 if name == "best_by_meta" else k_meta
    kept_IRK = _lowest(np.where(take_IRK, -rank_IK[:, None], np.inf), np.reshape(keep, (-1, 1, 1)))
    return np.asarray(take_IRK & kept_IRK, dtype=np.float64)


def _lowest(values: Floats, num: Ints) -> Bools:
    """Which `num` values are the lowest along the last axis; equal values in their order."""
    place = np.argsort(np.argsort(values, axis=-1, kind="stable"), axis=-1)
    return np.asarray(place < num)


def compare_orders(table: ScoreTable, k: int, seed: int) -> dict[str, Any] | None:
    """Compares votes of k on pairs with balanced and with independent orders: accuracy, variance of an item's outcome
    over draws, and their differences with 95 % intervals over items. Balanced votes see either response first equally
    often; independent ones shuffle before every sample (paper, Section 3.3).

    None without pairs that have k samples of each order.
    """
    enough_I = np.minimum((table.first_IK == 0).sum(axis=-1), (table.first_IK != 0).sum(axis=-1)) >= k
    inside_I = (table.sheet.num_responses_I == 2) & enough_I
    if not inside_I.any() or k < 2:
        return None
    right, noise = {}, {}
    for name, drawn in (("balanced", draw), ("independent", draw_independent)):
        decisions = decide("sum", table, drawn(table, k, ORDER_DRAWS, seed), k_meta=1)
        credit_RI = np.array([best_credit(table.sheet, decision.scores_IO) for decision in decisions])[:, inside_I]
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
