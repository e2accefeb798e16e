"""What a step of the job graph is, what its function is given, and the events it reports. Only the runner knows Ray."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from spct_ray.errors import ConfigError
from spct_ray.placement import Nodes, check_room, gpus_of

PROGRESS_SECONDS = 5.0  # least time between two progress events of one phase


@dataclass(frozen=True)
class Step:
    """One node of the graph. `function(context, config, resources) -> metrics` is marked `@stage` and lives at the top
    level of a module, so that a worker can import it. `inputs` maps each role to the step whose directory is read.

    What it is (function, version, config, inputs) makes its id, see `graph.record`; its resources do not. Steps of
    equal resources whose function `keeps` run one after the other in one process, which keeps what they load.
    """

    name: str
    function: Callable[[Any, Any, Any], dict[str, Any]]
    config: Any
    resources: Any = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def cpus(self) -> float:
        """Of all replicas and ranks in its resources, which it starts; one where there are none."""
        workers = _workers(self.resources)
        return sum(num * cpus for num, cpus, _ in workers) if workers else 1

    @property
    def gpus_of_each(self) -> tuple[float, ...]:
        """Of each replica and rank, on one node. Those left open (None) count once `placed` fills them in."""
        return tuple(gpus for num, _, gpus in _workers(self.resources) for _ in range(num))

    @property
    def keeps(self) -> str:
        """The name of the process that it shares; "" where it has one of its own."""
        return str(self.resources) if self.function.keeps else ""  # type: ignore[attr-defined]

    def placed(self, nodes: Nodes) -> Step:
        """The step with `gpus_per_replica` filled in where that is None: what its engine takes (a model without an
        engine takes one), if the cluster has GPUs."""
        where = self.resources
        if getattr(where, "gpus_per_replica", 0) is not None:
            return self
        engine = getattr(where, "engine", None)
        gpus = gpus_of(None, engine.tensor_parallel if engine else 1, nodes)
        return replace(self, resources=replace(where, gpus_per_replica=gpus))

    def check_room(self, nodes: Nodes) -> None:
        """Raise ConfigError where the step would wait for ever on these nodes, even alone."""
        advice = f"lower the resources of step {self.name} (num_replicas, num_workers), or name a larger cluster"
        check_room({self.name: self.cpus}, {self.name: self.gpus_of_each}, nodes, advice)


def _workers(resources: Any) -> list[tuple[int, float, float]]:
    """Number, CPUs and GPUs of the equal workers of resources, or of each of their fields."""
    for kind in ("replica", "worker"):
        if hasattr(resources, f"num_{kind}s"):
            num, cpus, gpus = (
                getattr(resources, key.format(kind)) for key in ("num_{}s", "cpus_per_{}", "gpus_per_{}")
            )
            return [(num, cpus, gpus or 0.0)]
    fields = dataclasses.fields(resources) if dataclasses.is_dataclass(resources) else ()
    return [worker for f in fields for worker in _workers(getattr(resources, f.name))]


def steps_until(steps: Sequence[Step], last: Sequence[str]) -> list[Step]:
    """Those named in `last` and all that they need, in the given order. Raises ConfigError for a name that is none."""
    names, needed = [step.name for step in steps], set(last)
    if unknown := needed - set(names):
        raise ConfigError(f"--until {', '.join(sorted(unknown))}: no such step; there are {', '.join(names)}")
    while more := {name for step in steps if step.name in needed for name in step.inputs.values()} - needed:
        needed |= more
    return [step for step in steps if step.name in needed]


@dataclass(frozen=True)
class Event:
    """What happened to a step; as text, the line that its log and a console show.

    `text` says how far the step is (`done` of `total` units), `note` anything else.
    """

    step: str
    note: str = ""
    text: str = ""
    state: Literal["", "running", "done", "stopped"] = ""  # that the step is in from now on; "": as before
    done: int = 0
    total: int = 0

    def __str__(self) -> str:
        return f"[{self.step}] {'; '.join(filter(None, (self.text, self.note)))}"


@dataclass
class _Meter:
    """One phase of progress: where and when this attempt began it, and when it last reported."""

    first_done: int
    started: float
    last_done: int
    reported: float = -math.inf


@dataclass(frozen=True)
class StepContext:
    """What the runner gives a step's function: where to write, what to read, how to report. Pickles; usable in workers.

    Events go to `log_file` as lines and, for the driver, to the file beside it as JSON; without a log file, to stdout.
    """

    name: str
    seed: int
    out: str  # this step's own directory; a killed step finds its own partial files here again
    inputs: Mapping[str, str]  # role -> directory of a finished step
    command: str  # the shell command that retries the run
    log_file: str = ""
    _meters: dict[str, _Meter] = field(default_factory=dict, repr=False, compare=False)

    @property
    def events_file(self) -> str:
        """Beside the log file: the step's events over all attempts, a JSON object per line."""
        return f"{self.log_file.removesuffix('.log')}.events"

    def report(self, event: Event) -> None:
        """Tell the driver about an event, and write it to the log."""
        if not self.log_file:
            print(event, flush=True)
            return
        for path, line in ((self.log_file, str(event)), (self.events_file, json.dumps(dataclasses.asdict(event)))):
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, f"{line}\n".encode())
            finally:
                os.close(descriptor)

    def log(self, message: str) -> None:
        """Report a message, each of its lines as a note."""
        for line in message.splitlines() or [""]:
            self.report(Event(self.name, line))

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Report `done` of `total` units, with rate and time left of this attempt; at most every 5 s, and the last."""
        now = time.monotonic()
        meter = self._meters.get(unit)
        if meter is None or done < meter.last_done:  # a new phase, or the same one again
            meter = self._meters[unit] = _Meter(done, now, done)
        finished_again = done >= total and meter.last_done >= total and meter.reported > 0
        meter.last_done = done
        if finished_again or (done < total and now - meter.reported < PROGRESS_SECONDS):
            return
        meter.reported = now
        rate = (done - meter.first_done) / max(now - meter.started, 1e-9)
        speed = f", {rate:.3g}/s, {format_seconds((total - done) / rate)} left" if rate > 0 and done < total else ""
        self.report(Event(self.name, note, f"{done}/{total} {unit}{speed}", done=done, total=total))


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
