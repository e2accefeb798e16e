"""Keeps training items apart from what judges are measured on: a held-out split by query, and decontamination.

Items that share a query, whatever their source, land on the same side of the split. Training queries that share a word
n-gram with a benchmark or the held-out set are dropped. Only user turns are compared, because the same answer to
different questions is no leak; paraphrases are not detected.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from spct_ray.records import Item


def query_text(item: Item) -> str:
    """What the user asked: all user turns, in lower case with single spaces, so that layout makes no difference."""
    return " ".join(" ".join(m.content for m in item.messages if m.role == "user").lower().split())


def split_heldout(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(train, held-out): about `share` of the queries are held out, chosen by a hash of seed and query alone, so that
    more data or another order never moves an item to the other side. Held-out items come in the order of the hash:
    the first ones are a fair sample of all sources."""
    places = [_fraction(item, seed) for item in items]
    train = [item for item, place in zip(items, places, strict=True) if place >= share]
    heldout = [(place, item) for item, place in zip(items, places, strict=True) if place < share]
    return train, [item for _, item in sorted(heldout, key=lambda pair: pair[0])]


def _fraction(item: Item, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\n{query_text(item)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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
