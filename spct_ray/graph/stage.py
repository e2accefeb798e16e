"""`@stage` marks a function that a recipe can name as a step; `make_step` makes the step.

A stage is `function(context, config, resources) -> metrics` at the top level of a module. Its annotations say which
dataclasses its configuration and its resources are; `None` means that it has none.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from spct_ray.config import convert, imported
from spct_ray.errors import ConfigError
from spct_ray.graph.step import Demand, Step

StageFunction = Callable[[Any, Any, Any], dict[str, Any]]
F = TypeVar("F", bound=StageFunction)


def stage(version: int, keeps: bool = False) -> Callable[[F], F]:
    """Mark a function as a stage. Raise `version` when the same configuration gives other results: finished steps of
    the old version are then run again. With `keeps`, steps of equal resources share a process, see `Step`."""

    def mark(function: F) -> F:
        function.version, function.keeps = version, keeps  # type: ignore[attr-defined]
        return function

    return mark


def make_step(
    name: str, function: StageFunction, config: Any, resources: Any = None, inputs: Mapping[str, str] | None = None
) -> Step:
    """The step `name` of a stage; it takes the CPUs and GPUs of its resources, one CPU without any."""
    keeps = str(resources) if function.keeps else ""  # type: ignore[attr-defined]
    version: int = function.version  # type: ignore[attr-defined]
    return Step(name, function, version, config, resources, demand_of(resources), dict(inputs or {}), keeps)


def demand_of(resources: Any) -> Demand:
    """What the replicas or the ranks of a step take, or those of all its resources' fields together; else one CPU."""
    if hasattr(resources, "num_replicas"):
        return Demand.of_replicas(resources)
    if hasattr(resources, "num_workers"):
        num = resources.num_workers
        return Demand(num * resources.cpus_per_worker, (resources.gpus_per_worker,) * num)
    fields = dataclasses.fields(resources) if dataclasses.is_dataclass(resources) else ()
    parts = [getattr(resources, field.name) for field in fields]
    demands = [demand_of(part) for part in parts if hasattr(part, "num_replicas") or hasattr(part, "num_workers")]
    return sum(demands[1:], demands[0]) if demands else Demand(1)


def stage_at(path: str, key: str) -> StageFunction:
    """The stage at the import path `module:function`; a bare name is a module of `spct_ray.stages`. Raises ConfigError,
    which names the setting `key`."""
    function: StageFunction = imported(path if ":" in path else f"spct_ray.stages.{path}:run", key)
    if not hasattr(function, "version"):
        raise ConfigError(f"{key}: {path} is not marked as a stage; put @stage(version=1) of {__name__} above it")
    return function


def typed(function: StageFunction, config: Any, resources: Any, key: str) -> tuple[Any, Any]:
    """Plain values of a configuration and of resources as the dataclasses that the stage takes. Raises ConfigError."""
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    kinds: list[Any] = [parameter.annotation for parameter in parameters][1:]
    found = []
    for kind, values, part in zip(kinds, (config, resources), ("config", "resources"), strict=True):
        if not dataclasses.is_dataclass(kind) and values:
            raise ConfigError(f"{key}: the stage has no {part}, found {values}")
        found.append(convert(kind, values, f"{key}.{part}") if dataclasses.is_dataclass(kind) else None)
    return found[0], found[1]
