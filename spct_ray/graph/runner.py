"""Runs the steps of a job graph as Ray tasks: each step once, whatever is killed and whenever (docs/job-graph.md).

A step's own process commits it, so a dead driver loses no finished step; a killed step is started again in its
directory. Death of a worker or node is retried in place, at most SYSTEM_RETRIES times a step and run. An exception of
the step itself is not: it ends the run with a StepError, after the other running steps have finished.

Steps only coordinate (num_cpus=0); the workers that they start take the CPUs and GPUs. A step is admitted beside
others when its declared demand fits beside theirs in the whole cluster; alone it always starts, so that an autoscaler
can bring what is missing. Steps that share a process (`Step.keeps`) run in it one after the other; it ends, with all
that it owns, when no such step follows at once.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from spct_ray.errors import SpctError, StepError
from spct_ray.graph.record import StepRecord, describe, local_root, read_record
from spct_ray.graph.step import Event, Step, StepContext
from spct_ray.graph.worker import StepProcess, execute

SYSTEM_RETRIES = 2
POLL_SECONDS = 0.5
NODE_CHECK_SECONDS = 5.0
SYSTEM_FAILURES = {  # a dead worker or node, not the step's code
    ray.exceptions.OutOfMemoryError: "the machine ran out of memory, and Ray killed the step's process",
    ray.exceptions.NodeDiedError: "the Ray node that the step ran on died",
    ray.exceptions.LocalRayletDiedError: "the Ray node that the step ran on died",
    ray.exceptions.WorkerCrashedError: "the step's worker process died (killed, out of memory, or crashed)",
    ray.exceptions.ActorDiedError: "the step's process, or one that it had started, died",
    ray.exceptions.ObjectLostError: "data of the step was lost with a worker or node",
}

# max_calls=1: a step's process ends with the step, and with it all memory that torch and others hold.
_execute = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(execute)
_Process = ray.remote(num_cpus=0)(StepProcess)


def run_steps(
    steps: Sequence[Step], root: str, seed: int, command: str, say: Callable[[Event], None]
) -> dict[str, StepRecord]:
    """Finish all steps under `root` on the connected Ray cluster; returns their records by name.

    `command` is the shell command that retries the run, for messages; `say` shows an event. The caller holds the
    root's lock. Raises StepError (step, cause, log file, command).
    """
    return _Run(steps, local_root(root), seed, command, say).finish()


@dataclass
class _Attempt:
    """One running step, and how far its events have been shown."""

    step: Step
    context: StepContext
    number: int  # from 1
    offset: int


class _Run:
    def __init__(self, steps: Sequence[Step], root: str, seed: int, command: str, say: Callable[[Event], None]) -> None:
        self.root, self.seed, self.command, self.say = root, seed, command, say
        self.known, by_name = describe(steps, seed), {step.name: step for step in steps}
        self.waiting = [by_name[name] for name in self.known]
        self.running: dict[ray.ObjectRef, _Attempt] = {}
        self.records: dict[str, StepRecord] = {}
        self.failures: list[StepError] = []
        self.next_node_check = 0.0
        self.processes: dict[str, Any] = {}  # of running steps, or those that just ended, by what they keep

    def finish(self) -> dict[str, StepRecord]:
        while True:
            if not self.failures:
                self._start_ready()
            self._end_processes({attempt.step.keeps for attempt in self.running.values()})
            if not self.running:
                break
            finished, _ = ray.wait(list(self.running), timeout=POLL_SECONDS)
            for attempt in self.running.values():
                self._show_events(attempt)
            for reference in finished:
                self._collect(reference)
            self._check_nodes()
        if self.failures:
            raise self.failures[0]
        return self.records

    def _directory(self, name: str) -> str:
        return self.known[name].directory(self.root)

    def _start_ready(self) -> None:
        for step in list(self.waiting):
            if not all(source in self.records for source in step.inputs.values()):
                continue
            record = read_record(self._directory(step.name))
            if record is not None:
                self.records[step.name] = record
                self.waiting.remove(step)
            elif self._fits(step):
                self.waiting.remove(step)
                self._start(step, number=1)

    def _end_processes(self, used: set[str]) -> None:
        """End the shared processes that no running step is in, so that the place of what they own is free."""
        for keeps in self.processes.keys() - used:
            ray.kill(self.processes.pop(keeps))

    def _fits(self, step: Step) -> bool:
        """Whether the step may start beside what runs; alone, it always may."""
        if step.keeps and any(attempt.step.keeps == step.keeps for attempt in self.running.values()):
            return False
        total = ray.cluster_resources()
        together = [attempt.step for attempt in self.running.values()] + [step]
        cpus, gpus = sum(s.cpus for s in together), sum(sum(s.gpus_of_each) for s in together)
        fits = cpus <= total.get("CPU", 0) and gpus <= total.get("GPU", 0)
        if not fits and not self.running:
            note = (
                f"declares {cpus:g} CPUs and {gpus:g} GPUs; the cluster has {total.get('CPU', 0):g} and "
                f"{total.get('GPU', 0):g} now. It starts, and waits for an autoscaler if it needs more; without one, "
                "lower its resources"
            )
            self.say(Event(step.name, note))
        return fits or not self.running

    def _start(self, step: Step, number: int) -> None:
        log = os.path.join(self.root, "logs", f"{step.name}.log")
        os.makedirs(os.path.dirname(log), exist_ok=True)
        inputs = {role: self._directory(source) for role, source in step.inputs.items()}
        context = StepContext(step.name, self.seed, self._directory(step.name), inputs, self.command, log)
        offset = os.path.getsize(context.events_file) if os.path.exists(context.events_file) else 0
        text = "resumes" if os.path.isdir(context.out) else "starts"
        context.report(Event(step.name, text=text, state="running"))
        task = _execute
        if step.keeps:
            if step.keeps not in self.processes:
                self.processes[step.keeps] = _Process.remote()
            task = self.processes[step.keeps].execute
        reference = task.options(name=step.name).remote(step, context, self.known[step.name])
        self.running[reference] = _Attempt(step, context, number, offset)

    def _collect(self, reference: ray.ObjectRef) -> None:
        """Take a task that ended: its record, another attempt, or its failure."""
        attempt = self.running.pop(reference)
        step, directory = attempt.step, self._directory(attempt.step.name)
        cause, is_system = f"its record is not visible in {directory}: is the root on a shared disk?", False
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            cause, is_system = _cause(error)
            self._end_processes(self.processes.keys() - {step.keeps})
        self._show_events(attempt)
        if (record := read_record(directory)) is not None:  # also where the process died after the commit
            self.records[step.name] = record
        elif is_system and attempt.number <= SYSTEM_RETRIES:
            self.say(Event(step.name, f"{cause}; attempt {attempt.number + 1} of {SYSTEM_RETRIES + 1}"))
            self._start(step, attempt.number + 1)
        else:
            if self.running:
                note = f"failed: {cause}; waiting for {self._names()} to finish, nothing else starts"
                self.say(Event(step.name, note, state="stopped"))
            self.failures.append(self._error(step.name, cause, attempt.context.log_file))

    def _names(self) -> str:
        return ", ".join(attempt.step.name for attempt in self.running.values())

    def _error(self, names: str, cause: str, log: str) -> StepError:
        return StepError(f"step {names} failed: {cause}\n  log:   {log}\n  retry: {self.command}")

    def _check_nodes(self) -> None:
        """Without a living node no task ends, and `ray.wait` says nothing: notice it here."""
        if time.monotonic() < self.next_node_check:
            return
        self.next_node_check = time.monotonic() + NODE_CHECK_SECONDS
        if not any(node["Alive"] for node in ray.nodes()):
            cause = "the Ray node died (its raylet was killed or crashed) and no other is left"
            log = f"{os.path.join(self.root, 'logs')}, and Ray's own under /tmp/ray/session_latest/logs"
            raise self._error(self._names() or "none", cause, log)

    def _show_events(self, attempt: _Attempt) -> None:
        """Show what the step has reported since the last call; half a line waits for the next one."""
        with open(attempt.context.events_file, "rb") as file:
            file.seek(attempt.offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        attempt.offset += len(whole)
        for line in whole.splitlines():
            self.say(Event(**json.loads(line)))


def _cause(error: BaseException) -> tuple[str, bool]:
    """What went wrong in one line, and whether it is one of SYSTEM_FAILURES."""
    if isinstance(error, ray.exceptions.RayTaskError):
        inner: Any = error.cause
        if isinstance(inner, BaseException):
            return _cause(inner)
        return next(line.strip() for line in reversed(str(error).splitlines()) if line.strip()), False
    for kind, text in SYSTEM_FAILURES.items():
        if isinstance(error, kind):
            return text, True
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, SpctError) and len(lines) > 2:  # ours are written to be read; this may hold a traceback
        lines = [f"{lines[0]} ... {lines[-1]}"]
    text = "\n".join(lines)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__, False
