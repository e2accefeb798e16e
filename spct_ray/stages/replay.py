"""A GRPO run's dumped rollouts through its trainer again, without engines: to look into an update, or repeat a failure.

Reads the run's step directory and writes nothing. On one rank, whatever the run had; the sums are the same but for
rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spct_ray.errors import DataError
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
