"""Says for each step whether it is done, resumes or runs, and why. Imports neither torch nor Ray nor vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spct_ray.graph.record import StepRecord, describe, finished_records, local_root, read_record
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
    last = {r.name: r for place in (reuse, root) if place for r in finished_records(local_root(place))}
    planned = []
    for step in describe(steps, seed).values():
        directory, is_begun = step.directory(root), os.path.isdir(step.directory(root))
        if read_record(directory) is not None:
            planned.append(PlannedStep(step.name, "done", "", directory))
        elif reuse and not is_begun and read_record(step.directory(reuse)) is not None:
            planned.append(PlannedStep(step.name, "done", f"in {reuse}", step.directory(reuse)))
        else:
            reason = _changes(last[step.name], step) if step.name in last else "never ran"
            reason = f"started but not finished; {reason}" if is_begun else reason
            planned.append(PlannedStep(step.name, "resume" if is_begun else "run", reason, directory))
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
    changes = _differences(_identity(before), _identity(now))
    for role, source in now.inputs.items():
        old = before.inputs.get(role, source)
        if old["step"] == source["step"] and old["id"] != source["id"]:
            name = role if role == source["step"] else f"{role} ({source['step']})"
            changes.append(f"input {name} changed")
    if not changes:
        return f"its directory is gone (finished {before.finished_at[:19]})"
    return "because " + ", ".join(changes)


def _identity(step: StepRecord) -> dict[str, Any]:
    what = {"function": step.function, "version": step.version, "seed": step.seed, step.name: step.config}
    return what | {"inputs": {role: source["step"] for role, source in step.inputs.items()}}


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Each changed value of two plain values by its full key."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        full = {name: f"{key}.{name}" if key else name for name in [*now, *before]}
        kept = [c for name in now if name in before for c in _differences(before[name], now[name], full[name])]
        added = [f"{full[name]} was added ({_short(now[name])})" for name in now if name not in before]
        return kept + added + [f"{full[name]} was removed" for name in before if name not in now]
    return [] if before == now else [f"{key} changed from {_short(before)} to {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
