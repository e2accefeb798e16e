"""Scores for many responses to one query: judged in chunks that share anchors, and aligned to one scale.

Scores depend on the other responses in the prompt, so scores from different prompts are not comparable. Every chunk has
the same few anchors, and its scores are shifted so that the anchors' mean is the same in all chunks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from spct_ray.errors import TooLongError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

NUM_ANCHORS = 2


def chunks(num_responses: int, max_chunk: int) -> list[tuple[int, ...]]:
    """Indices of the responses of each chunk, at most `max_chunk` (>= 2) each; the anchors come first in all.

    Chunks of two share one anchor, larger ones NUM_ANCHORS. Where all responses fit there is one chunk and no anchor.
    Chunks differ in size by at most one.
    """
    if max_chunk < 2:
        raise ValueError(f"a chunk of {max_chunk} has no room beside an anchor")
    if num_responses <= max_chunk:
        return [tuple(range(num_responses))]
    num_anchors = min(NUM_ANCHORS, max_chunk - 1)
    rest = range(num_anchors, num_responses)
    num_chunks = math.ceil(len(rest) / (max_chunk - num_anchors))
    return [(*range(num_anchors), *rest[c::num_chunks]) for c in range(num_chunks)]


def merge(parts: Sequence[tuple[int, ...]], means: Sequence[Sequence[float] | None]) -> list[float]:
    """One score per response from each chunk's mean scores (in the chunk's order; None for a chunk without a verdict).

    NaN for a response that is in no chunk with a verdict.
    """
    scores = [math.nan] * (1 + max(i for part in parts for i in part))
    judged = [(part, mean) for part, mean in zip(parts, means, strict=True) if mean is not None]
    if not judged:
        return scores
    num_anchors = sum(len(set(same)) == 1 for same in zip(*parts, strict=False)) if len(parts) > 1 else 0
    for anchor in range(num_anchors):
        scores[anchor] = sum(mean[anchor] for _, mean in judged) / len(judged)
    common = sum(scores[:num_anchors])
    for part, mean in judged:
        shift = (common - sum(mean[:num_anchors])) / max(1, num_anchors)
        for place, i in enumerate(part):
            if place >= num_anchors:
                scores[i] = mean[place] + shift
    return scores


async def judge_in_chunks(
    num_responses: int, max_chunk: int, judge: Callable[[tuple[int, ...]], Awaitable[T]]
) -> tuple[list[tuple[int, ...]], list[T | TooLongError]]:
    """The chunks of `num_responses` responses, and the result of `judge` for each.

    Where `judge` raises TooLongError for any chunk, all responses are judged again in smaller chunks, down to pairs; a
    pair that still does not fit has the error as its result. Any other error cancels the remaining chunks.
    """

    async def one(part: tuple[int, ...]) -> T | TooLongError:
        try:
            return await judge(part)
        except TooLongError as error:
            return error

    size = max_chunk
    while True:
        parts = chunks(num_responses, size)
        results = await gather_or_cancel(map(one, parts))
        if len(parts[0]) <= 2 or not any(isinstance(result, TooLongError) for result in results):
            return parts, results
        size = len(parts[0])
        size = size - 1 if size <= 4 else math.ceil(size / 2) + 1  # about twice as many chunks


async def score_cohort(
    num_responses: int, max_chunk: int, judge: Callable[[tuple[int, ...]], Awaitable[Sequence[float] | None]]
) -> list[float]:
    """Scores [N] of all responses, where `judge` returns the mean scores of the responses of one chunk, or None.

    A response that does not fit even in a pair, or whose chunk has no scores, gets NaN. Raises TooLongError when no
    chunk fits (the first response, which is in all pairs, may be what is too long), and whatever else `judge` raises.
    """
    parts, results = await judge_in_chunks(num_responses, max_chunk, judge)
    too_long = [error for error in results if isinstance(error, TooLongError)]
    if len(too_long) == len(parts):
        raise too_long[0]
    return merge(parts, [None if isinstance(mean, TooLongError) else mean for mean in results])


async def score_groups(keys: Sequence[K], score: Callable[[K, list[int]], Awaitable[Sequence[float]]]) -> list[float]:
    """Scores [N], where `score` returns those of all indices that share a key."""
    members: dict[K, list[int]] = {}
    for i, key in enumerate(keys):
        members.setdefault(key, []).append(i)
    scores = [math.nan] * len(keys)

    async def one(key: K, indices: list[int]) -> None:
        for i, value in zip(indices, await score(key, indices), strict=True):
            scores[i] = value

    await gather_or_cancel(one(key, indices) for key, indices in members.items())
    return scores


async def gather_or_cancel(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results, in order. Unlike with asyncio.gather, the first error cancels all other work before it is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
