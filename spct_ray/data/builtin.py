"""The built-in verifiable set: queries with several checkable requirements, and responses that a program can check.

    Write for Anna: animals, a number in digits, an exclamation mark.

A response is a sentence of six parts, each of one of two kinds, or of one added by its import path:

    The {number} {look} {who} {manner} {verb}{mark}
    The 4 red foxes often waited!

The best response meets all requirements, every other one breaks exactly one. For n = 1 the response is right half of
the time, and a wrong one breaks two. A judgement that checks only some requirements may find no difference, and votes
combine what different judgements checked. Held out are names, a few words of each kind, and a fifth of the combinations
of parts that a query asks about. The set needs no download, and has nothing that a program cannot check.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from random import Random
from typing import Literal

from spct_ray.config import imported
from spct_ray.errors import ConfigError, DataError
from spct_ray.records import Item, Message

Split = Literal["train", "heldout"]
Sentence = dict[str, str]  # the word of each part

SOURCE = "builtin"
PARTS = ("number", "look", "who", "manner", "verb", "mark")
NUM_HELD_WORDS = 2  # of each kind with eight words, in no training item
ALIKE = 0.3  # probability that the responses of an item agree in a part that is not asked for


@dataclass(frozen=True, slots=True)
class Kind:
    """`name` is what queries and judgements call it; it decides one `part` of the sentence, and `words` meet it. `path`
    is the import path of a kind from outside the package."""

    part: str
    name: str
    words: tuple[str, ...]
    path: str = ""

    def write(self, sentence: Sentence, split: Split, rng: Random, taken: Collection[str] = ()) -> None:
        """Make the sentence meet it, with a word that is not `taken` if possible and, for training, not held out."""
        words = self.words if split == "heldout" else self.train_words
        sentence[self.part] = rng.choice([word for word in words if word not in taken] or words)

    def evidence(self, text: str) -> str:
        """The word of the response that decides it, "" where its part is missing."""
        return sentence_of(text).get(self.part, "")

    def check(self, text: str) -> bool:
        """Whether the response meets it."""
        return self.evidence(text) in self.words

    @property
    def train_words(self) -> tuple[str, ...]:
        """The words that training items have."""
        return self.words if len(self.words) == 1 else self.words[:-NUM_HELD_WORDS]

    @property
    def opposite(self) -> Kind:
        """Another kind of the same part, whose words break this one."""
        return next(kind for kind in kinds_of(self.part) if kind is not self)


_ROWS = (
    ("number", "a number in digits", "2 3 4 5 6 7 8 9"),
    ("number", "a number in letters", "two three four five six seven eight nine"),
    ("look", "a colour", "red blue green black white grey pink brown"),
    ("look", "a size", "tiny small big huge tall short giant wide"),
    ("who", "animals", "foxes cats dogs owls bears horses ducks goats"),
    ("who", "tools", "saws axes drills hammers shovels rakes ladders brushes"),
    ("manner", "a time", "often once sometimes always again daily lately nightly"),
    ("manner", "a feeling", "sadly gladly proudly calmly angrily eagerly happily bravely"),
    ("verb", "the past", "waited stood hid fell stayed slept sat lay"),
    ("verb", "the present", "wait stand hide fall stay sleep sit lie"),
    ("mark", "an exclamation mark", "!"),
    ("mark", "a question mark", "?"),
)
KINDS = {name: Kind(part, name, tuple(words.split())) for part, name, words in _ROWS}
_NAMES = """Anna Ben Clara David Emma Felix Greta Henry Ida Jonas Karla Leo Maria Nils Olga Paul Rosa Simon Tina Urs
    Vera Walter Xenia Yuri Zoe Arthur Bella Carlo Diana Emil"""
NAMES: dict[Split, tuple[str, ...]] = {
    "train": tuple(name for i, name in enumerate(_NAMES.split()) if i % 4 != 3),
    "heldout": tuple(_NAMES.split()[3::4]),
}


def kinds_of(part: str, outside: tuple[str, ...] = ()) -> list[Kind]:
    """The two kinds of a part, and those of the import paths `outside` that are of this part."""
    return [kind for kind in (*KINDS.values(), *kinds_at(outside)) if kind.part == part]


@lru_cache
def kinds_at(paths: tuple[str, ...]) -> tuple[Kind, ...]:
    """The kinds at import paths `module:NAME`. Raises ConfigError for one that is no kind, and where words are not
    single, too few to hold some out, or of another kind as well: a text would then not show what it meets."""
    found, words = list[Kind](), {word for kind in KINDS.values() for word in kind.words}
    for path in paths:
        kind = imported(path, "builtin.kinds")
        if not isinstance(kind, Kind) or kind.part not in PARTS or kind.name in KINDS:
            raise ConfigError(f"builtin.kinds: {path} must be a Kind with a new name and a part of {', '.join(PARTS)}")
        problems = [word for word in kind.words if word in words or words_of(word) != [word]]
        if problems or len(kind.words) <= NUM_HELD_WORDS:
            raise ConfigError(
                f"builtin.kinds: {path} needs more than {NUM_HELD_WORDS} single words that no other kind has; "
                f"it has {len(kind.words)}, taken or not single are {problems}"
            )
        words |= set(kind.words)
        found.append(replace(kind, path=path))
    return tuple(found)


def kind_named(name: str) -> Kind:
    """The kind of that name or import path. Raises DataError for a name that is none, ConfigError for such a path."""
    if ":" in name:
        return kinds_at((name,))[0]
    if name not in KINDS:
        raise DataError(f"unknown kind {name!r}; known are {', '.join(KINDS)}")
    return KINDS[name]


def render(sentence: Sentence) -> str:
    """The sentence as text."""
    return f"The {' '.join(sentence[part] for part in PARTS[:-1])}{sentence['mark']}"


def words_of(text: str) -> list[str]:
    """Words and punctuation marks of a text."""
    return re.findall(r"\w+|[^\w\s]", text)


def sentence_of(text: str) -> Sentence:
    """The inverse of `render`; empty for a text that is no such sentence."""
    first, *words = words_of(text) or [""]
    return dict(zip(PARTS, words, strict=True)) if first == "The" and len(words) == len(PARTS) else {}


@dataclass(frozen=True)
class BuiltinConfig:
    """Sizes and mix. Weights need not sum to 1.

    With `graded` the wrong responses of an item break 1, 2, ... of its requirements, and each reward is the share that
    the response meets, so that all n are ranked. `kinds` are import paths `module:NAME` of further kinds.
    """

    size_train: int = 4000
    size_heldout: int = 500
    num_responses: tuple[int, ...] = (1, 2, 3)
    num_responses_weights: tuple[float, ...] = (0.12, 0.63, 0.25)
    num_requirements: tuple[int, ...] = (3, 4)
    num_requirements_weights: tuple[float, ...] = (0.5, 0.5)
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
        for kind in (kind for kind in common if rng.random() < ALIKE):
            kind.write(sentence, split, rng, taken)
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
