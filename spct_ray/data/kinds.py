"""What a query of the built-in set can ask for: ten kinds, each of which a program can ask, check, write and quote.

A response is one sentence, five parts of which are of one of two kinds each; the place is free:

    The {number} {look} {who} {verb} near the {place}{mark}
    The 4 red foxes waited near the lake!

Everything here is about one response; queries and judgements are `data.builtin` and `data.program`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Literal

from spct_ray.errors import DataError

Split = Literal["train", "heldout"]
Sentence = dict[str, str]  # the word of each part

PARTS = ("number", "look", "who", "verb", "mark")
NUM_HELD_WORDS = 2  # of each kind that has eight words: no training item has them


@dataclass(frozen=True, slots=True)
class Kind:
    """`name` is how a query asks for it and a judgement states it; `part` is what it decides; `words` meet it."""

    name: str
    part: str
    words: tuple[str, ...]

    def write(self, sentence: Sentence, split: Split, rng: Random) -> None:
        """Make the sentence meet it. Training items have no held-out words."""
        sentence[self.part] = rng.choice(self.words if split == "heldout" else self.train_words)

    def evidence(self, text: str) -> str:
        """The word of the response that decides it, "nothing" where its part is missing."""
        return next((word for word in words_of(text) if word in _PART_WORDS[self.part]), "nothing")

    def check(self, text: str) -> bool:
        """Whether the response meets it."""
        return self.evidence(text) in self.words

    @property
    def train_words(self) -> tuple[str, ...]:
        """The words that training items have."""
        return self.words if len(self.words) == 1 else self.words[:-NUM_HELD_WORDS]

    @property
    def opposite(self) -> Kind:
        """The other kind of the same part: a sentence is of one of the two."""
        return next(kind for kind in KINDS.values() if kind.part == self.part and kind is not self)


def _kinds(*rows: tuple[str, str, str]) -> dict[str, Kind]:
    return {name: Kind(name, part, tuple(words.split())) for part, name, words in rows}


KINDS = _kinds(
    ("number", "a number in digits", "2 3 4 5 6 7 8 9"),
    ("number", "a number in letters", "two three four five six seven eight nine"),
    ("look", "a colour", "red blue green black white grey pink brown"),
    ("look", "a size", "tiny small big huge tall short giant wide"),
    ("who", "animals", "foxes cats dogs owls bears horses ducks goats"),
    ("who", "tools", "saws axes drills hammers shovels rakes ladders brushes"),
    ("verb", "the past", "waited stood hid fell stayed slept sat lay"),
    ("verb", "the present", "wait stand hide fall stay sleep sit lie"),
    ("mark", "an exclamation mark", "!"),
    ("mark", "a question mark", "?"),
)
_PART_WORDS = {part: {w for k in KINDS.values() if k.part == part for w in k.words} for part in PARTS}
_WORDS = """lake bridge castle river harbor garden tower market forest island station museum bakery theatre church hotel
    school library stadium bank farm mill port zoo beach cave desert field hill meadow"""
_PLACES = tuple(_WORDS.split())
PLACES: dict[Split, tuple[str, ...]] = {
    "train": tuple(place for i, place in enumerate(_PLACES) if i % 4 != 3),
    "heldout": _PLACES[3::4],
}


def render(sentence: Sentence, place: str) -> str:
    """The sentence as text."""
    words = " ".join(sentence[part] for part in PARTS[:-1])
    return f"The {words} near the {place}{sentence['mark']}"


def words_of(text: str) -> list[str]:
    """Words, and marks of punctuation for themselves."""
    return re.findall(r"\w+|[^\w\s]", text)


def kind_named(name: str) -> Kind:
    """Raises DataError for a name that is none."""
    if name not in KINDS:
        raise DataError(f"unknown kind {name!r}; known are {', '.join(KINDS)}")
    return KINDS[name]
