"""A judge: an engine, the prompt and the parser made one. Tasks go in, trajectories come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from spct_ray.judge.orders import to_item_order
from spct_ray.judge.parse import Failure, parse_scores
from spct_ray.judge.prompt import JudgeConfig, scale_of
from spct_ray.records import Item, Record, StopReason, Trajectory


@dataclass(frozen=True, slots=True)
class JudgeTask(Record):
    """One judgement to be made: this item, its responses in this order, at this temperature, with this seed."""

    item: Item
    order: tuple[int, ...]
    sample: int
    temperature: float
    seed: int
    hinted: bool = False


class Judge(Protocol):
    """Whatever turns tasks into trajectories: an engine with a prompt, or a program."""

    def judge(self, tasks: Sequence[JudgeTask]) -> list[Trajectory]: ...


def to_trajectory(
    task: JudgeTask,
    config: JudgeConfig,
    *,
    text: str,
    stop_reason: StopReason,
    model: str,
    guided: bool = False,
    weight_version: int = 0,
    prompt_tokens: int = 0,
    completion_tokens: int = 0,
) -> Trajectory:
    """Parse a judgement's text and put its scores back into the item's order."""
    parsed = parse_scores(text, len(task.order), scale_of(len(task.order), config), stop_reason)
    failure, scores = (str(parsed), ()) if isinstance(parsed, Failure) else ("", to_item_order(parsed, task.order))
    return Trajectory(
        item_id=task.item.id,
        sample=task.sample,
        order=task.order,
        text=text,
        scores=scores,
        failure=failure,
        hinted=task.hinted,
        guided=guided,
        temperature=task.temperature,
        seed=task.seed,
        model=model,
        weight_version=weight_version,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        stop_reason=stop_reason,
    )
