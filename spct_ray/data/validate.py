"""What is kept and what is dropped: problems of single items by name, the held-out split, and decontamination.

Items that share a query, whatever their source, land on the same side of the split. Training queries that share a word
n-gram with a benchmark or the held-out set are dropped. Only user turns are compared, because the same answer to
different questions is no leak; paraphrases are not detected.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, get_args

from spct_ray.records import Item, Role


class Problem(StrEnum):
    """Why an item was dropped. The last four are problems across items, found by `sources` and the items stage."""

    INVALID_UNICODE = "invalid_unicode"
    UNKNOWN_ROLE = "unknown_role"
    LAST_MESSAGE_NOT_USER = "last_message_not_user"
    EMPTY_MESSAGE = "empty_message"
    NO_RESPONSES = "no_responses"
    EMPTY_RESPONSE = "empty_response"
    DUPLICATE_RESPONSES = "duplicate_responses"
    REWARD_COUNT = "reward_count_mismatch"
    REWARD_NOT_FINITE = "reward_not_finite"
    NO_UNIQUE_BEST = "no_unique_best"
    REWARD_NOT_BINARY = "single_reward_not_0_or_1"
    TOO_MANY_RESPONSES = "too_many_responses"
    TOO_LONG = "too_long"
    PROMPTS_DIFFER = "prompts_differ"
    DUPLICATE_ID = "duplicate_id"
    CONTAMINATED = "contaminated"
    OVER_HELDOUT_SIZE = "over_heldout_size"


@dataclass(frozen=True)
class Limits:
    """Lengths in characters; an item's length includes query, responses, reference and principles."""

    max_query_chars: int = 20_000
    max_response_chars: int = 10_000
    max_item_chars: int = 40_000
    max_responses: int = 16


def find_problem(item: Item, limits: Limits) -> Problem | None:
    """The first problem of the item, or None. For n >= 2 exactly one reward must be the highest (Eq. 10); for n = 1 the
    reward must be 0 or 1."""
    return next(_problems(item, limits), None)


def _problems(item: Item, limits: Limits) -> Iterator[Problem]:
    """Problems in the order of the enum; what follows a problem assumes that the item does not have it."""
    query = [message.content for message in item.messages]
    responses, rewards = item.responses, item.rewards
    try:  # JSON can hold lone surrogates, which Parquet and tokenizers refuse
        texts = (item.id, item.reference, item.subset, item.strength, item.facts, item.principles)
        "".join([*texts, *query, *responses]).encode()
    except UnicodeEncodeError:
        yield Problem.INVALID_UNICODE
    if any(message.role not in get_args(Role) for message in item.messages):
        yield Problem.UNKNOWN_ROLE
    if not item.messages or item.messages[-1].role != "user":
        yield Problem.LAST_MESSAGE_NOT_USER
    if not all(map(str.strip, query)):
        yield Problem.EMPTY_MESSAGE
    if not responses:
        yield Problem.NO_RESPONSES
    if not all(map(str.strip, responses)):
        yield Problem.EMPTY_RESPONSE
    if len(set(map(str.strip, responses))) < len(responses):
        yield Problem.DUPLICATE_RESPONSES
    if len(rewards) != len(responses):
        yield Problem.REWARD_COUNT
    if not all(map(math.isfinite, rewards)):
        yield Problem.REWARD_NOT_FINITE
    if len(rewards) > 1 and rewards.count(max(rewards)) > 1:
        yield Problem.NO_UNIQUE_BEST
    if len(rewards) == 1 and rewards[0] not in (0, 1):
        yield Problem.REWARD_NOT_BINARY
    if len(responses) > limits.max_responses:
        yield Problem.TOO_MANY_RESPONSES
    of_query, of_responses = sum(map(len, query)), list(map(len, responses))
    total = of_query + sum(of_responses) + len(item.reference) + len(item.principles)
    if (
        of_query > limits.max_query_chars
        or max(of_responses) > limits.max_response_chars
        or total > limits.max_item_chars
    ):
        yield Problem.TOO_LONG


def query_text(item: Item) -> str:
    """What the user asked: all user turns, in lower case with single spaces, so that layout makes no difference."""
    return " ".join(" ".join(m.content for m in item.messages if m.role == "user").lower().split())


def split_heldout(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(train, held-out): about `share` of the queries are held out, chosen by a hash of seed and query alone, so that
    more data or another order never moves an item to the other side. Held-out items come in the order of the hash:
    the first ones are a fair sample of all sources."""

    def place(item: Item) -> float:
        digest = hashlib.sha256(f"{seed}\n{query_text(item)}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    placed = [(place(item), item) for item in items]
    heldout = sorted((pair for pair in placed if pair[0] < share), key=lambda pair: pair[0])
    return [item for at, item in placed if at >= share], [item for _, item in heldout]


class Overlap(NamedTuple):
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
