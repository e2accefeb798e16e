"""Converts rows of preference data in various shapes into Items, one per row.

A row with missing columns or wrong types is malformed and raises DataError. Well-formed but useless rows (ties, empty
texts) become Items that `validate` refuses by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from spct_ray.data.validate import Problem
from spct_ray.errors import DataError
from spct_ray.records import Item, Message

Shape = Literal["own", "chosen_rejected", "helpsteer2", "ultrafeedback"]
Row = Mapping[str, Any]

STRENGTHS = {1: "slightly better", 2: "better", 3: "much better"}  # HelpSteer2's own words for |preference_strength|


class UnusableRow(Exception):
    """A well-formed row from which no Item can be made."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.value)
        self.problem = problem


def detect_shape(row: Row, where: str) -> Shape:
    """The shape that matches the row's columns. Raises DataError."""
    for shape, (columns, _) in _SHAPES.items():
        if columns <= set(row):
            return shape
    known = "; ".join(f"{shape} ({', '.join(sorted(columns))})" for shape, (columns, _) in _SHAPES.items())
    raise DataError(
        f"{where}: columns {', '.join(sorted(map(str, row)))} fit no known shape. Known are {known}. Rename the "
        "columns, or write the rows in the own shape (messages, responses, rewards)"
    )


def to_item(row: Row, shape: Shape, item_id: str, source: str, where: str) -> Item:
    """The row as an Item with this id; `source` is its source unless the row names one. Raises DataError (malformed,
    names `where`) and UnusableRow."""
    item = _SHAPES[shape][1](Cells(row, shape, where))
    return replace(item, id=item_id, source=item.source or source)


