"""A judge made of an engine, the prompt and the parser; the same in sampling, evaluation and serving."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from spct_ray.engines.base import Engine, Request, SamplingParams
from spct_ray.errors import RequestError
from spct_ray.judge.judge import JudgeTask, to_trajectory
from spct_ray.judge.prompt import PRINCIPLES_GUIDE, JudgeConfig, guide, judge_messages, principles_messages
from spct_ray.records import Completion, Message, Trajectory


@dataclass(frozen=True, slots=True)
class EngineJudge:
    """Judges with `engine`. `guided` holds the text to the format by structured output and marks the trajectories."""

    engine: Engine
    config: JudgeConfig
    model: str
    guided: bool = False

    def submit(self, task: JudgeTask) -> Future[Trajectory]:
        """One judgement; the future fails with RequestError (too long) or EngineError (engine dead).

        Cancelling it cancels the engine's work.
        """
        result: Future[Trajectory] = Future()
        completions = self.engine.submit(self._request(task))

        def finish(done: Future[tuple[Completion, ...]]) -> None:
            if done.cancelled() or not result.set_running_or_notify_cancel():
                return
            error = done.exception()
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(self._trajectory(task, done.result()[0]))

        completions.add_done_callback(finish)
        result.add_done_callback(lambda judged: completions.cancel() if judged.cancelled() else None)
        return result

    def principles(self, messages: Sequence[Message]) -> Future[tuple[Completion, ...]]:
        """One text with principles for a query, from the conversation alone, greedily (`parse_principles` reads it)."""
        params = SamplingParams(self.config.max_tokens, temperature=0.0, guide=PRINCIPLES_GUIDE if self.guided else "")
        return self.engine.submit(Request(principles_messages(messages, self.config), params))

    def judge(self, tasks: Sequence[JudgeTask]) -> list[Trajectory]:
        """One trajectory a task, in order. A request that the engine refuses is the failure "aborted", with the reason
        as its text; so one item that is too long does not stop the others. Raises EngineError."""
        futures = [self.submit(task) for task in tasks]
        return [self._outcome(task, future) for task, future in zip(tasks, futures, strict=True)]

    def _outcome(self, task: JudgeTask, future: Future[Trajectory]) -> Trajectory:
        try:
            return future.result()
        except RequestError as error:
            return to_trajectory(
                task, self.config, text=str(error), stop_reason="abort", model=self.model, guided=self.guided
            )

    def _request(self, task: JudgeTask) -> Request:
        return Request(
            judge_messages(task.item, task.order, self.config, hint=task.hinted),
            SamplingParams(
                max_tokens=self.config.max_tokens,
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
