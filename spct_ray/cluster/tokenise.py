"""Tokenising what is trained on, before any rank starts: ranks hold GPUs, which would wait for one Python process."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

R = TypeVar("R")
T = TypeVar("T")

_ALONE_SECONDS = 10.0  # other processes take about as long to start
_BLOCK = 256  # records of one task


def encode_all(model_dir: str, encode: Callable[[Any, R], T], records: Sequence[R]) -> Iterator[T]:
    """`encode(tokenizer of model_dir, record)` of each record, in order. `encode` lives at the top level of a module.

    Few are encoded here; what is left after ten seconds, by Ray tasks on all CPUs that are free. Raises what `encode`
    does.
    """
    tokenizer, done, until = _tokenizer(model_dir), 0, time.monotonic() + _ALONE_SECONDS
    while done < len(records) and time.monotonic() < until:
        yield encode(tokenizer, records[done])
        done += 1
    if done < len(records):
        yield from _in_tasks(model_dir, encode, records[done:])


def _in_tasks(model_dir: str, encode: Callable[[Any, R], T], records: Sequence[R]) -> Iterator[T]:
    import ray

    task = ray.remote(num_cpus=1)(_encode_block)
    at_once = 2 * int(ray.cluster_resources().get("CPU", 1))  # of which half wait, so that no CPU does
    running = deque[Any]()
    for start in range(0, len(records), _BLOCK):
        running.append(task.remote(model_dir, encode, records[start : start + _BLOCK]))
        if len(running) == at_once:
            yield from ray.get(running.popleft())
    for last in running:
        yield from ray.get(last)


def _encode_block(model_dir: str, encode: Callable[[Any, R], T], records: Sequence[R]) -> list[T]:
    return [encode(_tokenizer(model_dir), record) for record in records]


@functools.lru_cache(maxsize=1)
def _tokenizer(model_dir: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)
