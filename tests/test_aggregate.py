"""Aggregators and draws against brute force over the same samples."""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import pytest

from spct_ray.errors import ConfigError, DataError
from spct_ray.evaluation import votes
from spct_ray.evaluation.judgements import ScoreTable, tabulate
from spct_ray.evaluation.votes import FILTERS, GUIDED, PLAIN
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.vote import vote
from spct_ray.records import Item, Message, Trajectory


def make(
    seed: int, sizes: tuple[int, ...] = (1, 2, 2, 4), k: int = 8
) -> tuple[ScoreTable, dict[str, list[Trajectory]], dict[str, float]]:
    rng = np.random.default_rng(seed)
    items, made, logits = [], {}, {}
    for i, n in enumerate(sizes):
        item = Item(f"i{i}", (Message("user", "Q"),), tuple(map(str, range(n))), (1.0, *[0.0] * (n - 1)))
        items.append(item)
        made[item.id] = [
            Trajectory(item.id, j, order, "t", () if fails else tuple(rng.integers(1, 11, n).tolist()),
                       "no_box" if fails else "", False, False, 0.5, j, "m", 0, 10, int(rng.integers(5, 50)), "stop")
            for j, order in enumerate(balanced_orders(n, k, i)) for fails in [rng.random() < 0.2]
        ]  # fmt: skip
        logits |= {t.key: float(rng.normal()) for t in made[item.id]}
    return tabulate(items, [t for ts in made.values() for t in ts], 5.5, logits), made, logits


def by_hand(name: str, ts: list[Trajectory], logits: dict[str, float], k_meta: int) -> list[float]:
    used = [t for t in ts if not t.failure]
    ranked = sorted(used, key=lambda t: -logits[t.key])
    kept = {"best_by_meta": ranked[:1], "meta_top": ranked[:k_meta]}.get(name, used)
    kept = {"shortest": sorted(used, key=lambda t: t.completion_tokens)[:k_meta],
            "longest": sorted(used, key=lambda t: -t.completion_tokens)[:k_meta]}.get(name, kept)  # fmt: skip
    rows = [list(map(float, t.scores)) for t in kept]
    if name == "majority":
        rows = [[(s == max(row)) / row.count(max(row)) for s in row] for row in rows]
    if name == "meta_weighted":
        rows = [[s * np.log1p(np.exp(logits[t.key])) for s in row] for row, t in zip(rows, kept, strict=True)]
    columns = list(zip(*rows, strict=True))
    if name == "median":
        return [statistics.median(c) for c in columns]
    total = [sum(c) for c in columns]
    return [s / len(rows) for s in total] if name == "mean" else total


@pytest.mark.parametrize("name", [*PLAIN, *GUIDED, "shortest", "longest"])
def test_aggregators_are_what_their_names_say(name: str) -> None:
    for seed in range(5):
        table, made, logits = make(seed, (2, 3, 4))
        (decision,) = votes.decide(name, table, votes.draw(table, 8, 1, 0), 3)
        for i, ts in enumerate(made.values()):
            if all(t.failure for t in ts):
                assert np.isnan(decision.scores_IO[i]).all()
                continue
            expected = by_hand(name, ts, logits, 3)
            assert decision.scores_IO[i, : len(expected)] == pytest.approx(expected)


def test_sum_and_meta_top_are_the_votes_of_the_method() -> None:
    table, made, logits = make(3)
    take = votes.draw(table, 8, 1, 0)
    (plain,), (guided,) = (votes.decide(name, table, take, 4) for name in ("sum", "meta_top"))
    for i, (item_id, ts) in enumerate(made.items()):
        n = len(ts[0].order)
        if n == 1:
            continue
        values = [float("nan") if t.failure else logits[t.key] for t in ts]
        assert tuple(plain.scores_IO[i, :n]) == vote(item_id, n, ts).scores
        assert tuple(guided.scores_IO[i, :n]) == vote(item_id, n, ts, values, 4).scores


def test_single_responses_get_a_mean_rating() -> None:
    table, made, _ = make(1, (1,))
    used = [t.scores[0] for t in made["i0"] if not t.failure]
    (decision,) = votes.decide("sum", table, votes.draw(table, 8, 1, 0), 4)
    assert decision.scores_IO[0] == pytest.approx([5.5, sum(used) / len(used)])


def test_orders_are_told_apart() -> None:
    table, made, _ = make(2, (2,))
    (decision,) = votes.decide("sum", table, votes.draw(table, 8, 1, 0), 4)
    for scores, first in ((decision.forward_IO, 0), (decision.backward_IO, 1)):
        kept = [t.scores for t in made["i0"] if not t.failure and t.order[0] == first]
        assert scores[0] == pytest.approx(np.sum(kept, axis=0))


def test_draws_are_balanced_fair_and_of_the_right_size() -> None:
    table, _, _ = make(0, (2, 4, 2), 8)
    for k in (1, 2, 3, 4, 8):
        take = votes.draw(table, k, 200, 5)
        assert (take.sum(axis=-1) == k).all()
        if k % 2 == 0:  # n = 2: whole rounds, each order equally often
            first = np.where(take[0], table.first_IK[0][None], 0).sum(axis=-1)
            assert (first == k / 2).all()
        assert np.abs(take.mean(axis=1) - k / 8).max() < 0.15  # each sample equally often
    with pytest.raises(ConfigError, match="k = 9"):
        votes.draw(table, 9, 1, 0)


def test_the_mean_over_draws_of_one_sample_is_the_mean_over_samples() -> None:
    table, _, _ = make(4, (2,) * 20, 8)
    table = replace(table, used_IK=np.ones_like(table.used_IK))
    decisions = votes.decide("sum", table, votes.draw(table, 1, 2000, 0), 1)
    estimate = np.mean([d.scores_IO for d in decisions], axis=0)
    assert np.abs(estimate - table.scores_IKO.mean(axis=1)).max() < 0.35


def test_guided_aggregators_need_a_meta_rm() -> None:
    table, _, _ = make(0)
    for name in (*GUIDED, *FILTERS):
        take = votes.draw(table, 4, 2, 0)
        if name in GUIDED:
            with pytest.raises(DataError, match=name):
                votes.decide(name, replace(table, logits_IK=None), take, 2)
        else:
            assert len(votes.decide(name, replace(table, logits_IK=None), take, 2)) == 2


def test_a_meta_vote_may_keep_another_number_of_samples_of_each_item() -> None:
    table, made, logits = make(6, (2, 3, 4))
    (decision,) = votes.decide("meta_top", table, votes.draw(table, 8, 1, 0), np.array([1, 2, 4]))
    for i, (k_meta, ts) in enumerate(zip((1, 2, 4), made.values(), strict=True)):
        expected = by_hand("meta_top", ts, logits, k_meta)
        assert decision.scores_IO[i, : len(expected)] == pytest.approx(expected)
