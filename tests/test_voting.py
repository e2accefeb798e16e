"""Adaptive k against simulated judges, cohorts against a judge whose scores depend on the company, confidence."""

import asyncio
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spct_ray.evaluation.curves import tabulate, vote_curve_point

from spct_ray.errors import EngineError, TooLongError
from spct_ray.judge.adaptive import is_settled, looks, may_stop
from spct_ray.judge.cohort import NUM_ANCHORS, chunks, merge, score_cohort
from spct_ray.judge.parse import Scale
from spct_ray.judge.vote import confidence, decide_single, vote
from spct_ray.records import Item, Message, Trajectory

TEN = Scale(1, 10)
ERROR = 0.01


def simulated(rng, num, k):
    """Samples of an item whose responses may be alike or far apart, with noise and a taste for the first place."""
    gap, noise, taste = abs(rng.gauss(0, 1.5)), rng.choice([0.3, 1, 2, 3]), rng.choice([0, 0, 1, 2])
    quality = [5.5 + rng.gauss(0, gap) for _ in range(num)]
    shown = [[(j + r) % num for j in range(num)] for r in range(k)]
    return [
        tuple(max(1, min(10, round(quality[j] + rng.gauss(0, noise) + taste * (shown[r][0] == j)))) for j in range(num))
        for r in range(k)
    ]


def decisions(samples):
    """Set of equally good decisions; for one response, whether it passes the middle of the scale."""
    sums = [sum(column) for column in zip(*samples, strict=True)]
    if len(sums) == 1:
        twice = 2 * sums[0] - 11 * len(samples)
        return {True, False} if not twice else {twice > 0}
    return {i for i, s in enumerate(sums) if s == max(sums)}


@pytest.mark.parametrize(("num", "most_tokens"), [(1, 0.80), (2, 0.85), (4, 0.90)])
def test_stopping_early_keeps_the_decision_and_saves_samples(num, most_tokens):
    rng = random.Random(num)
    k_max, changed, drawn, items = 32, 0.0, 0, 1500
    ends = looks(num, k_max)
    for _ in range(items):
        samples = simulated(rng, num, k_max)
        share = ERROR / (len(ends) - 1)
        k = next((k for k in ends[:-1] if is_settled(samples[:k], k_max - k, TEN, share)), k_max)
        now, last = decisions(samples[:k]), decisions(samples)
        changed += 0.0 if k == k_max else 1 - len(now & last) / len(now) / len(last)
        drawn += k
    assert changed / items <= ERROR
    assert drawn / items / k_max <= most_tokens


def test_what_is_settled_and_what_is_not():
    assert is_settled([(1, 10)] * 4, 28, TEN, ERROR)
    assert not is_settled([(5, 6)] * 4, 28, TEN, ERROR / 3)  # four samples are few
    assert is_settled([(5, 6)] * 4 * 8, 4, TEN, ERROR)
    assert is_settled([(1, 9), (1, 10), (2, 8)], 1, TEN, 0.0)  # 23 points cannot be caught up in one sample
    assert not is_settled([(5, 5)] * 30, 2, TEN, ERROR)  # a tie never is
    assert not is_settled([(9, 9, 1)] * 30, 2, TEN, ERROR)
    assert not is_settled([], 8, TEN, ERROR)
    assert not is_settled([(1,)] * 4, 28, Scale(0, 1), ERROR)
    assert is_settled([(1,)] * 16, 16, Scale(0, 1), ERROR)
    assert is_settled([(0,)] * 16, 16, Scale(0, 1), ERROR)


@given(st.integers(1, 20), st.integers(1, 64))
def test_looks_rise_to_k_max_and_are_balanced(num, k_max):
    ends = looks(num, k_max)
    assert ends == sorted(set(ends))
    assert ends[-1] == k_max
    assert all(k % num == 0 and k >= 4 for k in ends[:-1])


@given(st.integers(1, 200), st.integers(2, 12))
def test_chunks_cover_all_share_the_anchors_and_are_even(num, size):
    parts = chunks(num, size)
    assert {i for part in parts for i in part} == set(range(num))
    assert max(map(len, parts)) <= size
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if len(parts) > 1:
        num_anchors = min(NUM_ANCHORS, size - 1)
        assert all(part[:num_anchors] == tuple(range(num_anchors)) for part in parts)
        assert sum(map(len, parts)) == num + num_anchors * (len(parts) - 1)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(2, 9), st.randoms())
def test_a_judge_that_grades_on_a_curve_gives_one_scale(quality, size, rng):
    """The judge adds a number of its own to the scores of each prompt; the differences still come out right."""

    async def judge(part):
        mood = rng.uniform(-5, 5)
        return [quality[i] + mood for i in part]

    scores = asyncio.run(score_cohort(len(quality), size, judge))
    assert [s - scores[0] for s in scores] == pytest.approx([q - quality[0] for q in quality])


def test_chunks_that_are_too_long_are_made_smaller_and_what_never_fits_is_nan():
    """A prompt holds 10 characters; response 5 has 20."""
    lengths = [3, 2, 4, 3, 5, 20, 1]

    async def judge(part):
        if sum(lengths[i] for i in part) > 10:
            raise TooLongError("too long")
        return [float(lengths[i]) for i in part]

    scores = asyncio.run(score_cohort(7, 8, judge))
    assert scores[:5] + scores[6:] == [3, 2, 4, 3, 5, 1]
    assert math.isnan(scores[5])
    lengths[0] = 11  # the anchor of every pair
    with pytest.raises(TooLongError):
        asyncio.run(score_cohort(7, 8, judge))
    with pytest.raises(TooLongError):
        asyncio.run(score_cohort(1, 8, judge))


