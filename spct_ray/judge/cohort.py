"""Scores for many responses to one query: judged together in chunks that share anchors, and put on one scale.

A judge compares what stands in one prompt, so scores of different prompts differ by their company. Every chunk holds
the same few anchors; each chunk's scores are shifted so that its anchors have the mean they have over all chunks.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

NUM_ANCHORS = 2


def chunks(num_responses: int, max_chunk: int) -> list[tuple[int, ...]]:
    """Indices of the responses of each chunk, at most `max_chunk` (> NUM_ANCHORS) each; the anchors come first in all.

    One chunk without need of anchors where all responses fit. Chunks differ in size by at most one.
    """
    if max_chunk <= NUM_ANCHORS:
        raise ValueError(f"a chunk of {max_chunk} has no room beside {NUM_ANCHORS} anchors")
    if num_responses <= max_chunk:
        return [tuple(range(num_responses))]
    rest = range(NUM_ANCHORS, num_responses)
    num_chunks = math.ceil(len(rest) / (max_chunk - NUM_ANCHORS))
    return [(*range(NUM_ANCHORS), *rest[c::num_chunks]) for c in range(num_chunks)]


def merge(parts: Sequence[tuple[int, ...]], means: Sequence[Sequence[float] | None]) -> list[float]:
    """One score a response from each chunk's mean scores (in the chunk's order); None is a chunk without a verdict.

    NaN where a response was in no chunk with a verdict.
    """
    scores = [math.nan] * (1 + max(i for part in parts for i in part))
    judged = [(part, mean) for part, mean in zip(parts, means, strict=True) if mean is not None]
    if not judged:
        return scores
    if len(parts) > 1:
        for anchor in range(NUM_ANCHORS):
            scores[anchor] = sum(mean[anchor] for _, mean in judged) / len(judged)
    common = sum(scores[:NUM_ANCHORS]) if len(parts) > 1 else 0.0
    for part, mean in judged:
        shift = (common - sum(mean[:NUM_ANCHORS])) / NUM_ANCHORS if len(parts) > 1 else 0.0
        for place, i in enumerate(part):
            if len(parts) == 1 or i >= NUM_ANCHORS:
                scores[i] = mean[place] + shift
    return scores


async def score_cohort(
    num_responses: int, max_chunk: int, judge: Callable[[tuple[int, ...]], Awaitable[Sequence[float] | None]]
) -> list[float]:
    """Scores [N] of all responses: `judge` gives the mean scores of the responses of one chunk, or None."""
    parts = chunks(num_responses, max_chunk)
    return merge(parts, await asyncio.gather(*map(judge, parts)))
