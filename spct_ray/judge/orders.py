"""Orders in which responses are shown, balanced over samples so that position bias cancels out.

The paper shuffles before each sample (Section 3.3). Independent shuffles leave position noise at small K; here every N
samples show each response once at each position, and every N! samples use each order once.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

_ENUMERATED = 6  # responses: up to 5! = 120 classes of orders are dealt without repetition; beyond, repeats are rare


def balanced_orders(num_responses: int, num_samples: int, seed: int) -> list[tuple[int, ...]]:
    """`num_samples` orders; order[p] is the item's index of the response at position p. Every prefix is balanced."""
    rng = random.Random(seed)
    orders: list[tuple[int, ...]] = []
    for base in _bases(num_responses, rng):
        rotations = [base[r:] + base[:r] for r in range(num_responses)]
        rng.shuffle(rotations)
        orders += rotations
        if len(orders) >= num_samples:
            return orders[:num_samples]
    raise AssertionError("unreachable: bases are endless")


def _bases(num_responses: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """One order from each class of rotations, endlessly; no class repeats before all others have come."""
    while True:
        if num_responses > _ENUMERATED:
            yield tuple(rng.sample(range(num_responses), num_responses))
            continue
        classes = [(0, *rest) for rest in itertools.permutations(range(1, num_responses))]
        rng.shuffle(classes)
        yield from classes


def to_item_order(shown: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Values in the order of the prompt, rearranged to the item's order."""
    values = [0] * len(order)
    for place, index in enumerate(order):
        values[index] = shown[place]
    return tuple(values)
