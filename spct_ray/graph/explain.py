"""Says for each step whether it is done, resumes or runs, and why. Imports neither torch nor Ray nor vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spct_ray.graph.fingerprint import step_ids, topological
from spct_ray.graph.record import StepRecord, describe, finished_records, local_root, read_record, step_directory
from spct_ray.graph.step import Step


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One line of a plan, e.g. PlannedStep("grpo", "run", "grpo.beta changed from 0.08 to 0.1", ...)."""

    name: str
    state: Literal["done", "resume", "run"]
    reason: str  # "" when done
    directory: str


def plan(steps: Sequence[Step], root: str, seed: int, reuse: str = "") -> list[PlannedStep]:
    """What a run would do now, in the order of the graph.

    Steps that are finished under the root `reuse` alone are done, too, in their directory there. The reason compares a
    step with the most recently finished one of the same name under this root, else under that. Raises StepError for a
    record that cannot be read, ConfigError for a graph that is none.
    """
    root, ids = local_root(root), step_ids(steps, seed)
    last = {r.name: r for place in (reuse, root) if place for r in finished_records(local_root(place))}
    planned = []
    for step in topological(steps):
        directory = step_directory(root, step.name, ids[step.name])
        if read_record(directory) is not None:
            planned.append(PlannedStep(step.name, "done", "", directory))
            continue
        there = step_directory(local_root(reuse), step.name, ids[step.name]) if reuse else ""
        if there and not os.path.isdir(directory) and read_record(there) is not None:
            planned.append(PlannedStep(step.name, "done", f"in {reuse}", there))
            continue
        before = last.get(step.name)
        reason = "never ran" if before is None else _changes(before, describe(step, ids, seed))
        if os.path.isdir(directory):
            planned.append(PlannedStep(step.name, "resume", f"started but not finished; {reason}", directory))
        else:
            planned.append(PlannedStep(step.name, "run", reason, directory))
    return planned


def link_reused(planned: Sequence[PlannedStep], root: str) -> None:
    """Make the finished steps of another root part of this one, by links: what reads a root finds its whole graph."""
    steps = os.path.join(local_root(root), "steps")
    os.makedirs(steps, exist_ok=True)
    for step in planned:
        own = os.path.join(steps, os.path.basename(step.directory))
        if os.path.islink(own) and not os.path.exists(own):  # what it led to was deleted
            os.remove(own)
        if step.directory != own:
            os.symlink(step.directory, own)


def format_plan(planned: Sequence[PlannedStep]) -> str:
    """The plan as an aligned table, a step a line."""
    width = max(len(step.name) for step in planned)
    return "\n".join(f"  {s.name:<{width}}  {s.state:<6}  {s.reason}".rstrip() for s in planned)


def _changes(before: StepRecord, now: StepRecord) -> str:
    """In words, what makes the two ids differ."""
    changes = []
    if before.function != now.function:
        changes.append(f"function {before.function} -> {now.function}")
    if before.version != now.version:
        changes.append(f"version {before.version} -> {now.version}")
    if before.seed != now.seed:
        changes.append(f"seed changed from {before.seed} to {now.seed}")
    changes += _config_changes(before.config, now.config, now.name)
    for role in sorted(before.inputs.keys() | now.inputs.keys()):
        old, new = before.inputs.get(role), now.inputs.get(role)
        if old is None or new is None:
            changes.append(f"input {role} was {'added' if old is None else 'removed'}")
        elif old["step"] != new["step"]:
            changes.append(f"input {role} is now step {new['step']}, was {old['step']}")
        elif old["id"] != new["id"]:
            changes.append(f"input {role} changed" if role == new["step"] else f"input {role} ({new['step']}) changed")
    if not changes:
        return f"its directory is gone (finished {before.finished_at[:19]})"
    return "because " + ", ".join(changes)


def _config_changes(before: Any, now: Any, key: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        changes = []
        for name in [*now, *(name for name in before if name not in now)]:
            if name not in before:
                changes.append(f"{key}.{name} was added ({_short(now[name])})")
            elif name not in now:
                changes.append(f"{key}.{name} was removed")
            else:
                changes += _config_changes(before[name], now[name], f"{key}.{name}")
        return changes
    return [] if before == now else [f"{key} changed from {_short(before)} to {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
