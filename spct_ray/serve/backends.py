"""The two models behind a verdict, as plain classes without Ray: the judge around an engine, and the meta RM.

Both are asynchronous at the edge and never block the event loop that calls them: the engine batches continuously on
its own thread, the meta RM scores on a worker thread, one batch at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from spct_ray.engines.base import Engine, Weights
from spct_ray.engines.engine_judge import EngineJudge
from spct_ray.engines.host import EngineHost
from spct_ray.errors import EngineError
from spct_ray.judge.judge import JudgeTask
from spct_ray.records import Completion, Message, Trajectory
from spct_ray.serve.deployment import ServeConfig


class JudgeBackend(Protocol):
    """Trajectories of all tasks, in batches as they are done, in no order (`sample` tells which is which).

    Raises RequestError (prompt too long) or EngineError (engine dead, no replica, queue full). To close the generator
    ends the work on tasks that are not done.
    """

    def judge(self, tasks: Sequence[JudgeTask]) -> AsyncGenerator[list[Trajectory], None]: ...

    async def principles(self, messages: Sequence[Message]) -> Completion:
        """A text with principles for a query; raises as `judge`."""


class MetaBackend(Protocol):
    """Raw meta-RM logits, one a conversation of `meta_messages`. Raises EngineError when it cannot answer."""

    async def score(self, conversations: Sequence[Sequence[Message]]) -> list[float]: ...


class LocalJudge(EngineHost):
    """A judge with its engine in this process."""

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        super().__init__(engine, config.judge_model)
        self._config = config
        self._served = EngineJudge(engine, config.judge, config.name, guided=config.guided)

    async def judge(self, tasks: Sequence[JudgeTask]) -> AsyncGenerator[list[Trajectory], None]:
        """All tasks are in flight at once; closing the generator cancels those that are not done."""
        running = [asyncio.create_task(self._served.judge_one(task)) for task in tasks]
        pending = set(running)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                yield sorted((task.result() for task in done), key=lambda t: t.sample)
        except EngineError as error:
            self.engine_died(error)
            raise
        finally:
            for task in running:
                task.cancel()  # also the failed ones, else asyncio would print an error that nobody looked at

    async def principles(self, messages: Sequence[Message]) -> Completion:
        """As in `JudgeBackend`."""
        try:
            return await self._served.principles(messages)
        except EngineError as error:
            self.engine_died(error)
            raise

    async def reconfigure(self, weights: dict[str, Any]) -> None:
        """Serve calls it (with the fields of `Weights`) when a replica starts and when new weights are rolled out.

        Judgements under way are finished with the old weights, later ones wait for the new. Raises EngineError.
        """
        await asyncio.to_thread(self.load, Weights(**weights))

    async def deployed(self) -> tuple[type[LocalJudge], ServeConfig, Weights]:
        """What runs here, so that the same can be deployed with other weights."""
        return type(self), self._config, self._weights


class LocalMeta:
    """A meta RM in this process, one batch at a time; warm before the constructor returns."""

    def __init__(self, model_dir: str) -> None:
        from spct_ray.learn.scorers import MetaScorer  # here, so that a gateway does not load torch

        self._scorer = MetaScorer(model_dir)
        self._scorer.warm_up()
        self._lock = asyncio.Lock()

    async def score(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        async with self._lock:
            return await asyncio.to_thread(self._scorer.score, conversations)
