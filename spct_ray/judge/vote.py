"""Voting: sums over sampled judgements, guided by the meta RM where there is one (Eq. 14 and Section 4.2)."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

from spct_ray.judge.parse import Scale
from spct_ray.records import Trajectory, Verdict


def vote(
    item_id: str,
    num_responses: int,
    trajectories: Sequence[Trajectory],
    logits: Sequence[float] = (),
    k_meta: int | None = None,
) -> Verdict:
    """Sum the scores of K judgements (Eq. 14), or of the `k_meta` best of them by meta-RM logit.

    Unparsable samples are left out and counted by name, never scored. `logits` has one value a trajectory (NaN where
    the sample is unparsable) or is empty for plain voting; `k_meta` defaults to K // 2, at least 1.
    """
    if logits and len(logits) != len(trajectories):
        raise ValueError(f"{item_id}: {len(logits)} meta logits for {len(trajectories)} samples")
    usable = [k for k, t in enumerate(trajectories) if not t.failure]
    if logits:
        if bad := [k for k in usable if math.isnan(logits[k])]:
            raise ValueError(f"{item_id}: the meta logits of the parsed samples {bad} are NaN")
        keep = max(1, len(trajectories) // 2) if k_meta is None else k_meta
        usable = sorted(sorted(usable, key=lambda k: -logits[k])[:keep])
    sums = tuple(sum(trajectories[k].scores[i] for k in usable) for i in range(num_responses)) if usable else ()
    failures = Counter(t.failure for t in trajectories if t.failure)
    return Verdict(item_id, sums, tuple(usable), len(trajectories), dict(failures), tuple(logits))


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


def confidence(scores_KN: Sequence[Sequence[int]], winner: int, seed: int, num_resamples: int = 1000) -> float:
    """Share of bootstrap resamples of K samples in which `winner` has the highest sum, a tie counting as its share.

    It says how far the vote hangs on which samples were drawn, not how often the judge is right.
    """
    scores = np.asarray(scores_KN)
    num_samples = len(scores)
    counts = np.random.default_rng(seed).multinomial(num_samples, [1 / num_samples] * num_samples, size=num_resamples)
    sums = counts @ scores
    is_top = sums == sums.max(axis=1, keepdims=True)
    return float((is_top[:, winner] / is_top.sum(axis=1)).mean())
