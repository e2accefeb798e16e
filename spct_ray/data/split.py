"""Held-out split by query: items that share a query, whatever their source, land on the same side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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
