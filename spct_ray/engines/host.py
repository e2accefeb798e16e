"""One engine and the judge over it, for everyone who asks: sampling and evaluation, rollouts, the service, new weights.

A plain class: `cluster.pool` makes it a Ray actor, `serve` a replica of Ray Serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from spct_ray.engines.base import Engine, Weights
from spct_ray.engines.engine_judge import EngineJudge
from spct_ray.errors import EngineError
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Trajectory


@dataclass(frozen=True)
class JudgeSpec:
    """A judge apart from its weights, see `EngineJudge`; `name` is the model's in its trajectories."""

    prompt: JudgeConfig
    name: str
    guided: bool = False
    in_chunks: bool = False


class EngineHost:
    """Answers calls on one engine, which was started on `model`, from any number of threads.

    Calls name the weights that they are for, so that a host that replaces a dead one loads the newest first. Every
    call raises EngineError, after `engine_died`, where it finds the engine dead.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._weights = Weights(model)
        self._loading = Lock()
        self._judge: tuple[Weights, JudgeSpec, EngineJudge] | None = None

    def load(self, weights: Weights) -> None:
        """Hold these weights; those that it holds already are not loaded again."""
        with self._loading:
            if weights != self._weights:
                self._run(self._engine.reload, weights.directory, weights.version)
                self._weights = weights

    def call(self, weights: Weights, method: str, *arguments: Any) -> Any:
        """Call a method of the engine."""
        self.load(weights)
        return self._run(getattr(self._engine, method), *arguments)

    def judge_block(self, weights: Weights, spec: JudgeSpec, tasks: Sequence[JudgeTask]) -> list[Trajectory]:
        """One trajectory per task, in order."""
        self.load(weights)
        known = self._judge  # read once, as another thread may set it
        if known is None or known[:2] != (weights, spec):
            judge = EngineJudge(self._engine, spec.prompt, spec.name, spec.guided, spec.in_chunks)
            self._judge = known = (weights, spec, judge)
        judged: list[Trajectory] = self._run(known[2].judge, tasks)
        return judged

    def engine_died(self, error: EngineError) -> None:
        """Called with the cause where a call finds the engine dead."""

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except EngineError as error:
            self.engine_died(error)
            raise
