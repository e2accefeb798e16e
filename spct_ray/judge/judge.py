"""The judge's interface, from tasks to trajectories; and judgements that take several prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from spct_ray.judge.cohort import merge
from spct_ray.judge.parse import Failure, Scale, parse_scores
from spct_ray.judge.prompt import JudgeConfig, mode_of, scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Item, Record, StopReason, Trajectory


@dataclass(frozen=True, slots=True)
class JudgeTask(Record):
    """One judgement to sample: item, order of its responses, temperature and seed."""

    item: Item
    order: tuple[int, ...]
    sample: int
    temperature: float
    seed: int
    hinted: bool = False


class Judge(Protocol):
    """Turns tasks into trajectories: an engine with a prompt, or a program."""

    def judge(self, tasks: Sequence[JudgeTask]) -> list[Trajectory]: ...


def to_trajectory(
    task: JudgeTask, config: JudgeConfig, *, text: str, stop_reason: StopReason, model: str
) -> Trajectory:
    """Parse a judgement's text and put its scores into the item's order. Fields that only an engine knows (tokens,
    weight version) are 0."""
    num = len(task.order)
    thinks = config.thinking_tokens > 0
    if thinks and "</think>" in text and not text.lstrip().startswith("<think>"):
        text = "<think>" + text  # the opening tag was in the prompt
    parsed = parse_scores(text, num, scale_of(num, config), stop_reason, mode_of(num, config).read, thinks)
    failure = str(parsed) if isinstance(parsed, Failure) else ""
    scores = () if isinstance(parsed, Failure) else tuple(parsed[task.order.index(i)] for i in range(num))
    return Trajectory(
        item_id=task.item.id,
        sample=task.sample,
        order=task.order,
        text=text,
        scores=scores,
        failure=failure,
        hinted=task.hinted,
        guided=False,
        temperature=task.temperature,
        seed=task.seed,
        model=model,
        weight_version=0,
        prompt_tokens=0,
        completion_tokens=0,
        stop_reason=stop_reason,
    )


def part_of(task: JudgeTask, part: tuple[int, ...]) -> JudgeTask:
    """The task of judging only the responses `part` (indices into the item) in one prompt, shown in this order."""
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


def joined(task: JudgeTask, parts: Sequence[tuple[int, ...]], judged: Sequence[Trajectory]) -> Trajectory:
    """One trajectory from those of all `parts`: scores are summed per response, tokens over all.

    If parts failed, it has the failure of the first.
    """
    if len(parts) == 1:
        return judged[0]
    failed = next((one for one in judged if one.failure), None)
    scores = [0] * len(task.order)
    for part, one in zip(parts, judged, strict=True):
        for i, score in zip(part, one.scores, strict=not one.failure):
            scores[i] += score
    shown = ("; ".join(f"response {i + 1}" for i in part) for part in parts)
    return replace(
        failed or judged[0],
        order=task.order,
        seed=task.seed,
        text="\n\n".join(f"({words})\n{one.text}" for words, one in zip(shown, judged, strict=True)),
        scores=() if failed else tuple(scores),
        prompt_tokens=sum(one.prompt_tokens for one in judged),
        completion_tokens=sum(one.completion_tokens for one in judged),
        num_prompts=len(parts),
    )


def on_one_scale(chunks: Sequence[tuple[int, ...]], judged: Sequence[Trajectory], scale: Scale) -> tuple[int, ...]:
    """Integer scores of all responses from those of chunks that share anchors, see `judge.cohort.merge`."""
    merged = merge(chunks, [one.scores for one in judged])
    return tuple(min(max(math.floor(score + 0.5), scale.low), scale.high) for score in merged)
