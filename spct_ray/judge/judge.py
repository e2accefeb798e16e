"""A judge: an engine, the prompt and the parser made one. Tasks go in, trajectories come out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from spct_ray.judge.cohort import merge
from spct_ray.judge.orders import to_item_order
from spct_ray.judge.parse import Failure, Scale, parse_scores
from spct_ray.judge.prompt import JudgeConfig, mode_of, scale_of
from spct_ray.judge.seeds import derive_seed
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
    num = len(task.order)
    read, thinks = mode_of(num, config).read, config.thinking_tokens > 0
    if thinks and "</think>" in text and not text.lstrip().startswith("<think>"):
        text = "<think>" + text  # the opening tag stood in the prompt
    parsed = parse_scores(text, num, scale_of(num, config), stop_reason, read, thinks)
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


def part_of(task: JudgeTask, part: tuple[int, ...]) -> JudgeTask:
    """The task to judge only the responses `part` (indices into the item), shown in this order, in one prompt."""
    if part == task.order:
        return task
    item = task.item
    return replace(
        task,
        item=replace(
            item,
            responses=tuple(item.responses[i] for i in part),
            rewards=tuple(item.rewards[i] for i in part) if item.rewards else (),
        ),
        order=tuple(range(len(part))),
        seed=derive_seed(task.seed, "part", *part),
    )


def joined(task: JudgeTask, parts: Sequence[tuple[int, ...]], made: Sequence[Trajectory]) -> Trajectory:
    """One trajectory from those of all `parts`: a response's score is the sum of its scores, tokens are summed.

    It fails as the first part that failed.
    """
    if len(parts) == 1:
        return made[0]
    failed = next((one for one in made if one.failure), None)
    scores = [0] * len(task.order)
    if not failed:
        for part, one in zip(parts, made, strict=True):
            for i, score in zip(part, one.scores, strict=True):
                scores[i] += score
    shown = ("; ".join(f"response {i + 1}" for i in part) for part in parts)
    return replace(
        made[0],
        order=task.order,
        seed=task.seed,
        text="\n\n".join(f"({words})\n{one.text}" for words, one in zip(shown, made, strict=True)),
        scores=() if failed else tuple(scores),
        failure=failed.failure if failed else "",
        stop_reason=(failed or made[0]).stop_reason,
        prompt_tokens=sum(one.prompt_tokens for one in made),
        completion_tokens=sum(one.completion_tokens for one in made),
        num_prompts=len(parts),
    )


def on_one_scale(chunks: Sequence[tuple[int, ...]], made: Sequence[Trajectory], scale: Scale) -> tuple[int, ...]:
    """Whole scores of all responses from those of chunks that share anchors, see `judge.cohort.merge`."""
    merged = merge(chunks, [one.scores for one in made])
    return tuple(min(max(math.floor(score + 0.5), scale.low), scale.high) for score in merged)
