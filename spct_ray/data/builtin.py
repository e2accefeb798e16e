"""The built-in verifiable set: queries with checkable constraints and responses whose truth a program knows.

Exactly one response meets every constraint; each wrong one breaks exactly one. For n = 1 the response is right half of
the time. Topics and the values asked for (words, counts) are disjoint between training and held-out items; the place
of the right response is balanced within each (n, kind). It needs no download, and leaves out everything that a program
cannot check.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from random import Random

from spct_ray.data.constraints import KINDS, Constraint, fits
from spct_ray.data.drafts import render, satisfy, vary, violate, write
from spct_ray.data.words import TOPICS_OF, Split
from spct_ray.errors import ConfigError, DataError
from spct_ray.records import Item, Message

SOURCE = "builtin"
MAX_TRIES = 200  # of one response; a few are normal, since a later constraint may undo an earlier one
QUERIES = (
    "Write something short about {topic}.",
    "Say something about {topic}.",
    "Describe {topic} briefly.",
    "Tell me about {topic}.",
)


@dataclass(frozen=True)
class BuiltinConfig:
    """Sizes and mix. `kinds` empty means all kinds of `constraints.KINDS`. Weights need not sum to 1.

    `graded`: the wrong responses of an item break 1, 2, ... of its constraints, and the reward of each response is the
    share that it meets, so that all n are ranked. That takes items of at least n - 1 constraints.
    """

    size_train: int = 8000
    size_heldout: int = 400
    num_responses: tuple[int, ...] = (1, 2, 4)
    num_responses_weights: tuple[float, ...] = (0.1, 0.6, 0.3)
    num_constraints: tuple[int, ...] = (1, 2, 3)
    num_constraints_weights: tuple[float, ...] = (0.4, 0.4, 0.2)
    kinds: tuple[str, ...] = ()
    graded: bool = False


def generate(config: BuiltinConfig, seed: int) -> tuple[list[Item], list[Item]]:
    """Training and held-out items; the same config and seed give the same items. Raises ConfigError."""
    unknown = set(config.kinds) - set(KINDS)
    if unknown:
        raise ConfigError(f"builtin.kinds names {sorted(unknown)}; known kinds are {', '.join(KINDS)}")
    for name in ("num_responses", "num_constraints"):
        values, weights = getattr(config, name), getattr(config, f"{name}_weights")
        if len(values) != len(weights) or not sum(weights) > 0 or min((*values, *weights)) < 0 or 0 in values:
            raise ConfigError(
                f"builtin.{name} {values} needs one weight a value, none below 0 and not all 0; found {weights}"
            )
    return _generate("train", config.size_train, config, seed), _generate("heldout", config.size_heldout, config, seed)


def constraints_of(item: Item) -> list[Constraint]:
    """The constraints of a built-in item, rebuilt from its facts. Raises DataError for an item of another source."""
    if item.source != SOURCE:
        raise DataError(f"item {item.id} is from {item.source!r}: only items of the built-in set carry constraints")
    return [Constraint(fact["kind"], fact["value"]) for fact in json.loads(item.facts)]


def _generate(split: Split, size: int, config: BuiltinConfig, seed: int) -> list[Item]:
    rng = Random(f"{seed}/{SOURCE}/{split}")
    kinds = config.kinds or tuple(KINDS)
    decks: dict[tuple[object, ...], list[int]] = defaultdict(list)

    def deal(key: tuple[object, ...], num_cards: int) -> int:
        """Each of 0..num_cards-1 equally often for one key, in random order."""
        if not decks[key]:
            decks[key] = rng.sample(range(num_cards), num_cards)
        return decks[key].pop()

    items = []
    for number in range(size):
        n = rng.choices(config.num_responses, config.num_responses_weights)[0]
        num_constraints = rng.choices(config.num_constraints, config.num_constraints_weights)[0]
        kind = kinds[deal((n,), len(kinds))]
        place = deal((n, kind), max(n, 2))
        item_id = f"{SOURCE}-{split}-{number:06d}"
        items.append(_item(item_id, split, n, num_constraints, kind, place, kinds, rng, config.graded and n > 1))
    return items


def _item(
    item_id: str,
    split: Split,
    n: int,
    num_constraints: int,
    kind: str,
    place: int,
    kinds: tuple[str, ...],
    rng: Random,
    graded: bool,
) -> Item:
    """One item whose first wrong response breaks `kind`. For n >= 2 `place` is the index of the right response; for
    n = 1 it is 0 for a right response and 1 for a wrong one."""
    for _ in range(MAX_TRIES):
        constraints = _draw_constraints(split, kind, num_constraints, kinds, rng)
        if not graded or len(constraints) >= n - 1:
            break
    else:
        raise ConfigError(
            f"builtin.graded: {n} responses need {n - 1} constraints, but num_constraints is {num_constraints}, or no "
            f"{n - 1} of the kinds {', '.join(kinds)} fit together beside {kind}"
        )
    primary = next(c for c in constraints if c.kind == kind)
    topic = rng.choice(TOPICS_OF[split])
    taken = frozenset[str]().union(*(KINDS[c.kind].slots for c in constraints))
    base = write(topic, taken, rng)

    broken: list[tuple[Constraint, ...]] = [(primary,), *((rng.choice(constraints),) for _ in range(n - 2))]
    if graded:
        broken = [broken[0], *(tuple(rng.sample(constraints, num)) for num in range(2, n))]
    rng.shuffle(broken)
    if n == 1:
        broken = [()] if place == 0 else [(primary,)]
    else:
        broken.insert(place, ())
    responses: list[str] = []
    for wrong in broken:
        for _ in range(MAX_TRIES):
            draft = vary(base, taken, rng)
            for constraint in sorted(constraints, key=lambda c: list(KINDS).index(c.kind)):
                (violate if constraint in wrong else satisfy)(draft, constraint, rng)
            text = render(draft, topic)
            if text not in responses and all(c.check(text) != (c in wrong) for c in constraints):
                responses.append(text)
                break
        else:
            raise AssertionError(f"no response found for {constraints}, breaking {wrong}, in {MAX_TRIES} tries")
    query = [rng.choice(QUERIES).format(topic=topic), *(rng.choice(c.instructions) for c in constraints)]
    return Item(
        id=item_id,
        messages=(Message("user", " ".join(query)),),
        responses=tuple(responses),
        rewards=tuple(1 - len(wrong) / len(constraints) if graded else float(not wrong) for wrong in broken),
        source=SOURCE,
        subset=kind,
        facts=json.dumps([{"kind": c.kind, "value": c.value} for c in constraints]),
    )


def _draw_constraints(split: Split, kind: str, number: int, kinds: tuple[str, ...], rng: Random) -> list[Constraint]:
    """Up to `number` constraints that fit together, `kind` among them, in random order, with different values."""
    chosen = [Constraint(kind, rng.choice(KINDS[kind].values[split]))]
    taken = KINDS[kind].slots
    while len(chosen) < number:
        fitting = [k for k in kinds if fits(k, taken)]
        if not fitting:
            break
        other = rng.choice(fitting)
        values = [v for v in KINDS[other].values[split] if v == "" or v not in [c.value for c in chosen]]
        chosen.append(Constraint(other, rng.choice(values)))
        taken |= KINDS[other].slots
    rng.shuffle(chosen)
    return chosen
