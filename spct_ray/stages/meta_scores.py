"""Meta-RM logits of all evaluated judgements, for the meta votes of the report. Judgements without scores get none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.prompt import meta_messages
from spct_ray.records import Message

_BLOCK = 256  # judgements sent to a scorer at once


@dataclass(frozen=True)
class MetaScoresResources:
    """Scorers side by side and what each takes; null GPUs: one on a cluster with GPUs, else none."""

    num_replicas: int = 1
    cpus_per_replica: float = 1
    gpus_per_replica: float | None = 0


@stage(version=2)
def run(context: StepContext, _: Mapping[str, Any], resources: MetaScoresResources) -> dict[str, Any]:
    """Score the judgements of all inputs "evaluate_*" with input "meta"; writes logits.parquet (model, key, logit)."""
    import pyarrow as pa

    from spct_ray.data.store import write_rows
    from spct_ray.learn.scorers import MetaScorer

    rows = list(judgements(context))
    distinct = list(dict.fromkeys(messages for _, _, messages in rows))  # a confident judge often says the same again
    blocks = [distinct[i : i + _BLOCK] for i in range(0, len(distinct), _BLOCK)]
    logits: list[float] = []
    for answer in score_in_actors(MetaScorer, context.inputs["meta"], blocks, resources):
        logits += answer
        context.progress(len(logits), len(distinct), "distinct judgements")
    logit_of = dict(zip(distinct, logits, strict=True))
    write_rows(
        f"{context.out}/logits.parquet",
        [{"model": model, "key": key, "logit": logit_of[messages]} for model, key, messages in rows],
        pa.schema([("model", pa.string()), ("key", pa.string()), ("logit", pa.float64())]),
    )
    return {"judgements": len(rows), "distinct": len(distinct)}


def score_in_actors(
    scorer: type[Any], step: str, blocks: Sequence[Any], resources: MetaScoresResources
) -> Iterator[Any]:
    """`score(block)` for each block, in order, by actors of `scorer` that hold the model of the finished step in the
    directory `step`."""
    import ray

    model = str((Path(step) / "model").resolve())
    kind = ray.remote(scorer).options(
        num_cpus=resources.cpus_per_replica, num_gpus=resources.gpus_per_replica, max_restarts=2, max_task_retries=2
    )
    replicas = [kind.remote(model) for _ in range(min(resources.num_replicas, len(blocks)))]
    yield from ray.util.ActorPool(replicas).map(lambda actor, block: actor.score.remote(block), blocks)
    for replica in replicas:
        ray.kill(replica)


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
