"""Checkable constraints: what a query can ask for, a checker that decides, and the evidence a judge would cite.

A constraint is a kind and a value, e.g. Constraint("first_word", "perhaps"). Everything here reads text; writing texts
that meet or just fail a constraint is `spct_ray.data.drafts`. Counts are small and evidence is a short verbatim piece
of the response, so that a small student can learn to copy it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spct_ray.data.words import KEYS_OF, MARKS_OF, NOUNS_OF, NUMBERS_OF, OPENERS_OF, Split
from spct_ray.errors import DataError

Value = str | int
Values = Mapping[Split, tuple[Value, ...]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of constraint. `slots` are the parts of a text that it decides: two kinds fit together when their
    slots do not meet. In `wordings` and `criterion` the value stands as {value}."""

    wordings: tuple[str, ...]
    criterion: str
    slots: frozenset[str]
    values: Values
    check: Callable[[str, Value], bool]
    evidence: Callable[[str, Value], str]


@dataclass(frozen=True, slots=True)
class Constraint:
    """One constraint of one query, e.g. Constraint("num_words", 9) or Constraint("lowercase", "")."""

    kind: str
    value: Value = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"unknown constraint kind {self.kind!r}; known are {', '.join(KINDS)}")

    @property
    def instructions(self) -> tuple[str, ...]:
        """The sentences that can ask for it in a query, alike in meaning."""
        return tuple(wording.format(value=self.value) for wording in KINDS[self.kind].wordings)

    @property
    def criterion(self) -> str:
        """The same in a few words, e.g. 'first word "perhaps"', as a judge would name it."""
        return KINDS[self.kind].criterion.format(value=self.value)

    def check(self, text: str) -> bool:
        """Whether the response meets the constraint."""
        return KINDS[self.kind].check(text, self.value)

    def evidence(self, text: str) -> str:
        """What in the response decides it: one line, a few words, quoted from the response."""
        return KINDS[self.kind].evidence(text, self.value)


def words_of(text: str) -> list[str]:
    """Words without punctuation, as they are written."""
    return re.findall(r"[^\W_]+", text)


def _lower_words(text: str) -> list[str]:
    return words_of(text.lower())


def _tokens(text: str) -> list[str]:
    return text.split() or ["nothing"]


def _find(text: str, value: Value) -> str:
    """The word with the word before it, or that it is absent."""
    words, lower = words_of(text), _lower_words(text)
    if value not in lower:
        return f'no "{value}"'
    place = lower.index(str(value))
    return f'"{" ".join(words[max(0, place - 1) : place + 1])}"'


def _first_with(text: str, wanted: Callable[[str], bool], name: str) -> str:
    return next((f"{name} {character}" for character in text if wanted(character)), f"no {name}")


def _is_digit(character: str) -> bool:
    return character in "0123456789"


def _start_marks(text: str) -> str:
    found = re.match(r"[^\w\s]+", text)
    return found.group() if found else "a word"


def _end_marks(text: str) -> str:
    found = re.search(r"[^\w\s]+$", text)
    return found.group() if found else "a word"


def _end_number(text: str) -> str:
    found = re.search(r"(?<!\d)\d+$", text)
    return found.group() if found else "no number"


def _ends(text: str) -> str:
    tokens = _tokens(text)
    return f"from {tokens[0]} to {tokens[-1]}"


def _sentence_ends(text: str) -> list[str]:
    return re.findall(r"[^\s\"]*[.!?](?=[\s\"]|$)", text)


def _items(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _list_evidence(text: str, _: Value) -> str:
    lines = [line.split() for line in _items(text)]
    return f"{', '.join(f'{line[0]} {line[-1]}' for line in lines)}: {len(lines)}"


def _is_bullets(text: str, value: Value) -> bool:
    lines = _items(text)
    return len(lines) == value and all(line.startswith("- ") for line in lines)


def _is_numbered(text: str, value: Value) -> bool:
    lines = _items(text)
    return len(lines) == value and all(line.startswith(f"{i}. ") for i, line in enumerate(lines, 1))


def _is_json(text: str, value: Value) -> bool:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and value in parsed


def _is_quoted(text: str, _: Value) -> bool:
    return len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]


def _word_at(place: int, name: str) -> tuple[Callable[[str, Value], bool], Callable[[str, Value], str]]:
    def check(text: str, value: Value) -> bool:
        return _lower_words(text)[place : place + 1 or None] == [str(value).lower()]

    def evidence(text: str, _: Value) -> str:
        return f'{name} "{(words_of(text) or [""])[place]}"'

    return check, evidence


_first_check, _first_evidence = _word_at(0, "first")
_last_check, _last_evidence = _word_at(-1, "last")


