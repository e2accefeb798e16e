"""Scores for many responses to one query: judged together in chunks that share anchors, and put on one scale.

A judge compares what stands in one prompt, so scores of different prompts differ by their company. Every chunk holds
the same few anchors; each chunk's scores are shifted so that its anchors have the mean they have over all chunks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

from spct_ray.errors import TooLongError

NUM_ANCHORS = 2


def chunks(num_responses: int, max_chunk: int) -> list[tuple[int, ...]]:
    """Indices of the responses of each chunk, at most `max_chunk` (>= 2) each; the anchors come first in all.

    Chunks of two share one anchor, larger ones NUM_ANCHORS; where all responses fit, there is one chunk without need of
    any. Chunks differ in size by at most one.
    """
    if max_chunk < 2:
        raise ValueError(f"a chunk of {max_chunk} has no room beside an anchor")
    if num_responses <= max_chunk:
        return [tuple(range(num_responses))]
    num_anchors = min(NUM_ANCHORS, max_chunk - 1)
    rest = range(num_anchors, num_responses)
    num_chunks = math.ceil(len(rest) / (max_chunk - num_anchors))
    return [(*range(num_anchors), *rest[c::num_chunks]) for c in range(num_chunks)]


def smaller(size: int) -> int:
    """The size of chunk to try after `size` responses did not fit one prompt: about twice as many chunks."""
    return size - 1 if size <= 4 else math.ceil(size / 2) + 1


def merge(parts: Sequence[tuple[int, ...]], means: Sequence[Sequence[float] | None]) -> list[float]:
    """One score a response from each chunk's mean scores (in the chunk's order); None is a chunk without a verdict.

    NaN where a response was in no chunk with a verdict.
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


async def score_cohort(
    num_responses: int, max_chunk: int, judge: Callable[[tuple[int, ...]], Awaitable[Sequence[float] | None]]
) -> list[float]:
    """Scores [N] of all responses: `judge` gives the mean scores of the responses of one chunk, or None.

    Where it raises TooLongError for a chunk, all are judged again in smaller ones, down to pairs; a response that does
    not fit even so gets NaN. Raises TooLongError when no chunk fits (the first response, in all pairs, may be what is
    too long), and whatever else `judge` raises.
    """

    async def one(part: tuple[int, ...]) -> Sequence[float] | TooLongError | None:
        try:
            return await judge(part)
        except TooLongError as error:
            return error

    size = max_chunk
    while True:
        parts = chunks(num_responses, size)
        found = await asyncio.gather(*map(one, parts))
        too_long = [error for error in found if isinstance(error, TooLongError)]
        if not too_long or len(parts[0]) <= 2:
            break
        size = smaller(len(parts[0]))
    if len(too_long) == len(parts):
        raise too_long[0]
    return merge(parts, [None if isinstance(mean, TooLongError) else mean for mean in found])