def test_a_chunk_that_fails_ends_the_work_on_all_others():
    ended = []

    async def judge(part):
        if 2 in part:
            raise EngineError("gone")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(part)

    async def scenario():
        with pytest.raises(EngineError, match="gone"):
            await score_cohort(200, 8, judge)
        return len(ended)

    assert asyncio.run(scenario()) == 32


def test_a_chunk_without_a_verdict_is_nan_and_no_other():
    parts = chunks(7, 4)
    assert parts == [(0, 1, 2, 5), (0, 1, 3, 6), (0, 1, 4)]
    scores = merge(parts, [[4.0, 6.0, 9.0, 2.0], None, [5.0, 7.0, 3.0]])
    assert scores[:3] == [4.5, 6.5, 9.5]
    assert (scores[5], scores[4]) == (2.5, 2.5)
    assert math.isnan(scores[3])
    assert math.isnan(scores[6])
    assert all(map(math.isnan, merge(parts, [None] * 3)))
    assert math.isnan(merge([(0,)], [None])[0])
    assert merge([(0, 1)], [[3.0, 4.0]]) == [3.0, 4.0]


def exact_confidence(samples, winner):
    """By all K^K resamples."""
    import itertools

    total = 0.0
    for draw in itertools.product(samples, repeat=len(samples)):
        sums = [sum(column) for column in zip(*draw, strict=True)]
        tops = [i for i, s in enumerate(sums) if s == max(sums)]
        total += (winner in tops) / len(tops)
    return total / len(samples) ** len(samples)


@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=4))
def test_confidence_is_the_share_of_resamples_won(samples):
    assert confidence(samples, 1, seed=3) == pytest.approx(exact_confidence(samples, 1), abs=0.07)
    assert confidence(samples, 1, seed=3) == confidence(samples, 1, seed=3)
    assert sum(confidence(samples, i, seed=3) for i in range(3)) == pytest.approx(1)


# --- weighted by the meta RM


def sample(number, scores, failure=""):
    order = tuple(range(len(scores)))
    return Trajectory("i", number, order, "", scores, failure, False, False, 0.5, 1, "m", 0, 1, 1, "stop")


SCORES = st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10), st.floats(-20, 20)), min_size=1, max_size=8)


@given(SCORES)
def test_a_weighted_vote_sums_minus_log_of_the_chance_to_be_wrong_as_the_evaluation_does(drawn):
    samples = [sample(k, scores) for k, (*scores, _) in enumerate(drawn)]
    logits = [logit for *_, logit in drawn]
    verdict = vote("i", 2, samples, logits, meta_vote="weighted")
    weights = [-math.log(1 / (1 + math.exp(logit))) for logit in logits]
    expected = [sum(w * t.scores[i] for w, t in zip(weights, samples, strict=True)) for i in (0, 1)]
    assert verdict.scores == pytest.approx([len(drawn) * s / sum(weights) for s in expected], abs=1e-6)
    assert sum(verdict.weights) == pytest.approx(len(drawn))
    item = Item("i", (Message("user", "q"),), ("a", "b"), (1.0, 0.0))
    table = tabulate([item], samples, 5.5, {t.key: logit for t, logit in zip(samples, logits, strict=True)})
    point = vote_curve_point(table, len(samples), weighted=True)
    if abs(expected[0] - expected[1]) > 1e-6:  # else the two round differently
        assert point.accuracy_I[0] == (verdict.winners == (0,))


def test_a_weighted_vote_leaves_out_what_failed_and_takes_every_other_sample():
    samples = [sample(0, (9, 1)), sample(1, (), "no_box"), sample(2, (1, 9)), sample(3, (1, 9))]
    verdict = vote("i", 2, samples, [3.0, math.nan, -3.0, -3.0], meta_vote="weighted")
    assert (verdict.used, verdict.winners, verdict.failures) == ((0, 2, 3), (0,), {"no_box": 1})
    assert vote("i", 2, samples, [3.0, math.nan, -3.0, -3.0], k_meta=3).winners == (1,)
    certain = vote("i", 1, [sample(0, (9,)), sample(1, (2,))], [-9e9, -9e9], meta_vote="weighted")  # no weight is 0
    assert (certain.scores, decide_single(certain, TEN, 1)) == ((11.0,), certain.scores[0] > 11 or 0)
    assert vote("i", 2, samples[1:2], [math.nan], meta_vote="weighted").scores == ()


def test_adaptive_voting_looks_at_weighted_leads():
    """Eight samples: the two that the meta RM trusts say 9 : 1, or it trusts none in particular."""
    samples = [sample(k, (9, 1) if k < 2 else (1, 9)) for k in range(8)]
    trusting, plain = [9.0, 9.0, *[-9.0] * 6], [0.0] * 8
    assert (
        confidence([t.scores for t in samples], 0, 1, vote("i", 2, samples, trusting, meta_vote="weighted").weights)
        > 0.8
    )
    assert not may_stop(samples, plain, 32, TEN, ERROR, "weighted")
    agreed = [sample(k, (9, 1)) for k in range(8)]
    assert may_stop(agreed, plain, 32, TEN, ERROR, "weighted")
    assert not may_stop(agreed, [9.0, *[-9.0] * 7], 32, TEN, ERROR, "weighted")  # on the word of one sample
    assert is_settled([(1,)] * 16, 16, Scale(0, 1), ERROR, [1.0] * 16)
    assert not is_settled([(1,)] * 8 + [(0,)] * 8, 16, Scale(0, 1), ERROR, [1.0] * 16)