def _slots(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _counts(train: tuple[int, ...], heldout: tuple[int, ...]) -> Values:
    return {"train": train, "heldout": heldout}


_NONE: Values = {"train": ("",), "heldout": ("",)}

# In the order in which `drafts` writes them into a text: layout, then counts, then words, then looks.
KINDS: dict[str, Kind] = {
    "bullets": Kind(
        ("Give a list of exactly {value} items, each starting with a dash.", 'Use {value} lines that start with "- ".'),
        "{value} dash items",
        _slots("start end count digits"),
        _counts((2, 4), (3,)),
        _is_bullets,
        _list_evidence,
    ),
    "numbered": Kind(
        ("Give a numbered list of exactly {value} items.", "Number {value} items as 1. and so on."),
        "{value} numbered items",
        _slots("start end count digits"),
        _counts((3, 4), (2,)),
        _is_numbered,
        _list_evidence,
    ),
    "json_key": Kind(
        ('Answer with a JSON object that has the key "{value}".', 'Use JSON with the key "{value}".'),
        'JSON key "{value}"',
        _slots("start end count case last"),
        KEYS_OF,
        _is_json,
        lambda text, _: _ends(text),
    ),
    "num_sentences": Kind(
        ("The number of sentences must be {value}.", "Number of sentences: {value}."),
        "{value} sentences",
        _slots("count"),
        _counts((1, 3), (2,)),
        lambda text, value: len(_sentence_ends(text)) == value,
        lambda text, _: f"{' '.join(_sentence_ends(text))}: {len(_sentence_ends(text))}",
    ),
    "num_words": Kind(
        ("Use exactly {value} words.", "The answer must have {value} words."),
        "{value} words",
        _slots("count digits title"),
        _counts((9, 10, 12), (11,)),
        lambda text, value: len(text.split()) == value,
        lambda text, _: f"{len(text.split())} words",
    ),
    "include": Kind(
        ('Use the word "{value}".', 'Mention the word "{value}".'),
        'with "{value}"',
        _slots("word"),
        NOUNS_OF,
        lambda text, value: value in _lower_words(text),
        _find,
    ),
    "exclude": Kind(
        ('Do not use the word "{value}".', 'Avoid the word "{value}".'),
        'without "{value}"',
        _slots("word"),
        NOUNS_OF,
        lambda text, value: value not in _lower_words(text),
        _find,
    ),
    "first_word": Kind(
        ('Begin with the word "{value}".', 'The first word must be "{value}".'),
        'first word "{value}"',
        _slots("start opener"),
        {split: tuple(word.capitalize() for word in words) for split, words in OPENERS_OF.items()},
        _first_check,
        _first_evidence,
    ),
    "last_word": Kind(
        ('The last word must be "{value}".', 'Finish with the word "{value}".'),
        'last word "{value}"',
        _slots("last"),
        NOUNS_OF,
        _last_check,
        _last_evidence,
    ),
    "no_commas": Kind(
        ("Do not use any commas.", "Write without commas."),
        "no commas",
        _slots("comma"),
        _NONE,
        lambda text, _: "," not in text,
        lambda text, _: _first_with(text, lambda c: c == ",", "comma"),
    ),
    "number": Kind(
        ("Include a number written in digits.", "Use at least one number in digits."),
        "a number in digits",
        _slots("digits"),
        _NONE,
        lambda text, _: any(map(_is_digit, text)),
        lambda text, _: _first_with(text, _is_digit, "digit"),
    ),
    "end_mark": Kind(
        ("The answer must end in {value}", "End the whole answer with {value}"),
        "ends with {value}",
        _slots("end"),
        MARKS_OF,
        lambda text, value: _end_marks(text) == value,
        lambda text, _: f"ends in {_end_marks(text)}",
    ),
    "end_number": Kind(
        ("The answer must end with the number {value}", "End the whole answer with {value}"),
        "ends with {value}",
        _slots("end digits last count"),
        NUMBERS_OF,
        lambda text, value: _end_number(text) == str(value),
        lambda text, _: f"ends with {_end_number(text)}",
    ),
    "title": Kind(
        ("Start with a title in double angle brackets, as in <<title>>.", "Put a <<title>> first."),
        "title in << >>",
        _slots("start title"),
        _NONE,
        lambda text, _: re.match(r"<<[^<>\n]+>>\s+\S", text) is not None,
        lambda text, _: f"starts with {_start_marks(text)}",
    ),
    "quotes": Kind(
        ("Wrap the whole answer in double quotes.", "Put double quotes around your whole answer."),
        "in double quotes",
        _slots("start end"),
        _NONE,
        _is_quoted,
        lambda text, _: f"from {_start_marks(text)} to {_end_marks(text)}",
    ),
    "lowercase": Kind(
        ("Use only lower case letters.", "Do not use capital letters."),
        "all lower case",
        _slots("case"),
        _NONE,
        lambda text, _: text == text.lower(),
        lambda text, _: _first_with(text, lambda c: c != c.lower(), "capital"),
    ),
    "uppercase": Kind(
        ("Use only capital letters.", "Write everything in upper case."),
        "all upper case",
        _slots("case word last opener"),  # a word asked for in lower case does not stand in capitals
        _NONE,
        lambda text, _: text == text.upper(),
        lambda text, _: _first_with(text, lambda c: c != c.upper(), "small letter"),
    ),
}


def fits(kind: str, taken: frozenset[str]) -> bool:
    """Whether a text that already has its `taken` slots decided can also be asked for this kind."""
    return not KINDS[kind].slots & taken
