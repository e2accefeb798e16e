"""The built-in verifiable set: queries with several checkable requirements, and responses that a program can check.

    Write for Anna: animals, a number in digits, an exclamation mark.

The best response meets all requirements, every other one breaks exactly one. For n = 1 the response is right half of
the time, and a wrong one breaks two. A judgement that checks only some requirements may find no difference, and votes
combine what different judgements checked. Held out are names, a few words of each kind, and a fifth of the combinations
of parts that a query asks about. The set needs no download, and has nothing that a program cannot check.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

from spct_ray.data.kinds import KINDS, NAMES, PARTS, Kind, Sentence, Split, kind_named, kinds_of, render
from spct_ray.errors import ConfigError, DataError
from spct_ray.records import Item, Message

SOURCE = "builtin"
FAVOURITES = ("a feeling", "an exclamation mark")  # what a careless judge prefers, asked for or not


@dataclass(frozen=True)
class BuiltinConfig:
    """Sizes and mix. Weights need not sum to 1.

    `alike` is the probability that the responses of an item agree in a part that is not asked for. With `lure` a worse
    response has the favourites of careless judges more often than the best one where they are not asked for: with
    probability 0.5 + lure / 2 against 0.5 - lure / 2. With `graded` the wrong responses of an item break 1, 2, ... of
    its requirements, and each reward is the share that the response meets, so that all n are ranked. `kinds` are
    import paths `module:NAME` of further kinds.
    """

    size_train: int = 4000
    size_heldout: int = 500
    num_responses: tuple[int, ...] = (1, 2, 3)
    num_responses_weights: tuple[float, ...] = (0.12, 0.63, 0.25)
    num_requirements: tuple[int, ...] = (3, 4)
    num_requirements_weights: tuple[float, ...] = (0.5, 0.5)
    alike: float = 0.3
    lure: float = 0.0
    graded: bool = False
    kinds: tuple[str, ...] = ()


def generate(config: BuiltinConfig, seed: int) -> tuple[list[Item], list[Item]]:
    """Training and held-out items; the same config and seed give the same items. Raises ConfigError."""
    for name, most in (("num_responses", None), ("num_requirements", len(PARTS))):
        values, weights = getattr(config, name), getattr(config, f"{name}_weights")
        if len(values) != len(weights) or not sum(weights) > 0 or min((*values, *weights)) < 0 or 0 in values:
            raise ConfigError(
                f"builtin.{name} {values} needs one weight per value, none below 0 and not all 0, not {weights}"
            )
        if most and max(values) > most:
            raise ConfigError(f"builtin.{name} {values}: a response has {most} parts, so that is the most")
    if config.graded and max(config.num_responses) > 1 + min(config.num_requirements):
        n, most = max(config.num_responses), min(config.num_requirements)
        raise ConfigError(f"builtin.graded: {n} responses need {n - 1} requirements, but num_requirements is {most}")
    return _generate("train", config.size_train, config, seed), _generate("heldout", config.size_heldout, config, seed)


def requirements_of(item: Item) -> list[Kind]:
    """The requirements of a built-in item, from its facts. Raises DataError for an item of another source."""
    if item.source != SOURCE:
        raise DataError(f"item {item.id} is from {item.source!r}: only items of the built-in set carry requirements")
    return [kind_named(name) for name in json.loads(item.facts)]


def query(requirements: Sequence[Kind], name: str) -> str:
    """The user's message."""
    return f"Write for {name}: {', '.join(kind.name for kind in requirements)}."


def random_sentence(split: Split, rng: Random, taken: Collection[str] = (), outside: tuple[str, ...] = ()) -> Sentence:
    """A sentence of random kinds, also of those at the import paths `outside`."""
    sentence: Sentence = {}
    for part in PARTS:
        rng.choice(kinds_of(part, outside)).write(sentence, split, rng, taken)
    return sentence


def is_heldout_combination(parts: Sequence[str]) -> bool:
    """Whether queries about these parts are held out: a fifth of the combinations of three and of four parts."""
    return len(parts) in (3, 4) and sorted(parts) in [sorted(c) for c in combinations(PARTS, len(parts))][2::5]


def _generate(split: Split, size: int, config: BuiltinConfig, seed: int) -> list[Item]:
    rng = Random(f"{seed}/{SOURCE}/{split}")
    decks: dict[int, list[int]] = defaultdict(list)
    return [_item(f"{SOURCE}-{split}-{number:06d}", split, config, decks, rng) for number in range(size)]


def _draw_requirements(split: Split, number: int, rng: Random, outside: tuple[str, ...]) -> list[Kind]:
    while True:
        parts = rng.sample(PARTS, number)
        if number not in (3, 4) or is_heldout_combination(parts) == (split == "heldout"):
            return [rng.choice(kinds_of(part, outside)) for part in parts]


def _item(item_id: str, split: Split, config: BuiltinConfig, decks: dict[int, list[int]], rng: Random) -> Item:
    """`decks[n]` holds the positions of the best of n responses still to be dealt, so that all are equally likely. For
    n = 1, 0 stands for a right response and 1 for a wrong one."""
    n = rng.choices(config.num_responses, config.num_responses_weights)[0]
    num_requirements = rng.choices(config.num_requirements, config.num_requirements_weights)[0]
    decks[n] = decks[n] or rng.sample(range(max(n, 2)), max(n, 2))
    requirements, best = _draw_requirements(split, num_requirements, rng, config.kinds), decks[n].pop()
    if n == 1:
        broken = [[] if best == 0 else rng.sample(requirements, min(2, len(requirements)))]
    else:
        numbers = range(1, n) if config.graded else [1] * (n - 1)
        broken = [rng.sample(requirements, number) for number in numbers]
        rng.shuffle(broken)
        broken.insert(best, [])
    common = [rng.choice(kinds_of(part, config.kinds)) for part in PARTS]
    taken: set[str] = set()  # no two responses share a word, so that a quote identifies its response
    responses: list[str] = []
    for wrong in broken:
        sentence = random_sentence(split, rng, taken, config.kinds)
        for kind in (kind for kind in common if rng.random() < config.alike):
            kind.write(sentence, split, rng, taken)
        for kind in (KINDS[name] for name in FAVOURITES if config.lure and n > 1):
            is_lured = rng.random() < 0.5 + (config.lure if wrong else -config.lure) / 2
            (kind if is_lured else kind.opposite).write(sentence, split, rng, taken)
        for kind in requirements:
            (kind.opposite if kind in wrong else kind).write(sentence, split, rng, taken)
        taken |= set(sentence.values())
        responses.append(render(sentence))
    graded = config.graded and n > 1
    return Item(
        id=item_id,
        messages=(Message("user", query(requirements, rng.choice(NAMES[split]))),),
        responses=tuple(responses),
        rewards=tuple(1 - len(wrong) / len(requirements) if graded else float(not wrong) for wrong in broken),
        source=SOURCE,
        subset=f"{n} response{'s' * (n > 1)}",
        facts=json.dumps([kind.path or kind.name for kind in requirements]),
    )
