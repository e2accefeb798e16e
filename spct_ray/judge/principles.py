"""Principles that the judge writes from the query alone: once per query, for all samples and for later requests."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from spct_ray.judge.parse import Failure
from spct_ray.judge.prompt import JudgeConfig, read_principles
from spct_ray.records import Completion, Message

Write = Callable[[Sequence[Message]], Awaitable[Completion]]


@dataclass(frozen=True, slots=True)
class Principles:
    """`text` is shown to the judge, or names why there is none; `is_cached`: an earlier call paid for `completion`."""

    text: str | Failure
    completion: Completion
    is_cached: bool


class PrinciplesCache:
    """Principles for the `size` most recent queries, written by `write` with the current version of the judge."""

    def __init__(self, write: Write, config: JudgeConfig, size: int) -> None:
        self._write, self._config, self._size = write, config, size
        self._tasks: OrderedDict[tuple[Message, ...], asyncio.Future[Completion]] = OrderedDict()  # least recent first
        self._newest_version = 0

    async def of(self, messages: Sequence[Message]) -> Principles:
        """Principles for a conversation.

        Concurrent calls share one generation, which continues when one of them is cancelled. An error of `write` is
        raised in all of them, and the next call tries again. A text without principles is cached, too, because
        decoding is greedy and would give the same text.
        """
        key = tuple(messages)
        task = self._tasks.get(key)
        is_cached = task is not None and self._is_usable(task)
        if task is None or not is_cached:
            task = self._tasks[key] = asyncio.ensure_future(self._write(key))
        self._tasks.move_to_end(key)
        if len(self._tasks) > self._size:
            self._tasks.popitem(last=False)
        completion = await asyncio.shield(task)
        text = read_principles(completion.text, completion.stop_reason, self._config)
        return Principles(text, completion, is_cached)

    def saw_version(self, weight_version: int) -> None:
        """Tell the cache that a judgement came from this version of the judge."""
        self._newest_version = max(self._newest_version, weight_version)

    def _is_usable(self, task: asyncio.Future[Completion]) -> bool:
        if not task.done():
            return True
        return not (task.cancelled() or task.exception()) and task.result().weight_version >= self._newest_version
