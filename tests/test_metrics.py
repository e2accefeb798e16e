"""Statistics and voting curves against brute force, by hand, and against the records' own vote."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spct_ray.errors import ConfigError, DataError
from spct_ray.evaluation import judgements, statistics, votes
from spct_ray.evaluation.judgements import ScoreTable, best_credit, decided
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


def block_votes(
    items: list[Item], table: ScoreTable, k: int, way: str = "sum", k_meta: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """[I] share right, tied and undecided, over all full blocks of k successive samples."""
    place = np.arange(table.num_samples)
    take_BK = place[None, :] // k == place[: table.num_samples // k, None]
    made = votes.decide(way, table, np.broadcast_to(take_BK, (len(items), *take_BK.shape)), k_meta)
    tied = [judgements.winners(table.sheet, d.scores_IO).sum(axis=-1) > 1 for d in made]
    return (
        np.mean([best_credit(table.sheet, d.scores_IO) for d in made], axis=0),
        np.mean(tied, axis=0),
        np.mean([~decided(d.scores_IO) for d in made], axis=0),
    )


@pytest.mark.parametrize("single", ["binary", "scale"])
@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("k_meta", [None, 1, 2])
def test_votes_equal_the_vote_of_each_block(single: str, k: int, k_meta: int | None) -> None:
    rng = random.Random(f"{single}{k}{k_meta}")
    scale, items = SCALES[single], make_items(60, rng)
    samples = {item.id: make_samples(item, 6, scale, rng) for item in items}
    flat = [t for ts in samples.values() for t in ts]
    logits = {t.key: rng.gauss(0, 3) for t in flat if not t.failure}
    table = judgements.tabulate(items, rng.sample(flat, len(flat)), (scale.low + scale.high) / 2, logits)
    credit, tied, undecided = block_votes(items, table, k, "meta_top" if k_meta else "sum", k_meta or 1)
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
        assert tied[i] * blocks == pytest.approx(outcomes["tied"])
        assert undecided[i] * blocks == pytest.approx(outcomes["undecided"])
        assert credit[i] * blocks == pytest.approx(outcomes["right"])


def test_correct_samples_and_ties_follow_eq_10() -> None:
    rng = random.Random(1)
    items = make_items(80, rng)
    samples = [make_samples(item, 4, SCALES["binary"], rng) for item in items]
    table = judgements.tabulate(items, [t for ts in samples for t in ts], 0.5)
    right_IK = [
        [bool(t.scores) and is_correct(t.scores, i.rewards) for t in ts] for i, ts in zip(items, samples, strict=True)
    ]
    assert table.correct_IK.tolist() == right_IK
    several = [t for ts in samples for t in ts if len(t.scores) > 1]
    shared = [t.scores.count(max(t.scores)) > 1 for t in several]
    assert table.tie_rate() == pytest.approx(np.mean(shared))


def test_position_consistency_equals_pair_counting() -> None:
    rng = random.Random(2)
    items = make_items(40, rng)
    samples = [make_samples(item, 5, SCALES["scale"], rng) for item in items]
    table = judgements.tabulate(items, [t for ts in samples for t in ts], 5.5)

    def winners(t: Trajectory) -> set[int]:
        return {i for i, s in enumerate(t.scores) if s == max(t.scores)}

    pairs = [
        winners(a) == winners(b)
        for ts in samples
        for x, a in enumerate(ts)
        for b in ts[:x]
        if a.scores and b.scores and a.order != b.order
    ]
    assert table.position_consistency() == pytest.approx(np.mean(pairs))


def test_ties_count_as_their_share_and_undecided_items_as_wrong() -> None:
    item = Item("i", (Message("user", "q"),), ("a", "b", "c"), (0.0, 1.0, 0.0))

    def outcome(scores: tuple[int, ...]) -> tuple[float, float, float]:
        table = judgements.tabulate([item], [_one(item, scores)], 5.5)
        credit, tied, undecided = block_votes([item], table, 1)
        return credit[0], tied[0], undecided[0]

    assert outcome((5, 5, 1)) == (1 / 2, 1, 0)
    assert outcome((5, 5, 5)) == (1 / 3, 1, 0)
    assert outcome((5, 1, 5)) == (0, 1, 0)
    assert outcome(()) == (0, 0, 1)


def test_a_weighted_vote_sums_scores_times_minus_log_of_the_chance_to_be_wrong() -> None:
    """Two judgements of p = 0.6 against one of p = 0.9: -log 0.4 twice is 1.83, -log 0.1 is 2.30."""
    item = Item("i", (Message("user", "q"),), ("a", "b", "c"), (0.0, 1.0, 0.0))
    samples = [_one(item, s, k) for k, s in enumerate([(10, 2, 2), (10, 2, 2), (2, 10, 2), ()])]
    logits = {t.key: math.log(p / (1 - p)) for t, p in zip(samples, (0.6, 0.6, 0.9), strict=False)}
    table = judgements.tabulate([item], samples, 5.5, logits)
    (decision,) = votes.decide("meta_weighted", table, votes.draw(table, 4, 1, 0), 1)
    two, one = -2 * math.log(0.4), -math.log(0.1)
    assert decision.scores_IO[0] == pytest.approx([10 * two + 2 * one, 2 * two + 10 * one, 2 * two + 2 * one])
    assert block_votes([item], table, 4)[0].tolist() == [0]
    assert block_votes([item], table, 4, "meta_weighted")[0].tolist() == [1]
    with pytest.raises(DataError, match="meta-RM logits"):
        block_votes([item], judgements.tabulate([item], samples, 5.5), 4, "meta_weighted")


def _one(item: Item, scores: tuple[int, ...], sample: int = 0) -> Trajectory:
    failure = "" if scores else "no_box"
    return Trajectory(
        item.id, sample, tuple(range(3)), "", scores, failure, False, False, 0.5, 0, "rft", 0, 5, 9, "stop"
    )


def test_wrong_inputs_are_named() -> None:
    items = [Item(f"i{i}", (Message("user", "q"),), ("a", "b", "c"), (0.0, 1.0, 0.0)) for i in range(2)]
    a, b = (_one(item, (1, 2, 3)) for item in items)
    with pytest.raises(DataError, match="1 items with 0 samples"):
        judgements.tabulate(items, [a], 5.5)
    with pytest.raises(DataError, match="i0/s0 occurs twice"):
        judgements.tabulate(items, [a, a, b], 5.5)
    with pytest.raises(DataError, match="no finite meta-RM logit"):
        judgements.tabulate(items, [a, b], 5.5, {a.key: 1.0})
    table = judgements.tabulate(items, [a, b], 5.5)
    with pytest.raises(ConfigError, match="k = 2 needs at least 2 samples per item, but 1 were drawn"):
        votes.draw(table, 2, 1, 0)


def test_paper_votes() -> None:
    """Fig. 3 (vote 17:25, meta keeps samples 1 and 3) and Table 17 (vote 20:27, meta 12:19 with k_meta = 2)."""
    item = Item("i", (Message("user", "q"),), ("a", "b"), (0.0, 1.0))
    table = judgements.tabulate([item], [_one(item, s, k) for k, s in enumerate([(8, 8), (5, 9), (7, 10)])], 5.5)
    assert table.scores_IKO[0].sum(axis=0).tolist() == [20, 27]
    assert block_votes([item], table, 3)[0].tolist() == [1]
    # One sample in favour of the wrong response: plain votes go wrong, the meta vote keeps the other two.
    samples = [_one(item, s, k) for k, s in enumerate([(9, 1), (4, 6), (5, 6)])]
    logits = {t.key: x for t, x in zip(samples, (-15.7781, 1.3126, 1.6739), strict=True)}
    table = judgements.tabulate([item], samples, 5.5, logits)
    assert block_votes([item], table, 3)[0].tolist() == [0]
    assert block_votes([item], table, 3, "meta_top", 2)[0].tolist() == [1]


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_equals_pair_counting(rows: list[tuple[int, bool]]) -> None:
    positives, negatives = ([s for s, y in rows if y is wanted] for wanted in (True, False))
    if not positives or not negatives:
        assert statistics.auc([s for s, _ in rows], [y for _, y in rows]) is None
        return
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives]
    assert statistics.auc([s for s, _ in rows], [y for _, y in rows]) == pytest.approx(np.mean(pairs))


def test_nan_is_refused() -> None:
    with pytest.raises(DataError, match="1 of 2 values are NaN"):
        statistics.auc([0.0, float("nan")], [0, 1])
    with pytest.raises(DataError, match="non-empty"):
        statistics.bootstrap_ci([], 0)
    with pytest.raises(DataError, match="sigmoid"):
        statistics.ece([0.5, 2.0], [0, 1])


def test_ece_by_hand() -> None:
    # Bin (0.2, 0.3]: 4 predictions of 0.3, half right: gap 0.2. Bin (0.8, 0.9]: 1 of 0.9, right: gap 0.1.
    probabilities, labels = [0.3, 0.3, 0.3, 0.3, 0.9], [1, 1, 0, 0, 1]
    assert statistics.ece(probabilities, labels) == pytest.approx((4 * 0.2 + 1 * 0.1) / 5)
    low, high = statistics.reliability(probabilities, labels)
    assert (low["count"], low["mean_probability"], low["share_positive"]) == (4, pytest.approx(0.3), 0.5)
    assert (high["low"], high["high"], high["count"]) == (0.8, 0.9, 1)
    assert [b["count"] for b in statistics.reliability([0.0, 1.0], [0, 1])] == [1, 1]  # both ends are inside


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_interval_holds_the_mean_and_shrinks(seed: int) -> None:
    values = np.random.default_rng(seed).random(400)
    low, high = statistics.bootstrap_ci(values, seed)
    few_low, few_high = statistics.bootstrap_ci(values[:50], seed)
    assert low < values.mean() < high
    assert high - low < few_high - few_low


def test_bootstrap_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = statistics.bootstrap_ci(rng.random(150) < 0.7, trial, num=400)
        covered += low <= 0.7 <= high
    assert 0.90 < covered / 300 < 0.985


def test_paired_difference() -> None:
    rng = np.random.default_rng(1)
    a = (rng.random(500) < 0.7).astype(float)
    same = statistics.paired_difference(a, a, 0)
    assert (same.difference, same.ci, same.p_value) == (0.0, (0.0, 0.0), 1.0)
    b = a.copy()
    b[:60] = 0  # worse on the same items: paired, this is far beyond noise
    worse = statistics.paired_difference(b, a, 0)
    assert worse.difference == pytest.approx(-a[:60].sum() / 500)
    assert worse.ci[1] < 0
    assert worse.p_value == pytest.approx(1 / 1001)
    p_values = [statistics.paired_difference(rng.random(60), rng.random(60), s, num=300).p_value for s in range(200)]
    assert 0.01 < np.mean(np.array(p_values) < 0.05) < 0.10  # no difference: about 5 in 100 look like one
    with pytest.raises(DataError, match="500 and 3"):
        statistics.paired_difference(a, [1, 2, 3], 0)


@pytest.mark.parametrize(("n", "num_samples", "k"), [(3, 8, 6), (3, 8, 3), (6, 8, 4), (3, 16, 8)])
def test_votes_of_fewer_samples_are_those_of_fresh_runs(n: int, num_samples: int, k: int) -> None:
    """A judge that adds 3 points for whatever stands first: drawing k of K balanced samples votes as k fresh ones."""
    rng, num = random.Random(n), 3000
    items = [Item(f"i{i}", (), tuple("abcdef"[:n]), (1.0, *[0.0] * (n - 1))) for i in range(num)]

    def table(count: int) -> ScoreTable:
        made = [
            _judged(item, s, order, tuple(4 + 3 * (order[0] == j) + (j == 0) + rng.randint(0, 2) for j in range(n)))
            for item in items
            for s, order in enumerate(balanced_orders(n, count, rng.randrange(10**6)))
        ]
        return judgements.tabulate(items, made, 5.5)

    def credit(of: ScoreTable) -> float:
        made = votes.decide("sum", of, votes.draw(of, k, 16, 0), 1)
        return float(np.mean([best_credit(of.sheet, d.scores_IO) for d in made]))

    assert credit(table(num_samples)) == pytest.approx(credit(table(k)), abs=0.025)


def _judged(item: Item, sample: int, order: tuple[int, ...], scores: tuple[int, ...]) -> Trajectory:
    return Trajectory(item.id, sample, order, "", scores, "", False, False, 0.5, 0, "rft", 0, 5, 9, "stop")
