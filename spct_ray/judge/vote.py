"""Voting: sums over sampled judgements, guided by the meta RM where there is one (Eq. 14 and Section 4.2)."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spct_ray.judge.parse import Scale
from spct_ray.records import Trajectory, Verdict

MetaVote = Literal["best", "weighted"]

NUM_RESAMPLES = 1000
_LEAST_LOGIT = -700.0  # below, exp(logit) is 0, and so would be the weight


def meta_weights(logits: ArrayLike) -> NDArray[np.float64]:
    """-log(1 - p) of each meta-RM logit, p being the chance to be right: a sample's weight in a weighted vote.

    The sum over the judgements for one response is -log of the chance that all of them are wrong. The weight is close
    to the log-odds where p is large, and never negative.
    """
    return np.asarray(np.logaddexp(0.0, logits), dtype=np.float64)


def vote(
    item_id: str,
    num_responses: int,
    trajectories: Sequence[Trajectory],
    logits: Sequence[float] = (),
    k_meta: int | None = None,
    meta_vote: MetaVote = "best",
) -> Verdict:
    """Sum the scores of K judgements (Eq. 14), guided by the meta RM where there are `logits`.

    Unparsable samples are excluded and counted by name, never scored. `logits` has one value per trajectory (NaN where
    the sample is unparsable) or is empty for plain voting. The meta vote "best" sums the `k_meta` samples with the
    highest logits (default: K // 2, at least 1). "weighted" sums all of them, each times `meta_weights`, scaled to 1 on
    average, which changes no winner.
    """
    if logits and len(logits) != len(trajectories):
        raise ValueError(f"{item_id}: {len(logits)} meta logits for {len(trajectories)} samples")
    usable = [k for k, t in enumerate(trajectories) if not t.failure]
    weights: tuple[float, ...] = ()
    if logits:
        if bad := [k for k in usable if math.isnan(logits[k])]:
            raise ValueError(f"{item_id}: the meta logits of the parsed samples {bad} are NaN")
        if meta_vote == "weighted":
            weight_K = meta_weights(np.maximum([logits[k] for k in usable], _LEAST_LOGIT))
            weights = tuple((weight_K * (len(usable) / weight_K.sum())).tolist()) if usable else ()
        else:
            keep = max(1, len(trajectories) // 2) if k_meta is None else k_meta
            usable = sorted(sorted(usable, key=lambda k: -logits[k])[:keep])
    scores_KN = [trajectories[k].scores for k in usable]
    sums: tuple[float, ...] = ()
    if weights:
        sums = tuple((np.array(weights) @ np.array(scores_KN)).round(9).tolist())  # rounded, so that equal sums tie
    elif usable:
        sums = tuple(sum(scores[i] for scores in scores_KN) for i in range(num_responses))
    failures = Counter(t.failure for t in trajectories if t.failure)
    return Verdict(item_id, sums, tuple(usable), len(trajectories), dict(failures), tuple(logits), weights)


def decide(verdict: Verdict, seed: int) -> int | None:
    """Index of the winner of an item with n >= 2, ties broken at random with `seed`; None without a usable sample."""
    return random.Random(seed).choice(verdict.winners) if verdict.scores else None


def decide_single(verdict: Verdict, scale: Scale, seed: int) -> int | None:
    """1 (right) or 0 (wrong) for an item with n = 1: whether its mean score lies above the middle of the scale.

    The middle itself is broken at random with `seed`; None without a usable sample.
    """
    if not verdict.scores:
        return None
    twice = 2 * verdict.scores[0] - (scale.low + scale.high) * len(verdict.used)
    return int(twice > 0) if twice else random.Random(seed).randrange(2)


def confidence(scores_KN: Sequence[Sequence[int]], winner: int, seed: int, weights_K: Sequence[float] = ()) -> float:
    """Share of NUM_RESAMPLES bootstrap resamples of the K samples in which `winner` has the highest (weighted) sum;
    a tie of m counts 1/m.

    It measures how much the vote depends on which samples were drawn, not how often the judge is right.
    """
    scores = np.asarray(scores_KN) * np.asarray(weights_K)[:, None] if weights_K else np.asarray(scores_KN)
    num_samples = len(scores)
    count_RK = np.random.default_rng(seed).multinomial(num_samples, [1 / num_samples] * num_samples, size=NUM_RESAMPLES)
    sum_RN = (count_RK @ scores).round(9)
    is_top_RN = sum_RN == sum_RN.max(axis=1, keepdims=True)
    return float((is_top_RN[:, winner] / is_top_RN.sum(axis=1)).mean())
