"""The id of a step: a hash of what it computes. Never of paths, addresses, resources or the time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from spct_ray.config import to_plain
from spct_ray.errors import ConfigError
from spct_ray.graph.step import Step


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a plain value's canonical JSON: equal values, and only they, have equal fingerprints.

    Keys are sorted, tuples equal lists, 1.0 equals 1; floats are written by `repr`, which gives back the same float.
    """
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def topological(steps: Sequence[Step]) -> list[Step]:
    """The steps, each after its inputs, else in the given order. ConfigError on double or unknown names and cycles."""
    names = [step.name for step in steps]
    for step in steps:
        if names.count(step.name) > 1:
            raise ConfigError(f"two steps are named {step.name!r}; names must differ")
        for role, source in step.inputs.items():
            if source not in names:
                raise ConfigError(f"step {step.name!r}: input {role!r} names step {source!r}, which does not exist")
    ordered: dict[str, Step] = {}
    while len(ordered) < len(steps):
        ready = [s for s in steps if s.name not in ordered and all(i in ordered for i in s.inputs.values())]
        if not ready:
            raise ConfigError(
                f"steps wait for each other in a circle: {', '.join(n for n in names if n not in ordered)}"
            )
        ordered[ready[0].name] = ready[0]
    return list(ordered.values())


def step_ids(steps: Sequence[Step], seed: int) -> dict[str, str]:
    """The id of every step, by name."""
    ids: dict[str, str] = {}
    for step in topological(steps):
        ids[step.name] = fingerprint(
            {
                "function": step.function_name,
                "version": step.version,
                "config": step.config,
                "seed": seed,
                "inputs": {role: ids[source] for role, source in step.inputs.items()},
            }
        )
    return ids
