"""Balanced against independent orders at equal k, from the samples of one evaluation: what does balance save?

The samples of a pair show either response first equally often. A vote of k takes half of each (balanced), or, as a
judge who shuffles anew before every sample would, so many of each as k throws of a coin say (independent; paper,
Section 3.3). Both are drawn many times from the same samples, and compared by how often they are right and by how much
the outcome hangs on the draw. Leaves out items with other than two responses, whose samples do not show every order
often enough. Axes: I items, R draws, K samples.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from spct_ray.evaluation import aggregate, metrics
from spct_ray.evaluation.curves import Bools, ScoreTable
from spct_ray.evaluation.sheet import Sheet, best_credit

NUM_DRAWS = 200


def draw_independent(table: ScoreTable, k: int, num_draws: int, seed: int) -> Bools:
    """[I, R, K] `num_draws` ways to take k of the K samples of each pair, each order by a throw of a coin.

    Needs k samples of each order: meaningful for pairs with k <= K / 2.
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
    """Votes of k over the pairs: share right and variance of an item's outcome over draws, balanced and independent,
    and their differences with 95 % intervals over items.

    None without pairs that show each order k times.
    """
    enough_I = np.minimum((table.first_IK == 0).sum(axis=-1), (table.first_IK != 0).sum(axis=-1)) >= k
    inside_I = (table.num_responses_I == 2) & enough_I
    if not inside_I.any() or k < 2:
        return None
    right, noise = {}, {}
    for name, drawn in (("balanced", aggregate.draw), ("independent", draw_independent)):
        decisions = aggregate.decide("sum", table, drawn(table, k, NUM_DRAWS, seed), k_meta=1)
        credit_RI = np.array([best_credit(sheet, decision.scores_IO) for decision in decisions])[:, inside_I]
        right[name], noise[name] = credit_RI.mean(axis=0), credit_RI.var(axis=0, ddof=1)
    differences = {
        what: dataclasses.asdict(metrics.paired_difference(by["balanced"], by["independent"], seed))
        for what, by in (("accuracy", right), ("variance", noise))
    }
    return {
        "num_items": int(inside_I.sum()),
        **{name: {"accuracy": float(right[name].mean()), "variance": float(noise[name].mean())} for name in right},
        "difference": differences,
    }
