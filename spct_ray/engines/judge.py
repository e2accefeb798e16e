"""A judge made of an engine, the prompt and the parser; the same in sampling, evaluation and serving."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from spct_ray.engines.base import Engine, Request, SamplingParams
from spct_ray.errors import ConfigError, RequestError, TooLongError
from spct_ray.judge.cohort import gather_or_cancel, judge_in_chunks
from spct_ray.judge.judge import JudgeTask, joined, on_one_scale, part_of, to_trajectory
from spct_ray.judge.parse import Failure
from spct_ray.judge.principles import PrinciplesCache
from spct_ray.judge.prompt import (
    PRINCIPLES_GUIDE,
    JudgeConfig,
    guide,
    judge_messages,
    mode_of,
    principles_messages,
    scale_of,
)
from spct_ray.records import Completion, Message, Trajectory

MAX_QUERIES = 4096  # whose principles are kept


class EngineJudge:
    """Judges with `engine` in the mode of `config`.

    `guided` holds the text to the format by structured output and marks the trajectories. With `in_chunks`, responses
    that do not fit one prompt are judged in as few chunks as fit. Principles that the judge writes from the query are
    written once per query; a trajectory's text begins with them, and the first sample of each kind counts their tokens.
    """

    def __init__(
        self, engine: Engine, config: JudgeConfig, model: str, guided: bool = False, in_chunks: bool = False
    ) -> None:
        if guided and (config.mode != "list" or config.thinking_tokens):
            raise ConfigError(
                f"guided judging knows judge.mode 'list' without thinking_tokens, not {config.mode!r} with "
                f"{config.thinking_tokens}; leave guided out"
            )
        self.engine, self.config, self.model, self.guided, self.in_chunks = engine, config, model, guided, in_chunks
        self._principles = PrinciplesCache(self.principles, config, MAX_QUERIES)

    def judge(self, tasks: Sequence[JudgeTask]) -> list[Trajectory]:
        """One trajectory per task, in order, all of them in flight at once. A request that the engine refuses is the
        failure "too_long" or "aborted" with the reason as its text, so that one long item does not stop the others.
        Raises EngineError. Not for use in a running event loop."""
        return asyncio.run(gather_or_cancel(map(self._judge_or_fail, tasks)))

    async def judge_one(self, task: JudgeTask) -> Trajectory:
        """One judgement. Raises RequestError (TooLongError for the prompt) and EngineError (engine dead); cancelling it
        cancels the engine's work."""
        if not mode_of(len(task.order), self.config).writes_principles:
            return await self._judge(task)
        principles = await self._principles.of(task.item.messages)
        written = self._trajectory(task, principles.completion)
        if isinstance(principles.text, Failure):
            return replace(written, scores=(), failure=str(principles.text))
        judged = await self._judge(replace(task, item=replace(task.item, principles=principles.text)))
        counted = task.sample == 0
        return replace(
            judged,
            text=f"{written.text.rstrip()}\n\n{judged.text}",
            prompt_tokens=judged.prompt_tokens + counted * written.prompt_tokens,
            completion_tokens=judged.completion_tokens + counted * written.completion_tokens,
        )

    async def principles(self, messages: Sequence[Message]) -> Completion:
        """The judge's principles for a query, from the conversation alone, greedily (`read_principles` reads them).
        Raises as `judge_one`."""
        params = SamplingParams(self.config.budget, temperature=0.0, guide=PRINCIPLES_GUIDE if self.guided else "")
        request = Request(principles_messages(messages, self.config), params)
        (completion,) = await asyncio.wrap_future(self.engine.submit(request))
        return completion

    async def _judge_or_fail(self, task: JudgeTask) -> Trajectory:
        try:
            return await self.judge_one(task)
        except RequestError as error:
            refused = to_trajectory(
                task, self.config, text=str(error), stop_reason="abort", model=self.model, guided=self.guided
            )
            return replace(refused, failure=str(Failure.TOO_LONG)) if isinstance(error, TooLongError) else refused

    async def _judge(self, task: JudgeTask) -> Trajectory:
        """One judgement, in as many prompts as the mode or, `in_chunks`, the length of the responses asks for."""
        order, mode = task.order, mode_of(len(task.order), self.config)
        if not self.in_chunks or not mode.rates_together or len(order) == 1:
            parts = mode.parts(order)
            return joined(task, parts, await gather_or_cancel(self._ask(part_of(task, part)) for part in parts))

        async def chunk(places: tuple[int, ...]) -> Trajectory:
            return await self._ask(part_of(task, tuple(order[place] for place in places)))

        chunks, results = await judge_in_chunks(len(order), len(order), chunk)
        made = []
        for result in results:
            if isinstance(result, TooLongError):
                raise result
            made.append(result)
        whole = joined(task, [tuple(order[place] for place in places) for places in chunks], made)
        if whole.failure or len(chunks) == 1:
            return whole
        scores = dict(zip(order, on_one_scale(chunks, made, scale_of(len(order), self.config)), strict=True))
        return replace(whole, scores=tuple(scores[i] for i in range(len(order))))

    async def _ask(self, task: JudgeTask) -> Trajectory:
        """The judgement of one prompt."""
        request = Request(
            judge_messages(task.item, task.order, self.config, hint=task.hinted),
            SamplingParams(
                max_tokens=self.config.budget,
                temperature=task.temperature,
                seed=task.seed % 2**31,
                guide=guide(len(task.order), self.config) if self.guided else "",
            ),
        )
        (completion,) = await asyncio.wrap_future(self.engine.submit(request))
        return self._trajectory(task, completion)

    def _trajectory(self, task: JudgeTask, completion: Completion) -> Trajectory:
        return to_trajectory(
            task,
            self.config,
            text=completion.text,
            stop_reason=completion.stop_reason,
            model=self.model,
            guided=self.guided,
            weight_version=completion.weight_version,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
        )
