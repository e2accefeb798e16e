"""Runs steps inside a worker process: their lock, their log, their commit. Knows no Ray, so it is tested without."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator

from spct_ray.graph.lock import hold
from spct_ray.graph.record import StepRecord, package_versions, read_record, write_record
from spct_ray.graph.step import Event, Step, StepContext, format_seconds

ORPHAN_SECONDS = 300.0  # how long an orphan of a killed run may go on; Ray ends one within about a minute


def execute(step: Step, context: StepContext, known: StepRecord) -> None:
    """Run the step in `context.out` and commit it. `known` is its record as far as it is known before the run.

    An orphan of an earlier, killed run may still work in the directory: its lock is waited for, and when it finished
    the step in the meantime there is nothing left to do. Raises what the step's function raises, after logging it.
    """
    os.makedirs(os.path.dirname(context.log_file), exist_ok=True)
    with hold(os.path.join(context.out, ".lock"), f"step {step.name}", context.log, ORPHAN_SECONDS):
        if read_record(context.out) is not None:
            return
        started = time.monotonic()
        with _output_to(context.log_file):
            try:
                metrics = step.function(context, step.config, step.resources)
            except BaseException:
                traceback.print_exc()
                raise
        seconds = time.monotonic() - started
        record = dataclasses.replace(
            known,
            metrics=metrics,
            seconds=round(seconds, 3),
            finished_at=datetime.datetime.now(datetime.UTC).isoformat(),
            hostname=platform.node(),
            packages=package_versions(),
        )
        write_record(context.out, record)
        context.report(Event(step.name, text=f"done in {format_seconds(seconds)}", state="done"))


class StepProcess:
    """Runs steps one after the other, so that one finds what the one before it left in the process (engines)."""

    def execute(self, step: Step, context: StepContext, known: StepRecord) -> None:
        execute(step, context, known)


@contextlib.contextmanager
def _output_to(path: str) -> Iterator[None]:
    """Send this process's stdout and stderr, and those of its children, to a file's end."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(path, "a", buffering=1, encoding="utf-8", errors="replace") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        # Log handlers hold on to a stream, so it must outlive the step: one on the descriptor, wherever that leads.
        output = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                yield
        finally:
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
