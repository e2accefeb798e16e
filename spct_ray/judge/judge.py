"""A judge: an engine, the prompt and the parser made one. Tasks go in, trajectories come out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from spct_ray.judge.cohort import chunks, merge
from spct_ray.judge.orders import to_item_order
from spct_ray.judge.parse import Failure, parse_scores
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


def parts_of(task: JudgeTask, config: JudgeConfig, size: int = 0) -> list[JudgeTask]:
    """The prompts of one judgement, as tasks: itself, or each response or pair of responses as an item of its own.

    With `size`, a judgement of all responses in one prompt is made of chunks of at most so many, see `judge.cohort`.
    """
    parts = _parts(task.order, config, size)
    if parts == [task.order]:
        return [task]
    item = task.item
    return [
        replace(
            task,
            item=replace(
                item,
                responses=tuple(item.responses[i] for i in part),
                rewards=tuple(item.rewards[i] for i in part) if item.rewards else (),
            ),
            order=tuple(range(len(part))),
            seed=derive_seed(task.seed, "part", place),
        )
        for place, part in enumerate(parts)
    ]


def joined(task: JudgeTask, config: JudgeConfig, made: Sequence[Trajectory], size: int = 0) -> Trajectory:
    """One trajectory of the judgements of `parts_of`: a response's score is the sum of what they gave it or, of chunks,
    what they gave it on one scale, as a whole score. It fails as the first of them that did."""
    parts = _parts(task.order, config, size)
    if parts == [task.order]:
        return made[0]
    failed = next((one for one in made if one.failure), None)
    scores = [0] * len(task.order)
    if size and not failed:
        scale = scale_of(len(task.order), config)
        merged = merge(chunks(len(task.order), size), [one.scores for one in made])
        for i, score in zip(task.order, merged, strict=True):
            scores[i] = min(max(math.floor(score + 0.5), scale.low), scale.high)
    elif not failed:
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


def _parts(order: Sequence[int], config: JudgeConfig, size: int) -> list[tuple[int, ...]]:
    if not size:
        return mode_of(len(order), config).parts(order)
    return [tuple(order[place] for place in chunk) for chunk in chunks(len(order), size)]
