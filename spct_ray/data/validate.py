"""Validates single items: each problem has a name, so that reports can count what was dropped and why.

Problems across items (duplicates, contamination) are found elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import get_args

from spct_ray.records import Item, Role


class Problem(StrEnum):
    """Why an item was dropped. The last four are found across items, by `sources` and the items stage."""

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
    return (
        _conversation_problem(item) or _response_problem(item) or _reward_problem(item) or _size_problem(item, limits)
    )


def _conversation_problem(item: Item) -> Problem | None:
    try:  # JSON can hold lone surrogates, which Parquet and tokenizers refuse
        texts = (item.id, item.reference, item.subset, item.strength, item.facts, item.principles)
        "".join([*texts, *(m.content for m in item.messages), *item.responses]).encode()
    except UnicodeEncodeError:
        return Problem.INVALID_UNICODE
    if any(message.role not in get_args(Role) for message in item.messages):
        return Problem.UNKNOWN_ROLE
    if not item.messages or item.messages[-1].role != "user":
        return Problem.LAST_MESSAGE_NOT_USER
    return Problem.EMPTY_MESSAGE if any(not message.content.strip() for message in item.messages) else None


def _response_problem(item: Item) -> Problem | None:
    if not item.responses:
        return Problem.NO_RESPONSES
    stripped = [response.strip() for response in item.responses]
    if not all(stripped):
        return Problem.EMPTY_RESPONSE
    return Problem.DUPLICATE_RESPONSES if len(set(stripped)) < len(stripped) else None


def _reward_problem(item: Item) -> Problem | None:
    if len(item.rewards) != len(item.responses):
        return Problem.REWARD_COUNT
    if not all(math.isfinite(reward) for reward in item.rewards):
        return Problem.REWARD_NOT_FINITE
    if len(item.rewards) == 1:
        return None if item.rewards[0] in (0, 1) else Problem.REWARD_NOT_BINARY
    return Problem.NO_UNIQUE_BEST if item.rewards.count(max(item.rewards)) > 1 else None


def _size_problem(item: Item, limits: Limits) -> Problem | None:
    query, responses = sum(len(m.content) for m in item.messages), [len(response) for response in item.responses]
    if len(responses) > limits.max_responses:
        return Problem.TOO_MANY_RESPONSES
    too_long = query > limits.max_query_chars or max(responses) > limits.max_response_chars
    total = query + sum(responses) + len(item.reference) + len(item.principles)
    return Problem.TOO_LONG if too_long or total > limits.max_item_chars else None
