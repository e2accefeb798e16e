"""A tiny graph for the runner's tests, and a driver: `python -m graph_toys ROOT [FAIL]` runs it as `spct run` would.

left ─┐
      ├─> total        Each step writes numbered parts and appends a line to `<root>/calls` for the call and for
right ┘                every part it computes. `left` stops at GATE until a file appears, so that tests can kill it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spct_ray.cli import guarded, run_graph
from spct_ray.cluster.session import ClusterResources
from spct_ray.graph.record import describe
from spct_ray.graph.stage import stage
from spct_ray.graph.step import Step, StepContext

GATE = 3  # the part before which `left` waits


@dataclass(frozen=True)
class PartsConfig:
    num_parts: int = 5
    factor: float = 1.5


@dataclass(frozen=True)
class PartsResources:
    gate: str = ""  # file to wait for before part GATE
    fail: bool = False


def parts(context: StepContext, config: PartsConfig, resources: PartsResources) -> dict[str, Any]:
    _note(context, "call")
    print("printed by the step")
    for number in range(config.num_parts):
        path = os.path.join(context.out, f"part-{number}.json")
        if os.path.exists(path):
            continue
        if number == GATE and resources.gate:
            with open(f"{resources.gate}.new", "w") as file:
                json.dump({"worker": os.getpid(), "raylet": os.getppid()}, file)
            os.replace(f"{resources.gate}.new", f"{resources.gate}.reached")
            wait_until(lambda: os.path.exists(resources.gate))
        if resources.fail:
            raise ValueError("part went wrong\n  in two lines\nbadly")
        with open(f"{path}.tmp", "w") as file:
            json.dump((number + context.seed) * config.factor, file)
        os.replace(f"{path}.tmp", path)
        _note(context, f"part {number}")
        context.progress(number + 1, config.num_parts, "parts")
    return {"num_parts": config.num_parts}


@stage(version=1)
def left(context: StepContext, config: PartsConfig, resources: PartsResources) -> dict[str, Any]:
    return parts(context, config, resources)


@stage(version=1)
def right(context: StepContext, config: PartsConfig, resources: PartsResources) -> dict[str, Any]:
    return parts(context, config, resources)


@stage(version=1)
def total(context: StepContext, config: PartsConfig, resources: PartsResources) -> dict[str, Any]:
    _note(context, "call")
    result = 0.0
    for role in sorted(context.inputs):
        for number in range(config.num_parts):
            with open(os.path.join(context.inputs[role], f"part-{number}.json")) as file:
                result += json.load(file) * (2 if role == "left" else 1)
    with open(os.path.join(context.out, "summary.json"), "w") as file:
        json.dump({"total": result}, file)
    return {"total": result, "summary_text": f"the total is {result}"}


def toy_steps(gate: str = "", fail: bool = False, config: PartsConfig | None = None) -> list[Step]:
    return [
        Step("left", left, config or PartsConfig(), PartsResources(gate=gate)),
        Step("right", right, PartsConfig(factor=2.0), PartsResources(fail=fail)),
        Step("total", total, PartsConfig(), PartsResources(), {"left": "left", "right": "right"}),
    ]


def step_ids(steps: Sequence[Step], seed: int) -> dict[str, str]:
    return {name: step.id for name, step in describe(steps, seed).items()}


class Pid:
    def pid(self) -> int:
        return os.getpid()


def _actor() -> Any:
    import ray

    return ray.remote(Pid).options(num_cpus=1).remote()


_kept: list[Any] = []  # of this process


@stage(version=1, keeps=True)
def keep_actor(context: StepContext, config: None, _: None) -> dict[str, Any]:
    """Make an actor where the process has none, and log through a handler of the process; who both are."""
    import ray

    if not _kept:
        _kept.append(_actor())
        logging.getLogger("toys").addHandler(logging.StreamHandler())
    logging.getLogger("toys").warning("warns %s", context.name)
    return {"process": os.getpid(), "actor": ray.get(_kept[0].pid.remote(), timeout=60)}


@stage(version=1)
def own_actor(context: StepContext, config: None, _: None) -> dict[str, Any]:
    """The same, in a process of its own."""
    return keep_actor(context, config, _)


def wait_until(condition: Any, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what the test waits for did not happen")
        time.sleep(0.02)


def _note(context: StepContext, what: str) -> None:
    with open(os.path.join(os.path.dirname(os.path.dirname(context.out)), "calls"), "a") as file:
        file.write(f"{context.name} {what}\n")


def drive(root: str, fail: bool) -> int:
    steps = toy_steps(gate=f"{root}.gate", fail=fail)
    cluster = ClusterResources(num_cpus=2, object_store_gib=0.1)
    return guarded(lambda: run_graph(steps, root, 7, cluster, "spct run toy.yaml"), "spct run toy.yaml")


if __name__ == "__main__":
    import graph_toys  # the steps' functions must live in a module that workers can import, not in __main__

    sys.exit(graph_toys.drive(sys.argv[1], fail=len(sys.argv) > 2))
