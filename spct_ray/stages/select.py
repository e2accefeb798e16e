"""Rejective selection (Eq. 10, Section 4.1): from trajectories to the SFT set."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from spct_ray.data.store import read_items, write_rows
from spct_ray.errors import DataError
from spct_ray.files import write_atomically
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.prompt import JudgeConfig, judge_messages
from spct_ray.judge.rule import select

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SFT_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("key", pa.string()),
        ("num_responses", pa.int32()),
        ("prompt", _MESSAGES),
        ("completion", pa.string()),
    ]
)


@dataclass(frozen=True)
class SelectConfig:
    """The prompt of the student: the hint is never part of it, whatever the sampler saw. `reject_easy` rejects items
    whose unhinted samples are all correct, as the paper does."""

    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reject_easy: bool = True


@stage(version=3)
def run(context: StepContext, config: SelectConfig, _: None) -> dict[str, Any]:
    """Write sft.parquet and select_report.json (counts by reason). Raises DataError when none is left."""
    from spct_ray.cluster.sampling import read_trajectories

    items = {item.id: item for item in read_items(str(Path(context.inputs["items"]) / "train.parquet"))}
    sft: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for item_id, group in groupby(read_trajectories(context.inputs["sample"]), key=lambda t: t.item_id):
        item = items[item_id]
        selection = select(item, list(group), config.reject_easy)
        counts.update(selection.counts)
        for t in selection.accepted:
            prompt = [m.to_row() for m in judge_messages(item, t.order, config.judge)]
            row = {"item_id": item_id, "key": t.key, "num_responses": len(item.responses)}
            sft.append(row | {"prompt": prompt, "completion": t.text})
    if not sft:
        raise DataError(
            f"no judgement was accepted, counts by reason: {dict(counts)}. A sampler that cannot write the format "
            "needs sample.sampler.guided=true; one that is always right needs harder items"
        )
    write_rows(f"{context.out}/sft.parquet", sft, SFT_SCHEMA)
    report = {"accepted": len(sft), "counts": dict(sorted(counts.items()))}
    write_atomically(f"{context.out}/select_report.json", json.dumps(report, indent=1).encode())
    context.log(f"accepted {len(sft)} judgements; " + ", ".join(f"{k} {v}" for k, v in sorted(counts.items())))
    return report
