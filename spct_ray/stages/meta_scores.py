"""Meta-RM logits of all evaluated judgements, for the meta votes of the report. Judgements without scores get none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spct_ray.graph.step import StepContext
from spct_ray.judge.prompt import meta_messages
from spct_ray.records import Message

VERSION = 2

_BLOCK = 256  # judgements sent to a scorer at once


@dataclass(frozen=True)
class MetaScoresConfig:
    """Nothing to choose: the meta RM and the judgements are inputs."""


@dataclass(frozen=True)
class MetaScoresResources:
    """Scorers side by side and what each takes; null GPUs: one on a cluster with GPUs, else none."""

    num_replicas: int = 1
    cpus_per_replica: float = 1
    gpus_per_replica: float | None = 0


def run(context: StepContext, config: MetaScoresConfig, resources: MetaScoresResources) -> dict[str, Any]:
    """Score the judgements of all inputs "evaluate_*" with input "meta"; writes logits.parquet (model, key, logit)."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray

    from spct_ray.learn.meta import MetaScorer

    rows = list(judgements(context))
    distinct = list(dict.fromkeys(messages for _, _, messages in rows))  # a confident judge often says the same again
    scorer = ray.remote(MetaScorer).options(
        num_cpus=resources.cpus_per_replica, num_gpus=resources.gpus_per_replica, max_restarts=2, max_task_retries=2
    )
    model = str((Path(context.inputs["meta"]) / "model").resolve())
    blocks = [distinct[i : i + _BLOCK] for i in range(0, len(distinct), _BLOCK)]
    replicas = [scorer.remote(model) for _ in range(min(resources.num_replicas, len(blocks)))]
    pool = ray.util.ActorPool(replicas)
    logits: list[float] = []
    for answer in pool.map(lambda actor, block: actor.score.remote(block), blocks):
        logits += answer
        context.progress(len(logits), len(distinct), "distinct judgements")
    for replica in replicas:
        ray.kill(replica)
    logit_of = dict(zip(distinct, logits, strict=True))
    table = pa.table(
        {
            "model": pa.array([model for model, _, _ in rows], pa.string()),
            "key": pa.array([key for _, key, _ in rows], pa.string()),
            "logit": pa.array([logit_of[messages] for _, _, messages in rows], pa.float64()),
        }
    )
    pq.write_table(table, f"{context.out}/logits.parquet.tmp")
    os.replace(f"{context.out}/logits.parquet.tmp", f"{context.out}/logits.parquet")
    return {"judgements": len(rows), "distinct": len(distinct)}


def judgements(context: StepContext) -> Iterator[tuple[str, str, tuple[Message, ...]]]:
    """(name of the judge, key, what the meta RM reads) of every parsed judgement of every "evaluate_*" input."""
    from spct_ray.cluster.sampling import read_trajectories
    from spct_ray.data.store import judged_files, read_items

    files = judged_files(context.inputs["items"]).values()
    items = {item.id: item for file in files for item in read_items(str(file))}
    for role in sorted(role for role in context.inputs if role.startswith("evaluate_")):
        for t in read_trajectories(context.inputs[role]):
            if not t.failure:
                yield role.removeprefix("evaluate_"), t.key, meta_messages(items[t.item_id], t.order, t.text)
