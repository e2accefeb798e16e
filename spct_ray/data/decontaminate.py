"""Training queries that overlap a benchmark or the held-out set are found by shared word n-grams, and dropped.

Only user turns are compared: the same answer to different questions is no leak. Paraphrases are not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spct_ray.data.split import query_text
from spct_ray.records import Item


@dataclass(frozen=True)
class Overlap:
    """A training item, the protected item that it overlaps, and the words that they share."""

    item: Item
    protected: Item
    words: str


def decontaminate(train: Sequence[Item], protected: Sequence[Item], n: int = 13) -> tuple[list[Item], list[Overlap]]:
    """(items without overlap, overlaps). Two queries overlap when they share `n` words in a row in one user turn; a
    user turn shorter than that overlaps only an equal whole query."""
    owners: dict[tuple[str, ...], Item] = {}
    for item in protected:
        for gram in _grams(item, n):
            owners.setdefault(gram, item)
    clean: list[Item] = []
    overlaps: list[Overlap] = []
    for item in train:
        shared = next((gram for gram in _grams(item, n) if gram in owners), None)
        if shared is None:
            clean.append(item)
        else:
            overlaps.append(Overlap(item, owners[shared], " ".join(shared)))
    return clean, overlaps


def _grams(item: Item, n: int) -> Iterator[tuple[str, ...]]:
    """All n-grams of the user turns. A query whose turns are all shorter gives its whole text, of any length."""
    turns = [tuple(re.findall(r"\w+", m.content.lower())) for m in item.messages if m.role == "user"]
    if all(len(words) < n for words in turns):
        yield tuple(word for words in turns for word in words) or (query_text(item),)
    for words in turns:
        for start in range(len(words) - n + 1):
            yield words[start : start + n]
