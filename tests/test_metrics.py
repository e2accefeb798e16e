"""Statistics and voting curves against brute force, by hand, and against the records' own vote."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spct_ray.errors import ConfigError, DataError
from spct_ray.evaluation import curves, metrics
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.parse import Scale
from spct_ray.judge.rule import is_correct
from spct_ray.judge.vote import decide_single, vote
from spct_ray.records import Item, Message, Trajectory

SCALES = {"binary": Scale(0, 1), "scale": Scale(1, 10)}


def make_items(num: int, rng: random.Random) -> list[Item]:
    items = []
    for i in range(num):
        n = rng.choice((1, 2, 4))
        rewards = [0.0] * n
        if n > 1 or rng.random() < 0.5:
            rewards[rng.randrange(n)] = 1.0
        responses = tuple(f"r{j}" for j in range(n))
        items.append(Item(f"i{i}", (Message("user", "q"),), responses, tuple(rewards)))
    return items


def make_samples(item: Item, num: int, single: Scale, rng: random.Random, failing: float = 0.3) -> list[Trajectory]:
    n = len(item.responses)
    scale = single if n == 1 else Scale(1, 4)  # few values, many ties
    made = []
    for k, order in enumerate(balanced_orders(n, num, rng.randrange(10**6))):
        failure = "no_box" if rng.random() < failing else ""
        scores = () if failure else tuple(rng.randint(scale.low, scale.high) for _ in range(n))
        made.append(
            Trajectory(
                item.id,
                k,
                order,
                "text",
                scores,
                failure,
                False,
                False,
                0.5,
                0,
                "rft",
                0,
                5,
                rng.randint(1, 50),
                "stop",
            )
        )
    return made


@pytest.mark.parametrize("single", ["binary", "scale"])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("k_meta", [None, 1, 2])
def test_votes_equal_the_vote_of_each_block(single: str, k: int, k_meta: int | None) -> None:
    rng = random.Random(f"{single}{k}{k_meta}")
    scale, items = SCALES[single], make_items(60, rng)
    samples = {item.id: make_samples(item, 6, scale, rng) for item in items}
    flat = [t for ts in samples.values() for t in ts]
    logits = {t.key: rng.gauss(0, 3) for t in flat if not t.failure}
    table = curves.tabulate(items, rng.sample(flat, len(flat)), (scale.low + scale.high) / 2, logits)
    votes = curves.vote_curve_point(table, k, k_meta)
    for i, item in enumerate(items):
        outcomes = {"right": 0.0, "tied": 0, "undecided": 0}
        for start in range(0, 6 - k + 1, k):
            block = samples[item.id][start : start + k]
            guides = [logits.get(t.key, float("nan")) for t in block] if k_meta else []
            verdict = vote(item.id, len(item.responses), block, guides, k_meta)
            if len(item.responses) == 1:
                decisions = {decide_single(verdict, scale, s) for s in range(40)} - {None}
                truth = int(item.rewards[0])
            else:
                decisions, truth = set(verdict.winners), item.best
            outcomes["undecided"] += not decisions
            outcomes["tied"] += len(decisions) > 1
            outcomes["right"] += (truth in decisions) / max(1, len(decisions))
        blocks = 6 // k
        assert votes.tied_I[i] * blocks == pytest.approx(outcomes["tied"])
        assert votes.undecided_I[i] * blocks == pytest.approx(outcomes["undecided"])
        assert votes.accuracy_I[i] * blocks == pytest.approx(outcomes["right"])
    assert votes.tokens == pytest.approx(k * np.mean([t.completion_tokens for t in flat]))


def test_correct_samples_and_ties_follow_eq_10() -> None:
    rng = random.Random(1)
    items = make_items(80, rng)
    samples = [make_samples(item, 4, SCALES["binary"], rng) for item in items]
    table = curves.tabulate(items, [t for ts in samples for t in ts], 0.5)
    right_IK = [
        [bool(t.scores) and is_correct(t.scores, i.rewards) for t in ts] for i, ts in zip(items, samples, strict=True)
    ]
    assert curves.correct_samples(table).tolist() == right_IK
    several = [t for ts in samples for t in ts if len(t.scores) > 1]
    shared = [t.scores.count(max(t.scores)) > 1 for t in several]
    assert curves.tie_rate(table) == pytest.approx(np.mean(shared))


def test_position_consistency_equals_pair_counting() -> None:
    rng = random.Random(2)
    items = make_items(40, rng)
    samples = [make_samples(item, 5, SCALES["scale"], rng) for item in items]
    table = curves.tabulate(items, [t for ts in samples for t in ts], 5.5)

    def winners(t: Trajectory) -> set[int]:
        return {i for i, s in enumerate(t.scores) if s == max(t.scores)}

    pairs = [
        winners(a) == winners(b)
        for ts in samples
        for x, a in enumerate(ts)
        for b in ts[:x]
        if a.scores and b.scores and a.order != b.order
    ]
    assert curves.position_consistency(table) == pytest.approx(np.mean(pairs))


def test_ties_count_as_their_share_and_undecided_items_as_wrong() -> None:
    item = Item("i", (Message("user", "q"),), ("a", "b", "c"), (0.0, 1.0, 0.0))

    def outcome(scores: tuple[int, ...]) -> tuple[float, float, float]:
        votes = curves.vote_curve_point(curves.tabulate([item], [_one(item, scores)], 5.5), 1)
        return votes.accuracy_I[0], votes.tied_I[0], votes.undecided_I[0]

    assert outcome((5, 5, 1)) == (1 / 2, 1, 0)
    assert outcome((5, 5, 5)) == (1 / 3, 1, 0)
    assert outcome((5, 1, 5)) == (0, 1, 0)
    assert outcome(()) == (0, 0, 1)


def test_a_weighted_vote_sums_scores_times_minus_log_of_the_chance_to_be_wrong() -> None:
    """Two judgements of p = 0.6 against one of p = 0.9: -log 0.4 twice is 1.83, -log 0.1 is 2.30."""
    item = Item("i", (Message("user", "q"),), ("a", "b", "c"), (0.0, 1.0, 0.0))
    samples = [_one(item, s, k) for k, s in enumerate([(10, 2, 2), (10, 2, 2), (2, 10, 2), ()])]
    logits = {t.key: math.log(p / (1 - p)) for t, p in zip(samples, (0.6, 0.6, 0.9), strict=False)}
    table = curves.tabulate([item], samples, 5.5, logits)
    assert curves.meta_weight(table)[0] == pytest.approx([-math.log(0.4), -math.log(0.4), -math.log(0.1), 0])
    assert curves.vote_curve_point(table, 4).accuracy_I.tolist() == [0]
    assert curves.vote_curve_point(table, 4, weighted=True).accuracy_I.tolist() == [1]
    with pytest.raises(DataError, match="meta_scores"):
        curves.vote_curve_point(curves.tabulate([item], samples, 5.5), 4, weighted=True)


def _one(item: Item, scores: tuple[int, ...], sample: int = 0) -> Trajectory:
    failure = "" if scores else "no_box"
    return Trajectory(
        item.id, sample, tuple(range(3)), "", scores, failure, False, False, 0.5, 0, "rft", 0, 5, 9, "stop"
    )


def test_wrong_inputs_are_named() -> None:
    items = [Item(f"i{i}", (Message("user", "q"),), ("a", "b", "c"), (0.0, 1.0, 0.0)) for i in range(2)]
    a, b = (_one(item, (1, 2, 3)) for item in items)
    with pytest.raises(DataError, match="1 items with 0 samples"):
        curves.tabulate(items, [a], 5.5)
    with pytest.raises(DataError, match="i0/s0 occurs twice"):
        curves.tabulate(items, [a, a, b], 5.5)
    with pytest.raises(DataError, match="no finite meta-RM logit"):
        curves.tabulate(items, [a, b], 5.5, {a.key: 1.0})
    table = curves.tabulate(items, [a, b], 5.5)
    with pytest.raises(ConfigError, match="k = 2 needs at least 2 samples an item, evaluation drew 1"):
        curves.vote_curve_point(table, 2)
    with pytest.raises(DataError, match="meta_scores"):
        curves.vote_curve_point(table, 1, k_meta=1)


def test_paper_votes() -> None:
    """Fig. 3 (vote 17:25, meta keeps samples 1 and 3) and Table 17 (vote 20:27, meta 12:19 with k_meta = 2)."""
    item = Item("i", (Message("user", "q"),), ("a", "b"), (0.0, 1.0))
    table = curves.tabulate([item], [_one(item, s, k) for k, s in enumerate([(8, 8), (5, 9), (7, 10)])], 5.5)
    assert table.scores_IKO[0].sum(axis=0).tolist() == [20, 27]
    assert curves.vote_curve_point(table, 3).accuracy_I.tolist() == [1]
    # One sample in favour of the wrong response: plain votes go wrong, the meta vote keeps the other two.
    samples = [_one(item, s, k) for k, s in enumerate([(9, 1), (4, 6), (5, 6)])]
    logits = {t.key: x for t, x in zip(samples, (-15.7781, 1.3126, 1.6739), strict=True)}
    table = curves.tabulate([item], samples, 5.5, logits)
    assert curves.vote_curve_point(table, 3).accuracy_I.tolist() == [0]
    assert curves.vote_curve_point(table, 3, k_meta=2).accuracy_I.tolist() == [1]


def test_chance() -> None:
    items = [Item("i", (), ("a",) * n, (1.0,) * n) for n in (1, 2, 4)]
    assert curves.chance(items).tolist() == [0.5, 0.5, 0.25]


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_equals_pair_counting(rows: list[tuple[int, bool]]) -> None:
    positives, negatives = ([s for s, y in rows if y is wanted] for wanted in (True, False))
    if not positives or not negatives:
        with pytest.raises(DataError, match="both classes"):
            metrics.auc([s for s, _ in rows], [y for _, y in rows])
        return
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives]
    assert metrics.auc([s for s, _ in rows], [y for _, y in rows]) == pytest.approx(np.mean(pairs))


def test_nan_is_refused() -> None:
    with pytest.raises(DataError, match="1 of 2 values are NaN"):
        metrics.auc([0.0, float("nan")], [0, 1])
    with pytest.raises(DataError, match="non-empty"):
        metrics.bootstrap_ci([], 0)
    with pytest.raises(DataError, match="sigmoid"):
        metrics.ece([0.5, 2.0], [0, 1])


def test_ece_by_hand() -> None:
    # Bin (0.2, 0.3]: 4 predictions of 0.3, half right: gap 0.2. Bin (0.8, 0.9]: 1 of 0.9, right: gap 0.1.
    probabilities, labels = [0.3, 0.3, 0.3, 0.3, 0.9], [1, 1, 0, 0, 1]
    assert metrics.ece(probabilities, labels) == pytest.approx((4 * 0.2 + 1 * 0.1) / 5)
    low, high = metrics.reliability(probabilities, labels)
    assert (low.count, low.mean_probability, low.share_positive) == (4, pytest.approx(0.3), 0.5)
    assert (high.low, high.high, high.count) == (0.8, 0.9, 1)
    assert [b.count for b in metrics.reliability([0.0, 1.0], [0, 1])] == [1, 1]  # both ends are inside


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_interval_holds_the_mean_and_shrinks(seed: int) -> None:
    values = np.random.default_rng(seed).random(400)
    low, high = metrics.bootstrap_ci(values, seed)
    few_low, few_high = metrics.bootstrap_ci(values[:50], seed)
    assert low < values.mean() < high
    assert high - low < few_high - few_low


def test_bootstrap_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = metrics.bootstrap_ci(rng.random(150) < 0.7, trial, num=400)
        covered += low <= 0.7 <= high
    assert 0.90 < covered / 300 < 0.985


def test_paired_difference() -> None:
    rng = np.random.default_rng(1)
    a = (rng.random(500) < 0.7).astype(float)
    same = metrics.paired_difference(a, a, 0)
    assert (same.difference, same.ci, same.p_value) == (0.0, (0.0, 0.0), 1.0)
    b = a.copy()
    b[:60] = 0  # worse on the same items: paired, this is far beyond noise
    worse = metrics.paired_difference(b, a, 0)
    assert worse.difference == pytest.approx(-a[:60].sum() / 500)
    assert worse.ci[1] < 0
    assert worse.p_value == pytest.approx(1 / 1001)
    p_values = [metrics.paired_difference(rng.random(60), rng.random(60), s, num=300).p_value for s in range(200)]
    assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.10  # no difference: about 5 in 100 look like one
    with pytest.raises(DataError, match="500 and 3"):
        metrics.paired_difference(a, [1, 2, 3], 0)
