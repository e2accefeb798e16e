"""Feeds the rollouts that a GRPO run dumped through its trainer again: `python jobs/replay.py CONFIG [key=value ...]`.

For looking into an update, or repeating a failure. The arguments are those of the run, made with
resources.grpo.dump_rollouts=true. No engine and no cluster is started and nothing is written; on one rank, whatever the
run had, so sums are equal up to rounding. Prints loss, KL and gradient norm of each step beside what the run logged.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spct_ray.cli import guarded, load_graph
from spct_ray.errors import DataError
from spct_ray.graph.record import describe
from spct_ray.graph.step import StepContext
from spct_ray.learn.metrics_file import read_metrics
from spct_ray.stages.grpo import GrpoConfig, GrpoResources, Phases, policy_trainer, update
from spct_ray.stages.rollouts import RolloutDump

NAMES = ("loss", "kl", "grad_norm")


@dataclass(frozen=True)
class ReplayedStep:
    """One update's `NAMES` as computed now, and as the run logged them (empty where it did not come that far)."""

    step: int
    replayed: dict[str, float]
    logged: dict[str, float]


def replay(context: StepContext, config: GrpoConfig, resources: GrpoResources) -> Iterator[ReplayedStep]:
    """Updates from the dump of the run in `context.out`, in order: from the start or the earliest checkpoint that is
    followed by dumped steps, to the first step without a dump.

    Raises DataError when nothing can be replayed, and whatever the updates raise.
    """
    from spct_ray.learn.checkpoint import complete_steps
    from spct_ray.learn.policy import Reference

    dump, checkpoints = RolloutDump(context.out), f"{context.out}/checkpoints"
    dumped, num_updates = dump.steps(), config.updates_per_batch
    starts = [0, *(updates // num_updates for updates in complete_steps(checkpoints))]
    step = min((start for start in starts if start in dumped), default=None)
    if step is None:
        raise DataError(
            f"{context.out}: no checkpoint is followed by dumped rollouts (dumped steps: {dumped or 'none'}); run with "
            "resources.grpo.dump_rollouts=true, which changes no step's id"
        )
    model = str(Path(context.inputs["rft"]) / "model")
    trainer = policy_trainer(model, config, resources.train, context.seed)
    if step > 0:
        trainer.resume(checkpoints, step * num_updates)
    reference = Reference(model, trainer, resources.train) if config.beta > 0 else None
    logged = {line["step"]: line for line in read_metrics(context.out)}
    while step in dumped:
        numbers = update(trainer, reference, dump.read(step), config, resources.train.micro_tokens, Phases())
        yield ReplayedStep(step, _chosen(numbers), _chosen(logged.get(step, {})))
        step += 1


def _chosen(numbers: dict[str, float]) -> dict[str, float]:
    return {name: numbers[name] for name in NAMES if name in numbers}


def main(config_path: str, overrides: Sequence[str], command: str) -> None:
    """Replay the step "grpo" of the run that the arguments stand for."""
    recipe, steps, root = load_graph(config_path, overrides)
    directories = {name: step.directory(root) for name, step in describe(steps, recipe.seed).items()}
    (grpo,) = (step for step in steps if step.name == "grpo")
    inputs = {role: directories[source] for role, source in grpo.inputs.items()}
    context = StepContext("grpo", recipe.seed, directories["grpo"], inputs, command)
    print("step" + "".join(f"{name:>14}{'logged':>14}" for name in NAMES))
    largest = 0.0
    for line in replay(context, grpo.config, grpo.resources):
        cells = ""
        for name in NAMES:
            now, then = line.replayed.get(name), line.logged.get(name)
            cells += "".join(f"{'-' if value is None else f'{value:.6g}':>14}" for value in (now, then))
            if now is not None and then is not None:
                largest = max(largest, abs(now - then))
        print(f"{line.step:4}{cells}", flush=True)
    print(f"largest difference {largest:.3g}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python jobs/replay.py CONFIG [key=value ...]")
    command = shlex.join(["python", *sys.argv])
    sys.exit(guarded(lambda: main(sys.argv[1], sys.argv[2:], command), command))
