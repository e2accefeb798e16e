"""Scores of benchmark items by a scalar reward model, each response by itself: a baseline for `spct evaluate`.

Outputs: scores.parquet (item_id, scores, tokens read) and timing.json. One pass without resume: no text is generated.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spct_ray.graph.record import write_atomically
from spct_ray.graph.step import StepContext
from spct_ray.stages.meta_scores import MetaScoresResources

VERSION = 1

_BLOCK = 64  # items sent to a scorer at once


@dataclass(frozen=True)
class ScalarConfig:
    """Nothing to choose: the model and the items are inputs."""


def run(context: StepContext, config: ScalarConfig, resources: MetaScoresResources) -> dict[str, Any]:
    """Score all items of input "items" with input "judge". Raises ConfigError for a model without one output."""
    import ray

    from spct_ray.data.store import judged_files, read_items, write_rows
    from spct_ray.learn.scalar import RewardModel

    files = judged_files(context.inputs["items"]).values()
    items = [item for file in files for item in read_items(str(file))]
    scorer = ray.remote(RewardModel).options(
        num_cpus=resources.cpus_per_replica, num_gpus=resources.gpus_per_replica, max_restarts=2, max_task_retries=2
    )
    model = str((Path(context.inputs["judge"]) / "model").resolve())
    blocks = [items[i : i + _BLOCK] for i in range(0, len(items), _BLOCK)]
    replicas = [scorer.remote(model) for _ in range(min(resources.num_replicas, len(blocks)))]
    pool = ray.util.ActorPool(replicas)
    asked = [[(item.messages, response) for item in block for response in item.responses] for block in blocks]
    started, rows = time.monotonic(), list[dict[str, Any]]()
    for block, answers in zip(blocks, pool.map(lambda actor, one: actor.score.remote(one), asked), strict=True):
        place = 0
        for item in block:
            found = answers[place : place + len(item.responses)]
            place += len(item.responses)
            scores, tokens = [score for score, _ in found], sum(tokens for _, tokens in found)
            rows.append({"item_id": item.id, "scores": scores, "tokens": tokens})
        context.progress(len(rows), len(items), "items")
    for replica in replicas:
        ray.kill(replica)
    write_rows(f"{context.out}/scores.parquet", rows)
    timing = {"engine_seconds": (time.monotonic() - started) * len(replicas), "items": len(items)}
    write_atomically(f"{context.out}/timing.json", json.dumps(timing).encode())
    return {"items": len(items), "responses": sum(len(item.responses) for item in items)}
