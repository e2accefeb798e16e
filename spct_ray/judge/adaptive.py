"""Adaptive k: stop sampling judgements once further ones would hardly change the decision.

The rule. After m usable samples of at most K, the leader's lead over a rival is d_1..d_m (the difference of the two
scores in each sample). If these are draws from one normal distribution, Student's t predicts the lead after K samples:
mean K * d, standard deviation s * sqrt(r * (1 + r / m)) for r = K - m more samples. s^2 = (sum (d_k - d)^2 + 1) / m
includes one pseudo-observation that is one point off, so that m equal leads do not count as certain. Sampling stops
when the probabilities that a rival draws level, summed over rivals, are at most `error` divided by the number of looks.
Under this model at most `error` of the decisions differ from those of the vote over all K samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtr

from spct_ray.judge.parse import Scale
from spct_ray.judge.vote import MetaVote, vote
from spct_ray.records import Trajectory

FIRST_LOOK = 4  # samples before the first look, at least
PSEUDO_DEVIATION = 1.0  # in points of the scale


def looks(num_responses: int, k_max: int) -> list[int]:
    """Numbers of samples after which to look, up to `k_max`; they double, so that there are few rounds.

    All but `k_max` are multiples of `num_responses`, so that the orders are balanced.
    """
    ends = []
    k = num_responses * math.ceil(FIRST_LOOK / num_responses)
    while k < k_max:
        ends.append(k)
        k *= 2
    return [*ends, k_max]


def num_needed(samples: Sequence[Trajectory], logits: Sequence[float], scale: Scale, error: float) -> int:
    """The number of the K `samples` of one item, in the order in which they were drawn, after which the rule stops.

    `logits` has one value per sample for votes guided by the meta RM, or is empty.
    """
    k_max = len(samples)
    ends = looks(len(samples[0].order), k_max)[:-1]
    return next((k for k in ends if may_stop(samples[:k], logits[:k], k_max, scale, error)), k_max)


def may_stop(
    samples: Sequence[Trajectory],
    logits: Sequence[float],
    k_max: int,
    scale: Scale,
    error: float,
    meta_vote: MetaVote = "best",
) -> bool:
    """The rule at one look, over those of `samples` (of one item, of at most `k_max`) that the vote would count now.

    With a meta RM it waits until `FIRST_LOOK` samples are kept: two of four that agree are too few (3.5 % of a nano
    judge's decisions then differed from those over eight samples).
    """
    num_responses = len(samples[0].order)
    verdict = vote(samples[0].item_id, num_responses, samples, logits, meta_vote=meta_vote)
    if logits and len(verdict.used) < FIRST_LOOK:
        return False
    keeps_half = logits and meta_vote == "best"
    num_more = k_max // 2 - len(verdict.used) if keeps_half else k_max - len(samples)
    num_looks = len(looks(num_responses, k_max)) - 1
    scores_KN = [samples[k].scores for k in verdict.used]
    return is_settled(scores_KN, max(num_more, 1), scale, error / num_looks, verdict.weights)


def is_settled(
    scores_KN: Sequence[Sequence[int]], num_more: int, scale: Scale, error: float, weights_K: Sequence[float] = ()
) -> bool:
    """Whether `num_more` further samples leave the decision over `scores_KN` as it is, except with probability `error`.

    The decision is the response with the highest sum; for N = 1, the side of the scale's middle on which the mean lies.
    A tie is never settled. `error` is that of this look (the rule's `error` / number of looks before the last). Where
    samples have weights, a lead is the weighted difference.
    """
    if not scores_KN:
        return False
    weights = weights_K or [1] * len(scores_KN)
    sums = [sum(w * s for w, s in zip(weights, column, strict=True)) for column in zip(*scores_KN, strict=True)]
    best = sums.index(max(sums))
    middle = (scale.low + scale.high) / 2
    differences: list[list[float]]
    if len(sums) > 1:
        differences = [[s[best] - s[i] for s in scores_KN] for i in range(len(sums)) if i != best]
    elif sums[0] > middle * sum(weights):
        differences = [[s - middle for (s,) in scores_KN]]
    else:
        differences = [[middle - s for (s,) in scores_KN]]
    leads = [[w * d for w, d in zip(weights, lead, strict=True)] for lead in differences]
    most = math.inf if weights_K else scale.high - scale.low  # that one sample adds to a lead; weights are unbounded
    return sum(_chance_to_draw_level(lead, num_more, most) for lead in leads) <= error


def _chance_to_draw_level(lead: Sequence[float], num_more: int, most: float) -> float:
    total, m = sum(lead), len(lead)
    if total <= 0:
        return 1.0
    if total > num_more * most:
        return 0.0
    mean = total / m
    variance = (sum((d - mean) ** 2 for d in lead) + PSEUDO_DEVIATION**2) / m
    t = (total + num_more * mean) / math.sqrt(variance * num_more * (1 + num_more / m))
    return float(stdtr(m, -t))
