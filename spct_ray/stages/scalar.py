"""Scores of benchmark items by a scalar reward model, each response by itself: a baseline for `spct evaluate`.

Outputs: scores.parquet (item_id, scores, tokens read) and timing.json. One pass without resume: no text is generated.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from typing import Any

from spct_ray.files import write_atomically
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.stages.meta_scores import MetaScoresResources, score_in_actors

_BLOCK = 64  # items sent to a scorer at once


@stage(version=1)
def run(context: StepContext, _: Mapping[str, Any], resources: MetaScoresResources) -> dict[str, Any]:
    """Score all items of input "items" with input "judge". Raises ConfigError for a model without one output."""
    from spct_ray.data.store import judged_files, read_items, write_rows
    from spct_ray.learn.scorers import RewardModel

    files = judged_files(context.inputs["items"]).values()
    items = [item for file in files for item in read_items(str(file))]
    blocks = [items[i : i + _BLOCK] for i in range(0, len(items), _BLOCK)]
    conversations = [[(item.messages, response) for item in block for response in item.responses] for block in blocks]
    started, rows = time.monotonic(), list[dict[str, Any]]()
    answers = score_in_actors(RewardModel, context.inputs["judge"], conversations, resources)
    for block, answer in zip(blocks, answers, strict=True):
        pairs = iter(answer)
        for item in block:
            scores, tokens = zip(*itertools.islice(pairs, len(item.responses)), strict=True)
            rows.append({"item_id": item.id, "scores": list(scores), "tokens": sum(tokens)})
        context.progress(len(rows), len(items), "items")
    write_rows(f"{context.out}/scores.parquet", rows)
    num_replicas = min(resources.num_replicas, len(blocks))
    timing = {"engine_seconds": (time.monotonic() - started) * num_replicas, "items": len(items)}
    write_atomically(f"{context.out}/timing.json", json.dumps(timing).encode())
    return {"items": len(items), "responses": sum(len(item.responses) for item in items)}
