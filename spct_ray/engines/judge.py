"""A judge made of an engine, the prompt and the parser; the same in sampling, evaluation and serving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, TypeVar

from spct_ray.engines.base import Engine, Request, SamplingParams
from spct_ray.errors import ConfigError, RequestError, TooLongError
from spct_ray.judge.cohort import smaller
from spct_ray.judge.judge import JudgeTask, joined, parts_of, to_trajectory
from spct_ray.judge.parse import Failure
from spct_ray.judge.prompt import (
    PRINCIPLES_GUIDE,
    JudgeConfig,
    guide,
    judge_messages,
    mode_of,
    principles_messages,
    read_principles,
)
from spct_ray.records import Completion, Message, Trajectory

S = TypeVar("S")
T = TypeVar("T")
Completions = tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class EngineJudge:
    """Judges with `engine`. `guided` holds the text to the format by structured output and marks the trajectories. With
    `in_chunks`, responses that do not fit one prompt together are judged in chunks, as few as fit.

    Principles that the judge writes from the query are written once a query, greedily; a trajectory's text begins with
    them, and the first sample of each kind counts their tokens.
    """

    engine: Engine
    config: JudgeConfig
    model: str
    guided: bool = False
    in_chunks: bool = False
    _written: dict[tuple[Message, ...], Future[Completions]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.guided and (self.config.mode != "list" or self.config.thinking_tokens):
            raise ConfigError(
                f"guided judging knows judge.mode 'list' without thinking_tokens, not {self.config.mode!r} with "
                f"{self.config.thinking_tokens}; leave guided out"
            )

    def submit(self, task: JudgeTask, size: int = 0) -> Future[Trajectory]:
        """One judgement, with `size` in chunks of at most so many responses; the future fails with RequestError (too
        long) or EngineError (engine dead).

        Cancelling it cancels the engine's work.
        """
        if not mode_of(len(task.order), self.config).writes_principles:
            return self._judge(task, size)
        messages = task.item.messages
        written = self._written.get(messages)
        if written is None:
            written = self._written[messages] = self.principles(messages)
        return _after([written], lambda done: self._judge_by(task, done[0][0], size))

    def principles(self, messages: Sequence[Message]) -> Future[Completions]:
        """One text with principles for a query, from the conversation alone, greedily (`read_principles` reads it)."""
        params = SamplingParams(self.config.budget, temperature=0.0, guide=PRINCIPLES_GUIDE if self.guided else "")
        return self.engine.submit(Request(principles_messages(messages, self.config), params))

    def judge(self, tasks: Sequence[JudgeTask]) -> list[Trajectory]:
        """One trajectory a task, in order. A request that the engine refuses is the failure "too_long" or "aborted",
        with the reason as its text; so one item that is too long does not stop the others. Raises EngineError."""
        made: dict[int, Trajectory] = {}
        sizes = dict.fromkeys(range(len(tasks)), 0)  # of the chunks of those to be judged in this round; 0: no chunks
        while sizes:
            futures = {place: self.submit(tasks[place], size) for place, size in sizes.items()}
            made |= {place: self._outcome(tasks[place], future) for place, future in futures.items()}
            next_sizes = {place: smaller(size or len(tasks[place].order)) for place, size in sizes.items()}
            sizes = {
                place: size
                for place, size in next_sizes.items()
                if size >= 2 and self.in_chunks and made[place].failure == Failure.TOO_LONG
                and mode_of(len(tasks[place].order), self.config).rates_together
            }  # fmt: skip
        return [made[place] for place in range(len(tasks))]

    def _outcome(self, task: JudgeTask, future: Future[Trajectory]) -> Trajectory:
        try:
            return future.result()
        except RequestError as error:
            refused = to_trajectory(
                task, self.config, text=str(error), stop_reason="abort", model=self.model, guided=self.guided
            )
            return replace(refused, failure=str(Failure.TOO_LONG)) if isinstance(error, TooLongError) else refused

    def _judge_by(self, task: JudgeTask, completion: Completion, size: int) -> Future[Trajectory]:
        """The judgement by principles that were written, or the failure to write them."""
        principles = read_principles(completion.text, completion.stop_reason, self.config)
        written = self._trajectory(task, completion)
        if isinstance(principles, Failure):
            return _done(replace(written, scores=(), failure=str(principles)))
        counted = task.sample == 0

        def add(judged: Sequence[Trajectory]) -> Future[Trajectory]:
            (made,) = judged
            return _done(
                replace(
                    made,
                    text=f"{completion.text.rstrip()}\n\n{made.text}",
                    prompt_tokens=made.prompt_tokens + counted * written.prompt_tokens,
                    completion_tokens=made.completion_tokens + counted * written.completion_tokens,
                )
            )

        return _after([self._judge(replace(task, item=replace(task.item, principles=principles)), size)], add)

    def _judge(self, task: JudgeTask, size: int) -> Future[Trajectory]:
        parts = parts_of(task, self.config, size)

        def finish(done: Sequence[Completions]) -> Future[Trajectory]:
            made = [self._trajectory(part, one) for part, (one,) in zip(parts, done, strict=True)]
            return _done(joined(task, self.config, made, size))

        return _after([self.engine.submit(self._request(part)) for part in parts], finish)

    def _request(self, task: JudgeTask) -> Request:
        return Request(
            judge_messages(task.item, task.order, self.config, hint=task.hinted),
            SamplingParams(
                max_tokens=self.config.budget,
                temperature=task.temperature,
                seed=task.seed % 2**31,
                guide=guide(len(task.order), self.config) if self.guided else "",
            ),
        )

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


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _after(futures: Sequence[Future[S]], follow: Callable[[Sequence[S]], Future[T]]) -> Future[T]:
    """What `follow` makes of all results once they are there, or the first error. Cancelling it cancels the work."""
    result: Future[T] = Future()
    under_way: list[Future[Any]] = list(futures)
    lock, left, over = Lock(), len(futures), False

    def copy(done: Future[Any]) -> None:
        if done.cancelled() or not result.set_running_or_notify_cancel():
            return
        if (error := done.exception()) is not None:
            result.set_exception(error)
        else:
            result.set_result(done.result())

    def one_done(done: Future[S]) -> None:
        nonlocal left, over
        failed = done.cancelled() or done.exception() is not None
        with lock:
            left -= 1
            if over or (left and not failed):
                return
            over = True
        if failed:
            copy(done)
            return
        try:
            last = follow([future.result() for future in futures])
        except Exception as error:  # a future carries whatever its work raised
            last = Future()
            last.set_exception(error)
        under_way.append(last)
        if result.cancelled():
            last.cancel()
        last.add_done_callback(copy)

    def cancel(judged: Future[T]) -> None:
        if judged.cancelled():
            for future in under_way:
                future.cancel()

    result.add_done_callback(cancel)
    for future in futures:
        future.add_done_callback(one_done)
    return result
