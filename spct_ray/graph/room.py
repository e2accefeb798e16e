"""Steps on a cluster: fills in the GPUs that they leave open, and refuses steps for which there is no room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spct_ray.graph.step import Demand, Step
from spct_ray.placement import Nodes, check_room, gpus_of


def placed(step: Step, nodes: Nodes) -> Step:
    """The step with `gpus_per_replica` of its resources filled in where that is None: what its engine takes (a model
    without an engine takes one), if the cluster has GPUs."""
    where = step.resources
    if getattr(where, "gpus_per_replica", 0) is not None:
        return step
    engine = getattr(where, "engine", None)
    where = replace(where, gpus_per_replica=gpus_of(None, engine.tensor_parallel if engine else 1, nodes))
    return replace(step, resources=where, demand=Demand.of_replicas(where), keeps=str(where) if step.keeps else "")


def check(steps: Sequence[Step], nodes: Nodes) -> None:
    """Raise ConfigError for the first step that would wait for ever on these nodes, even alone."""
    for step in steps:
        advice = f"lower the resources of step {step.name} (num_replicas, num_workers), or name a larger cluster"
        check_room({step.name: step.demand.cpus}, {step.name: step.demand.gpus_of_each}, nodes, advice)
