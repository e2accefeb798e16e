"""Ways to make one decision of k judgements, and draws of k out of the K judgements that an evaluation made.

Nothing is generated twice: every smaller k, and every aggregator, is computed from the same samples. Axes: I items,
R draws, K samples, O options (see `spct_ray.evaluation.curves`).
"""

from __future__ import annotations

import numpy as np

from spct_ray.errors import ConfigError, DataError
from spct_ray.evaluation.curves import Bools, Floats, Ints, ScoreTable, meta_weight
from spct_ray.evaluation.sheet import Decision

PLAIN = ("sum", "mean", "median", "majority")
GUIDED = ("best_by_meta", "meta_top", "meta_weighted")  # need meta-RM logits
FILTERS = ("random", "shortest", "longest")  # what keeping k_meta of k is worth without a meta RM


def draw(table: ScoreTable, k: int, num_draws: int, seed: int) -> Bools:
    """[I, R, K] `num_draws` ways to take k of the K samples of each item; one way for k = K.

    Samples are taken as a run of k would have made them, in balanced rounds: n successive samples, which show each of n
    responses once in each place, stay together as far as k allows. The mean over draws estimates a fresh run's result
    without bias. Raises ConfigError for k > K.
    """
    num_samples = table.num_samples
    if not 1 <= k <= num_samples:
        raise ConfigError(f"a vote with k = {k} needs {k} samples an item, but {num_samples} were drawn")
    num_items = len(table.used_IK)
    if k == num_samples:
        return np.ones((num_items, 1, num_samples), dtype=bool)
    rng = np.random.default_rng(seed)
    round_IK = np.arange(num_samples)[None, :] // np.maximum(1, table.num_responses_I)[:, None]
    of_round_IRK = rng.random((num_items, num_draws, num_samples))
    priority_IRK = np.take_along_axis(of_round_IRK, np.broadcast_to(round_IK[:, None, :], of_round_IRK.shape), axis=-1)
    within_IRK = rng.random((num_items, num_draws, num_samples))
    place_IRK = np.lexsort((within_IRK, priority_IRK), axis=-1).argsort(axis=-1)
    return np.asarray(place_IRK < k)


def decide(name: str, table: ScoreTable, take_IRK: Bools, k_meta: int | Ints, seed: int = 0) -> list[Decision]:
    """One Decision a draw. Scores of items with n = 1 are means a judgement, so that they compare across items.

    `name` is one of PLAIN, GUIDED or FILTERS; `k_meta` may differ between items [I]. Raises DataError for GUIDED
    without meta-RM logits.
    """
    single_IK = (table.num_responses_I == 1)[:, None]
    forward_IK = (table.first_IK == 0) | single_IK
    ways = (take_IRK, take_IRK & forward_IK[:, None], take_IRK & (~forward_IK | single_IK)[:, None])
    scores = [_aggregate(name, table, way & table.used_IK[:, None], k_meta, seed) for way in ways]
    return [Decision(*(s[:, r] for s in scores)) for r in range(take_IRK.shape[1])]


def _aggregate(name: str, table: ScoreTable, take_IRK: Bools, k_meta: int | Ints, seed: int) -> Floats:
    """[I, R, O], NaN where nothing usable was taken."""
    weight_IRK = _weights(name, table, take_IRK, k_meta, seed)
    count_IR1 = weight_IRK.sum(axis=-1, keepdims=True)
    if name == "median":
        held = np.where(take_IRK[..., None], table.scores_IKO[:, None], np.nan)
        empty = ~take_IRK.any(axis=-1)
        held[empty] = 0  # the median of nothing would warn; made NaN below
        total = np.asarray(np.nanmedian(held, axis=2))
    else:
        total = weight_IRK @ (_ballots(table) if name == "majority" else table.scores_IKO)
        per_sample = (table.num_responses_I == 1)[:, None, None] | (name == "mean")
        total = np.where(per_sample, total / np.maximum(count_IR1, 1e-12), total)
    return np.where(take_IRK.any(axis=-1, keepdims=True), total, np.nan)


def _ballots(table: ScoreTable) -> Floats:
    """[I, K, O] one vote a sample, shared among its winners."""
    held = np.where(table.option_IO[:, None], table.scores_IKO, -np.inf)
    winner = held == held.max(axis=-1, keepdims=True)
    return np.asarray(winner / winner.sum(axis=-1, keepdims=True))


def _weights(name: str, table: ScoreTable, take_IRK: Bools, k_meta: int | Ints, seed: int) -> Floats:
    """[I, R, K] how much each taken sample counts."""
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
    """The `keep` taken samples of highest rank; equal ranks in order of the samples."""
    held = np.where(take_IRK, rank_IK[:, None], -np.inf)
    place = np.argsort(np.argsort(-held, axis=-1, kind="stable"), axis=-1)
    return np.asarray(take_IRK & (place < np.reshape(keep, (-1, 1, 1))), dtype=np.float64)
