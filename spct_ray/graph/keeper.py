"""Actors that outlive the step that asked for them, so that the next step like it need not start its own.

A step's process ends with the step, and with it all actors that it made. What takes half a minute to start (an engine)
is made by the keeper instead, under the step's `keeps`; the runner ends it when no running step has that name. Each
driver has one keeper, on its own node, so that nothing is left when a driver dies. What the actors are: `cluster`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_NAME = "spct-keeper"  # in the namespace of the driver's job, which no other job shares


class Keeper:
    """Owns actors by name. One step at a time uses a name (the runner sees to that)."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, Sequence[Any]]] = {}
        self._num_lent = 0

    def keep(
        self, name: str, kind: str, make: Callable[[], Sequence[Any]]
    ) -> Literal["nothing", "the same", "another kind"]:
        """Have actors of the kind under the name: those that are there, else what `make` makes, in place of others.
        Returns what was there."""
        self._num_lent = 0  # so that a step that needs fewer actors than there are takes those that the last one took
        there = self._kept.get(name)
        if there is not None and there[0] == kind:
            return "the same"
        self.end(name)
        self._kept[name] = kind, make()
        return "nothing" if there is None else "another kind"

    def lend(self, name: str) -> Any:
        """One of the name's actors, each in turn, from the first on for each call of `keep`."""
        actors = self._kept[name][1]
        self._num_lent += 1
        return actors[(self._num_lent - 1) % len(actors)]

    def end(self, name: str) -> None:
        """Kill the name's actors, if there are any."""
        for actor in self._kept.pop(name, ("", ()))[1]:
            ray.kill(actor)


def keeper() -> Any:
    """The handle of the driver's keeper; made here, and ending with this process, where the driver has none."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    made = ray.remote(Keeper).options(name=_NAME, get_if_exists=True, num_cpus=0, scheduling_strategy=here)
    return made.remote()
