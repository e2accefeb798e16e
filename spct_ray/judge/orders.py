"""Orders in which responses are shown, balanced over samples so that position bias cancels out.

The paper shuffles before each sample (Section 3.3). Independent shuffles leave position noise at small K; here every N
samples show each response once at each position, and every N! samples use each order once.
"""

from __future__ import annotations

import itertools
import random

_ENUMERATED = 6  # responses: up to 5! = 120 classes of orders are dealt without repetition; beyond, repeats are rare


def balanced_orders(num_responses: int, num_samples: int, seed: int) -> list[tuple[int, ...]]:
    """`num_samples` orders; order[p] is the item's index of the response at position p. Every prefix is balanced."""
    rng = random.Random(seed)
    orders: list[tuple[int, ...]] = []
    classes: list[tuple[int, ...]] = []  # one order of each class of rotations; none repeats before all have come
    while len(orders) < num_samples:
        if num_responses > _ENUMERATED:
            classes = [tuple(rng.sample(range(num_responses), num_responses))]
        elif not classes:
            classes = [(0, *rest) for rest in itertools.permutations(range(1, num_responses))]
            rng.shuffle(classes)
        base = classes.pop(0)
        rotations = [base[r:] + base[:r] for r in range(num_responses)]
        rng.shuffle(rotations)
        orders += rotations
    return orders[:num_samples]
