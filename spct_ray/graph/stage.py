"""`@stage` marks a function that a recipe can name as a step.

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
from spct_ray.graph.step import Step

F = TypeVar("F", bound=Callable[..., dict[str, Any]])


def stage(version: int, keeps: bool = False) -> Callable[[F], F]:
    """Mark a function as a stage. Raise `version` when the same configuration gives other results: finished steps of
    the old version are then run again. With `keeps`, steps of equal resources share a process, see `Step`."""

    def mark(function: F) -> F:
        function.version, function.keeps = version, keeps  # type: ignore[attr-defined]
        return function

    return mark


def step_of(name: str, path: str, values: Mapping[str, Any], resources: Mapping[str, Any], **inputs: str) -> Step:
    """The step `name` of the stage at the import path `module:function` (a bare name is a module of
    `spct_ray.stages`), from plain values. Raises ConfigError, which names the setting under `steps`."""
    key = f"steps.{name}"
    function = imported(path if ":" in path else f"spct_ray.stages.{path}:run", f"{key}.stage")
    if not hasattr(function, "version"):
        raise ConfigError(f"{key}.stage: {path} is not marked as a stage; put @stage(version=1) of {__name__} above it")
    kinds = [parameter.annotation for parameter in inspect.signature(function, eval_str=True).parameters.values()][1:]
    config, where = (
        _typed(kind, plain, key, part)
        for kind, plain, part in zip(kinds, (values, resources), ("config", "resources"), strict=True)
    )
    return Step(name, function, config, where, inputs)


def _typed(kind: Any, plain: Mapping[str, Any], key: str, part: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return convert(kind, plain, f"{key}.{part}")
    if plain:
        raise ConfigError(f"{key}: the stage has no {part}, found {plain}")
    return None
