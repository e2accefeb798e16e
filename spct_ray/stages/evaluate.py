"""Judgements of held-out items and benchmarks by one model: greedy once, and k_max samples for the votes.

Every smaller k, and meta voting, is computed from these samples by `stages.report`: nothing is generated twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.data.store import judged_files, read_items
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Item
from spct_ray.stages.sample import engine_judge

VERSION = 2


@dataclass(frozen=True)
class EvaluateConfig:
    """`k_max` samples an item at `temperature` (paper: 0.5) and one greedy judgement.

    `single` is the scale for n = 1 at test time (paper: 1..10); it replaces the training prompt's.
    """

    judge: JudgeConfig = field(default_factory=JudgeConfig)
    single: Literal["binary", "scale"] = "scale"
    k_max: int = 8
    temperature: float = 0.5


def run(context: StepContext, config: EvaluateConfig, resources: SamplingResources) -> dict[str, Any]:
    """Judge all held-out and benchmark items; writes trajectories/*.parquet and timing.json."""
    return _judge(context, config, resources, num_greedy=1)


def run_both_orders(context: StepContext, config: EvaluateConfig, resources: SamplingResources) -> dict[str, Any]:
    """The same with two greedy judgements of items with n >= 2, in two orders (of a pair, both)."""
    return _judge(context, config, resources, num_greedy=2)


def _judge(
    context: StepContext, config: EvaluateConfig, resources: SamplingResources, num_greedy: int
) -> dict[str, Any]:
    from spct_ray.cluster.sampling import sample

    files = judged_files(context.inputs["items"]).values()
    items = [item for file in files for item in read_items(str(file))]
    tasks = [task for item in items for task in tasks_of(item, config, context.seed, num_greedy)]
    model = str(Path(context.inputs["judge"]) / "model")
    name = context.name.removeprefix("evaluate_")
    judge = replace(config.judge, single=config.single)
    make_judge = partial(engine_judge, model, resources.engine, judge, name, False)
    return {**sample(tasks, make_judge, context.out, resources, context.progress), "items": len(items)}


def tasks_of(item: Item, config: EvaluateConfig, seed: int, num_greedy: int = 1) -> list[JudgeTask]:
    """`num_greedy` greedy (one for n = 1) and k_max sampled tasks; the orders and seeds are the same for every model,
    so that models pair up."""
    num = len(item.responses)
    greedy = balanced_orders(num, min(num, num_greedy), derive_seed(seed, item.id, "greedy"))
    orders = balanced_orders(num, config.k_max, derive_seed(seed, item.id, "vote"))
    return [
        *(JudgeTask(item, order, j, 0.0, derive_seed(seed, item.id, "greedy", j)) for j, order in enumerate(greedy)),
        *(
            JudgeTask(item, order, k, config.temperature, derive_seed(seed, item.id, "vote", k))
            for k, order in enumerate(orders)
        ),
    ]
