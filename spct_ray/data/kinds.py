"""The requirements of the built-in set: twelve kinds, each of which a program can ask for, check, write and quote.

A response is a sentence of six parts, each of one of two kinds, or of one added by its import path:

    The {number} {look} {who} {manner} {verb}{mark}
    The 4 red foxes often waited!

Everything here is about one response; queries are in `data.builtin`, judgements in `data.program`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Literal

from spct_ray.config import imported
from spct_ray.errors import ConfigError, DataError

Split = Literal["train", "heldout"]
Sentence = dict[str, str]  # the word of each part

PARTS = ("number", "look", "who", "manner", "verb", "mark")
NUM_HELD_WORDS = 2  # of each kind with eight words, in no training item


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


def _kinds(*rows: tuple[str, str, str]) -> dict[str, Kind]:
    return {name: Kind(part, name, tuple(words.split())) for part, name, words in rows}


KINDS = _kinds(
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
    """Words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text)


def sentence_of(text: str) -> Sentence:
    """The inverse of `render`; empty for a text that is no such sentence."""
    first, *words = words_of(text) or [""]
    return dict(zip(PARTS, words, strict=True)) if first == "The" and len(words) == len(PARTS) else {}
