"""What a step of the job graph is, and what its function is given. Pure data; Ray is known only to the runner."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from spct_ray.errors import ConfigError

PROGRESS_SECONDS = 5.0  # least time between two progress lines of one phase
PROGRESS = re.compile(  # a line of `StepContext.progress`
    r"(?P<done>\d+)/(?P<total>\d+) (?P<unit>[^,;]+)(?:, (?P<speed>[^;]+))?(?:; (?P<note>.*))?"
)


class Replicas(Protocol):
    """Resources of a step that runs in equal replicas."""

    @property
    def num_replicas(self) -> int: ...
    @property
    def cpus_per_replica(self) -> float: ...
    @property
    def gpus_per_replica(self) -> float | None: ...


@dataclass(frozen=True)
class Demand:
    """CPUs and GPUs that a step's own workers take while it runs; the runner never starts steps that exceed the sum.
    The GPUs of one worker are on one node."""

    cpus: float
    gpus_of_each: tuple[float, ...] = ()

    @classmethod
    def of_replicas(cls, resources: Replicas) -> Demand:
        """What all replicas take together. GPUs that are left open (None) count once `graph.room` fills them in."""
        num = resources.num_replicas
        return cls(num * resources.cpus_per_replica, (resources.gpus_per_replica or 0.0,) * num)

    @property
    def gpus(self) -> float:
        """Of all workers."""
        return sum(self.gpus_of_each)

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.cpus + other.cpus, self.gpus_of_each + other.gpus_of_each)


@dataclass
class _Meter:
    """One phase of progress: where and when this attempt began it, and when it last printed."""

    first_done: int
    started: float
    last_done: int
    last_printed: float


@dataclass(frozen=True)
class StepContext:
    """What the runner gives a step's function: where to write, what to read, how to report. Pickles; usable in workers.

    Lines go to `log_file`, from where the driver prints them on its console; without a log file, to stdout.
    """

    name: str
    seed: int
    out: str  # this step's own directory; a killed step finds its own partial files here again
    inputs: Mapping[str, str]  # role -> directory of a finished step
    command: str  # the shell command that retries the run
    log_file: str = ""
    _meters: dict[str, _Meter] = field(default_factory=dict, repr=False, compare=False)

    def log(self, message: str) -> None:
        """Write one message, a line a line, each beginning with the step's name."""
        lines = "".join(f"{log_prefix(self.name)}{line}\n" for line in message.splitlines() or [""])
        if not self.log_file:
            print(lines, end="", flush=True)
            return
        descriptor = os.open(self.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, lines.encode())
        finally:
            os.close(descriptor)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Report `done` of `total` units, with rate and ETA of this attempt; at most a line every 5 s, and the last."""
        now = time.monotonic()
        meter = self._meters.get(unit)
        if meter is None or done < meter.last_done:  # a new phase, or the same one again
            meter = self._meters[unit] = _Meter(first_done=done, started=now, last_done=done, last_printed=-1e9)
        finished_again = done >= total and meter.last_done >= total and meter.last_printed > 0
        meter.last_done = done
        if finished_again or (done < total and now - meter.last_printed < PROGRESS_SECONDS):
            return
        meter.last_printed = now
        rate = (done - meter.first_done) / max(now - meter.started, 1e-9)
        speed = f", {rate:.3g}/s, {format_seconds((total - done) / rate)} left" if rate > 0 and done < total else ""
        self.log(f"{done}/{total} {unit}{speed}{'; ' + note if note else ''}")


@dataclass(frozen=True)
class Step:
    """One node of the graph. What it is (function, version, config, inputs) makes its id; where it runs does not.

    `function(context, config, resources) -> metrics` lives at the top level of a module, so that a worker can import
    it; `inputs` names, for each role, the step whose finished directory is read. Steps that name the same `keeps` run
    one after the other in one process, which keeps what they load.
    """

    name: str
    function: Callable[[StepContext, Any, Any], dict[str, Any]]
    version: int
    config: Any
    resources: Any
    demand: Demand
    inputs: Mapping[str, str] = field(default_factory=dict)
    keeps: str = ""

    @property
    def function_name(self) -> str:
        """`module:qualname` of the function."""
        return f"{self.function.__module__}:{self.function.__qualname__}"


def steps_until(steps: Sequence[Step], last: Sequence[str]) -> list[Step]:
    """Those named in `last` and all that they need, in the given order. Raises ConfigError for a name that is none."""
    inputs = {step.name: step.inputs.values() for step in steps}
    needed, waiting = set[str](), list(last)
    while waiting:
        name = waiting.pop()
        if name not in inputs:
            raise ConfigError(f"--until {name}: no such step; there are {', '.join(inputs)}")
        if name not in needed:
            needed.add(name)
            waiting.extend(inputs[name])
    return [step for step in steps if step.name in needed]


def log_prefix(name: str) -> str:
    """How each line that a step wrote through its context begins, in its log file and on the console."""
    return f"[{name}] "


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
