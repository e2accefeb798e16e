"""Where the time of a GRPO step goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from spct_ray.stages.rollouts import Rollout


class Phases:
    """Seconds of one step by phase. A checkpoint is written after its step's line, so it counts for the next one."""

    def __init__(self) -> None:
        self._begin_step()

    def _begin_step(self) -> None:
        self._started = time.monotonic()
        self._seconds = dict.fromkeys(("checkpoint", "sync", "parity", "rollout", "reference", "train"), 0.0)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[name] += time.monotonic() - started

    def finish_step(self, groups: Sequence[Sequence[Rollout]], rollout_seconds: float) -> dict[str, float]:
        """Seconds by phase and in all, and completion tokens per second; the next step begins here.

        `rollout_seconds` is what the engines took, also beside other phases.
        """
        all_seconds, seconds = time.monotonic() - self._started, self._seconds
        tokens = sum(len(rollout.engine_logprobs) for group in groups for rollout in group)
        self._begin_step()
        return {
            **{f"seconds_{name}": round(value, 4) for name, value in seconds.items()},
            "seconds_step": round(all_seconds, 4),
            "tokens_per_second": round(tokens / all_seconds, 1),
            "rollout_tokens_per_second": round(tokens / rollout_seconds, 1),
        }
