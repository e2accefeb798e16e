"""From the text of a judgement to its scores, or to the name of what is wrong with it. Never to a default score."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from spct_ray.records import StopReason


class Failure(StrEnum):
    """Why a judgement gives no scores."""

    NO_BOX = "no_box"  # ended without a complete \boxed{...}
    TRUNCATED = "truncated"  # hit the token limit before the box was complete
    ABORTED = "aborted"  # the engine refused the request (prompt too long) or gave it up
    NOT_INTEGER = "not_integer"
    WRONG_COUNT = "wrong_count"
    OUT_OF_RANGE = "out_of_range"


@dataclass(frozen=True, slots=True)
class Scale:
    """Inclusive range of the integer scores: 1..10, or 0..1 for a single response (paper, Section 4.1)."""

    low: int
    high: int


_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")


def parse_scores(
    text: str, num_responses: int, scale: Scale, stop_reason: StopReason = "stop"
) -> tuple[int, ...] | Failure:
    """Scores in the order of the prompt, from the LAST `\\boxed{...}` of `text`: exactly `num_responses` integers.

    Anything else is a Failure: a last box that is not closed hides an earlier one, for the judge meant to go on.
    """
    if stop_reason == "abort":
        return Failure.ABORTED
    start = text.rfind("\\boxed{")
    end = text.find("}", start)
    if start < 0 or end < 0:
        return Failure.TRUNCATED if stop_reason == "length" else Failure.NO_BOX
    parts = [part.strip() for part in text[start + len("\\boxed{") : end].split(",")]
    if not all(_INTEGER.fullmatch(part) for part in parts):
        return Failure.NOT_INTEGER
    scores = tuple(int(part) for part in parts)
    if len(scores) != num_responses:
        return Failure.WRONG_COUNT
    if not all(scale.low <= s <= scale.high for s in scores):
        return Failure.OUT_OF_RANGE
    return scores


def parse_principles(text: str, stop_reason: StopReason = "stop") -> str:
    """The criteria of a text in the judge's format, from "Specific Criteria:" to "Analysis:" or the end.

    Empty when there are none. A last line that hit the token limit is left out.
    """
    criteria, has_end, _ = text.partition("Specific Criteria:")[2].partition("Analysis:")
    if not has_end and stop_reason == "length":
        criteria = criteria.rpartition("\n")[0]
    return criteria.strip()
