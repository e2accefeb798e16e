"""Parses a judgement into its scores or a named failure, never into a default score.

A thinking model's leading `<think>...</think>` is not part of the judgement.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from spct_ray.records import StopReason


class Failure(StrEnum):
    """Why a judgement gives no scores."""

    NO_BOX = "no_box"  # no complete \boxed{...} at the end
    TRUNCATED = "truncated"  # hit the token limit before the box was complete
    TOO_LONG = "too_long"  # the prompt does not fit the engine's context
    ABORTED = "aborted"  # the engine refused or aborted the request
    NOT_INTEGER = "not_integer"
    WRONG_COUNT = "wrong_count"
    OUT_OF_RANGE = "out_of_range"
    NOT_A_VERDICT = "not_a_verdict"  # neither 1 nor 2 nor tie
    TRUNCATED_THINKING = "truncated_thinking"  # the thought did not end
    NO_PRINCIPLES = "no_principles"  # the judge wrote none when asked to


@dataclass(frozen=True, slots=True)
class Scale:
    """Inclusive range of the integer scores: 1..10, or 0..1 for a single response (paper, Section 4.1)."""

    low: int
    high: int


_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
_BOX = re.compile(r"[\s*]*\\boxed\{")
Reader = Callable[[str, int, Scale], "tuple[int, ...] | Failure"]  # (inside of the box, N, scale) -> scores [N]


def read_scores(inside: str, num_responses: int, scale: Scale) -> tuple[int, ...] | Failure:
    """`num_responses` integers on the scale."""
    parts = [part.strip() for part in inside.split(",")]
    if not all(_INTEGER.fullmatch(part) for part in parts):
        return Failure.NOT_INTEGER
    scores = tuple(int(part) for part in parts)
    if len(scores) != num_responses:
        return Failure.WRONG_COUNT
    if not all(scale.low <= s <= scale.high for s in scores):
        return Failure.OUT_OF_RANGE
    return scores


def read_best(inside: str, num_responses: int, scale: Scale) -> tuple[int, ...] | Failure:
    """The number of one response, from 1: it scores 1, the others 0."""
    number = read_scores(inside, 1, Scale(1, num_responses))
    return number if isinstance(number, Failure) else tuple(int(p == number[0]) for p in range(1, num_responses + 1))


def read_verdict(inside: str, num_responses: int, scale: Scale) -> tuple[int, ...] | Failure:
    """ "1", "2" or "tie": the better of two scores 2 and the other 0, a tie gives 1 to each."""
    return {"1": (2, 0), "2": (0, 2), "tie": (1, 1)}.get(inside.strip().lower(), Failure.NOT_A_VERDICT)


def parse_scores(
    text: str,
    num_responses: int,
    scale: Scale,
    stop_reason: StopReason = "stop",
    read: Reader = read_scores,
    thinks: bool = False,
) -> tuple[int, ...] | Failure:
    """Scores in the order of the prompt, from the LAST `\\boxed{...}` of `text`, by `read`.

    Anything else is a Failure: an unclosed last box hides an earlier one, because the judge meant to revise it.
    `thinks` is as in `after_thinking`.
    """
    if stop_reason == "abort":
        return Failure.ABORTED
    answer = after_thinking(text, thinks, stop_reason)
    if answer is None:
        return Failure.TRUNCATED_THINKING
    start = answer.rfind("\\boxed{")
    end = answer.find("}", start)
    if start < 0 or end < 0:
        return Failure.TRUNCATED if stop_reason == "length" else Failure.NO_BOX
    return read(answer[start + len("\\boxed{") : end], num_responses, scale)


def after_thinking(text: str, thinks: bool = False, stop_reason: StopReason = "stop") -> str | None:
    """The text after a leading `<think>...</think>`, or all of it if there is none; None if the thought does not end.

    With `thinks` the opening tag may be in the prompt, so that the text begins inside the thought.
    """
    opened = text.lstrip().startswith("<think>")
    if not opened and not thinks:
        return text
    _, end, answer = text.partition("</think>")
    if end:
        return answer.lstrip("\n")
    return None if opened or stop_reason == "length" else text


def has_three_parts(text: str) -> bool:
    """Whether criteria, analysis and boxed scores follow their labels in this order, the first two not empty."""
    _, _, rest = text.partition("Specific Criteria:")
    criteria, _, rest = rest.partition("Analysis:")
    analysis, _, scores = rest.rpartition("Scores:")
    return bool(criteria.strip("*# \n") and analysis.strip("*# \n") and _BOX.match(scores))