class Cells:
    """Typed access to the cells of one row."""

    def __init__(self, row: Row, shape: str, where: str) -> None:
        self.row, self.shape, self.where = row, shape, where

    def error(self, message: str) -> DataError:
        return DataError(f"{self.where}: {message} (read as shape {self.shape!r}). Fix the row or give the shape")

    def get(self, column: str) -> Any:
        if column not in self.row:
            raise self.error(f"no column {column!r}; found {', '.join(sorted(map(str, self.row)))}")
        return self.row[column]

    def text(self, column: str) -> str:
        return self.as_text(self.get(column), column)

    def optional(self, column: str, default: str = "") -> str:
        value = self.row.get(column)
        return default if value is None else self.as_text(value, column)

    def texts(self, column: str) -> list[str]:
        """A list of texts, or a single text."""
        value = self.get(column)
        texts = [value] if isinstance(value, str) else self.as_list(value, column)
        return [self.as_text(text, column) for text in texts]

    def prompt(self, column: str) -> tuple[Message, ...]:
        """A conversation, or the text of one user message."""
        value = self.get(column)
        return (Message("user", value),) if isinstance(value, str) else self.as_messages(value, column)

    def as_text(self, value: Any, column: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{column!r} must be text, found {type(value).__name__}: {value!r:.80}")
        return value

    def as_list(self, value: Any, column: str) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            raise self.error(f"{column!r} must be a list, found {type(value).__name__}: {value!r:.80}")
        return value

    def as_number(self, value: Any, column: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{column!r} must be a number, found {type(value).__name__}: {value!r:.80}")
        return float(value)

    def as_messages(self, value: Any, column: str) -> tuple[Message, ...]:
        messages = []
        for turn in self.as_list(value, column):
            if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
                raise self.error(f"{column!r} must hold {{role, content}} objects, found {turn!r:.80}")
            role = self.as_text(turn["role"], f"{column}.role")
            messages.append(Message(role, self.as_text(turn["content"], f"{column}.content")))  # type: ignore[arg-type]
        return tuple(messages)


def _own(cells: Cells) -> Item:
    return Item(
        "",
        messages=cells.as_messages(cells.get("messages"), "messages"),
        responses=tuple(cells.as_text(r, "responses") for r in cells.as_list(cells.get("responses"), "responses")),
        rewards=tuple(cells.as_number(r, "rewards") for r in cells.as_list(cells.get("rewards"), "rewards")),
        **{c: cells.optional(c) for c in ("source", "subset", "reference", "strength", "facts", "principles")},
    )


def _chosen_rejected(cells: Cells) -> Item:
    """Chosen first; its position gives nothing away, because the sampler shuffles the responses."""
    prompt = cells.prompt("prompt") if cells.row.get("prompt") else ()
    (messages, chosen), (other, rejected) = (_side(cells, column, prompt) for column in ("chosen", "rejected"))
    if messages != other:
        raise UnusableRow(Problem.PROMPTS_DIFFER)
    return Item("", messages, (chosen, rejected), (1.0, 0.0))


def _side(cells: Cells, column: str, prompt: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    """(conversation, response) of one side: the response alone, messages that end with it, or such a dialogue as text
    (hh-rlhf). Some sets repeat the prompt in the messages, others do not."""
    value = cells.get(column)
    if isinstance(value, str) and prompt:
        return prompt, value
    turns = _dialogue(cells, column) if isinstance(value, str) else cells.as_messages(value, column)
    if not turns or turns[-1].role != "assistant":
        raise UnusableRow(Problem.NO_RESPONSES)
    return turns[:-1] or prompt, turns[-1].content


def _dialogue(cells: Cells, column: str) -> tuple[Message, ...]:
    _, *pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", cells.text(column))
    if not pieces:
        raise cells.error(f"{column!r} has no '\\n\\nHuman:' turn, and there is no 'prompt' that it answers")
    return _turns(zip(pieces[::2], map(str.strip, pieces[1::2]), strict=True))


def _turns(pairs: Iterable[tuple[str, str]]) -> tuple[Message, ...]:
    return tuple(Message("assistant" if role == "Assistant" else "user", text) for role, text in pairs)


def _helpsteer2(cells: Cells) -> Item:
    """preference_strength is -3..3: below 0 response 1 is better, above 0 response 2, and 0 is a tie."""
    strength = cells.as_number(cells.get("preference_strength"), "preference_strength")
    if strength not in range(-3, 4):
        raise cells.error(f"'preference_strength' must be one of -3..3, found {strength}")
    pieces = ["User", *re.split(r"\n?<extra_id_1>(User|Assistant)\n", cells.text("prompt"))]  # later turns are marked
    return Item(
        "",
        messages=_turns(zip(pieces[::2], pieces[1::2], strict=True)),
        responses=(cells.text("response_1"), cells.text("response_2")),
        rewards=(max(-strength, 0.0), max(strength, 0.0)),
        strength=STRENGTHS.get(int(abs(strength)), ""),
    )


def _ultrafeedback(cells: Cells) -> Item:
    responses, rewards = [], []
    for completion in cells.as_list(cells.get("completions"), "completions"):
        if not isinstance(completion, Mapping) or "response" not in completion:
            raise cells.error(f"'completions' must hold objects with a 'response', found {completion!r:.80}")
        responses.append(cells.as_text(completion["response"], "completions.response"))
        rewards.append(_rating(completion, cells))
    messages = (Message("user", cells.text("instruction")),)
    return Item("", messages, tuple(responses), tuple(rewards), subset=cells.optional("source"))


def _rating(completion: Mapping[str, Any], cells: Cells) -> float:
    """Mean of the aspects' ratings, NaN when one is "N/A" (validate refuses it); else the one overall rating."""
    annotations = completion.get("annotations")
    if isinstance(annotations, Mapping) and annotations:
        ratings = [aspect.get("Rating") if isinstance(aspect, Mapping) else None for aspect in annotations.values()]
        numbers = [float(str(r)) if re.fullmatch(r"\d+(\.\d+)?", str(r)) else math.nan for r in ratings]
        return sum(numbers) / len(numbers)
    for column in ("fine-grained_score", "overall_score", "rating"):
        if completion.get(column) is not None:
            return cells.as_number(completion[column], f"completions.{column}")
    raise cells.error("a completion has neither 'annotations' with ratings nor an overall 'rating'")


_SHAPES: dict[Shape, tuple[set[str], Callable[[Cells], Item]]] = {  # the columns that tell a shape, and its reader
    "own": ({"messages", "responses"}, _own),
    "helpsteer2": ({"prompt", "response_1", "response_2", "preference_strength"}, _helpsteer2),
    "ultrafeedback": ({"instruction", "completions"}, _ultrafeedback),
    "chosen_rejected": ({"chosen", "rejected"}, _chosen_rejected),
}
