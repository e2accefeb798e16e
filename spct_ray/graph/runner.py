"""Runs the steps of a job graph as Ray tasks. What it guarantees, whatever is killed and whenever:

* **Record last.** A step's directory `<root>/steps/<name>-<id>` counts as finished from the moment `record.json` is
  renamed into it, and never before. The step's own process writes it, so a dead driver loses no finished step.
* **No step is repeated.** A finished step with the same id is used as it is. Changing a step's function, version,
  config, seed or inputs changes its id and thereby its directory, so old output is never served for a new config.
* **Resume in place.** A killed step is started again in the same directory and finds its partial files there. How much
  of the work it repeats, and whether the result is bit-equal, is the step's own promise (docs/job-graph.md).
* **One writer.** Each step's process holds a lock on its directory and each driver one on the root: an orphan of a
  killed run cannot write beside its successor, and a second driver waits and says for whom.
* **Death of a worker or node** (killed, out of memory, crashed) is retried in place while Ray lives, at most
  SYSTEM_RETRIES times a step and run. An exception of the step itself is not: it ends the run with a StepError, after
  the other running steps have finished. The same command then goes on from there.

Steps only coordinate (num_cpus=0); the workers that they start take the CPUs and GPUs. A step is admitted beside
others when its declared demand fits beside theirs in the whole cluster; alone it always starts, so that an autoscaler
can bring what is missing. Steps that share a process (`Step.keeps`) run in it one after the other; it ends, with all
that it owns, when no such step follows at once. Not here: locks and ids (`lock.py`, `fingerprint.py`), what a step's
process does (`worker.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from spct_ray.errors import SpctError, StepError
from spct_ray.graph.fingerprint import step_ids, topological
from spct_ray.graph.record import StepRecord, describe, local_root, log_path, read_record, step_directory
from spct_ray.graph.step import Step, StepContext, log_prefix
from spct_ray.graph.worker import StepProcess, execute

SYSTEM_RETRIES = 2
POLL_SECONDS = 0.5
NODE_CHECK_SECONDS = 5.0

# max_calls=1: a step's process ends with the step, and with it all memory that torch and others hold.
_execute = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(execute)
_Process = ray.remote(num_cpus=0)(StepProcess)


def run_steps(
    steps: Sequence[Step], root: str, seed: int, command: str, say: Callable[[str], None]
) -> dict[str, StepRecord]:
    """Finish all steps under `root` on the connected Ray cluster; returns their records by name.

    `command` is the shell command that retries the run, for messages; `say` prints a line on the console. The caller
    holds the root's lock. Raises StepError (step, cause, log file, command).
    """
    return _Run(steps, local_root(root), seed, command, say).finish()


@dataclass
class _Attempt:
    """One running step, and how far its log has been shown."""

    step: Step
    number: int  # from 1
    log_offset: int


class _Run:
    def __init__(self, steps: Sequence[Step], root: str, seed: int, command: str, say: Callable[[str], None]) -> None:
        self.root, self.seed, self.command, self.say = root, seed, command, say
        self.waiting = topological(steps)
        self.ids = step_ids(steps, seed)
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
                self._show_log(attempt)
            for reference in finished:
                self._collect(reference)
            self._check_nodes()
        if self.failures:
            raise self.failures[0]
        return self.records

    def _directory(self, name: str) -> str:
        return step_directory(self.root, name, self.ids[name])

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
        demands = [attempt.step.demand for attempt in self.running.values()] + [step.demand]
        cpus, gpus = sum(d.cpus for d in demands), sum(d.gpus for d in demands)
        fits = cpus <= total.get("CPU", 0) and gpus <= total.get("GPU", 0)
        if not fits and not self.running:
            self.say(
                f"{log_prefix(step.name)}declares {cpus:g} CPUs and {gpus:g} GPUs; the cluster has "
                f"{total.get('CPU', 0):g} and {total.get('GPU', 0):g} now. It starts, and waits for an autoscaler "
                "if it needs more; without one, lower its resources"
            )
        return fits or not self.running

    def _start(self, step: Step, number: int) -> None:
        log = log_path(self.root, step.name)
        os.makedirs(os.path.dirname(log), exist_ok=True)
        context = StepContext(
            name=step.name,
            seed=self.seed,
            out=self._directory(step.name),
            inputs={role: self._directory(source) for role, source in step.inputs.items()},
            command=self.command,
            log_file=log,
        )
        offset = os.path.getsize(log) if os.path.exists(log) else 0
        context.log("resumes" if os.path.isdir(context.out) else "starts")
        task = _execute
        if step.keeps:
            if step.keeps not in self.processes:
                self.processes[step.keeps] = _Process.remote()
            task = self.processes[step.keeps].execute
        reference = task.options(name=step.name).remote(step, context, describe(step, self.ids, self.seed))
        self.running[reference] = _Attempt(step, number, offset)

    def _collect(self, reference: ray.ObjectRef) -> None:
        """Take a task that ended: its record, another attempt, or its failure."""
        attempt = self.running.pop(reference)
        step = attempt.step
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            self._show_log(attempt)
            record = read_record(self._directory(step.name))
            if record is not None:  # died after the commit
                self.records[step.name] = record
                return
            cause, is_system = _cause(error)
            self._end_processes(self.processes.keys() - {step.keeps})
            if is_system and attempt.number <= SYSTEM_RETRIES:
                self.say(f"{log_prefix(step.name)}{cause}; attempt {attempt.number + 1} of {SYSTEM_RETRIES + 1}")
                self._start(step, attempt.number + 1)
            else:
                self._fail(step, cause)
            return
        self._show_log(attempt)
        record = read_record(self._directory(step.name))
        if record is None:
            self._fail(
                step, f"its record is not visible in {self._directory(step.name)}: is the root on a shared disk?"
            )
        else:
            self.records[step.name] = record

    def _fail(self, step: Step, cause: str) -> None:
        error = StepError(
            f"step {step.name} failed: {cause}\n  log:   {log_path(self.root, step.name)}\n  retry: {self.command}"
        )
        others = ", ".join(attempt.step.name for attempt in self.running.values())
        if others:
            self.say(f"{log_prefix(step.name)}failed: {cause}; waiting for {others} to finish, nothing else starts")
        self.failures.append(error)

    def _check_nodes(self) -> None:
        """Without a living node no task ends, and `ray.wait` says nothing: notice it here."""
        if time.monotonic() < self.next_node_check:
            return
        self.next_node_check = time.monotonic() + NODE_CHECK_SECONDS
        if not any(node["Alive"] for node in ray.nodes()):
            names = ", ".join(attempt.step.name for attempt in self.running.values()) or "none"
            raise StepError(
                f"step {names} failed: the Ray node died (its raylet was killed or crashed) and no other is left\n"
                f"  log:   {os.path.join(self.root, 'logs')}, and Ray's own under /tmp/ray/session_latest/logs\n"
                f"  retry: {self.command}"
            )

    def _show_log(self, attempt: _Attempt) -> None:
        """Print the whole lines that the step has written through its context since the last call."""
        prefix = log_prefix(attempt.step.name)
        with open(log_path(self.root, attempt.step.name), "rb") as file:
            file.seek(attempt.log_offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        attempt.log_offset += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if line.startswith(prefix):
                self.say(line)


def _cause(error: BaseException) -> tuple[str, bool]:
    """What went wrong in one line, and whether a system failure (a dead worker or node) rather than the step's code."""
    if isinstance(error, ray.exceptions.RayTaskError):
        inner: Any = error.cause
        if isinstance(inner, BaseException):
            return _cause(inner)
        return next(line.strip() for line in reversed(str(error).splitlines()) if line.strip()), False
    words: Mapping[type, str] = {
        ray.exceptions.OutOfMemoryError: "the machine ran out of memory, and Ray killed the step's process",
        ray.exceptions.NodeDiedError: "the Ray node that the step ran on died",
        ray.exceptions.LocalRayletDiedError: "the Ray node that the step ran on died",
        ray.exceptions.WorkerCrashedError: "the step's worker process died (killed, out of memory, or crashed)",
        ray.exceptions.ActorDiedError: "the step's process, or one that it had started, died",
        ray.exceptions.ObjectLostError: "data of the step was lost with a worker or node",
    }
    for kind, text in words.items():
        if isinstance(error, kind):
            return text, True
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, SpctError) and len(lines) > 2:  # ours are written to be read; this may hold a traceback
        lines = [f"{lines[0]} ... {lines[-1]}"]
    text = "\n".join(lines)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__, False
