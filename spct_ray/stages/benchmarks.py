"""Benchmarks read, refused where unusable, and checked against training data: the items that `spct evaluate` judges.

Outputs: bench_<label>.parquet and data_report.json (by label: rows, items, dropped by reason, layout, contamination).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from spct_ray.data.store import read_items, write_items
from spct_ray.data.validate import Limits, decontaminate
from spct_ray.evaluation.benchmarks import BenchmarkSpec, find, read_benchmark
from spct_ray.evaluation.judgements import Sheet
from spct_ray.evaluation.results import layout
from spct_ray.graph.record import write_atomically
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext


@dataclass(frozen=True)
class BenchmarksConfig:
    """`limit` draws so many rows of each benchmark. `train` holds ids of the steps whose training items are searched
    for the benchmarks' queries by n-grams of `words` words; contaminated items are counted, not dropped."""

    benchmarks: tuple[BenchmarkSpec, ...]
    limit: int | None = None
    limits: Limits = field(default_factory=Limits)
    train: tuple[str, ...] = ()
    words: int = 13


@dataclass(frozen=True)
class BenchmarksResources:
    """Where the steps of `BenchmarksConfig.train` lie."""

    train: tuple[str, ...] = ()


@stage(version=3)
def run(context: StepContext, config: BenchmarksConfig, resources: BenchmarksResources) -> dict[str, Any]:
    """Write the items and the report. Raises ConfigError and DataError, see `spct_ray.evaluation.benchmarks`."""
    train = [item for directory in resources.train for item in read_items(f"{directory}/train.parquet")]
    report: dict[str, Any] = {}
    for spec in config.benchmarks:
        context.log(f"reading {spec.label} from {spec.path or 'the hub'}")
        items, dropped = read_benchmark(spec, config.limits, config.limit, context.seed)
        content = write_items(f"{context.out}/bench_{spec.label}.parquet", items)
        # Searched the other way round: which of the benchmark's items overlap a training query.
        _, overlaps = decontaminate(items, train, config.words)
        report[spec.label] = {
            "name": spec.name,
            "title": find(spec.name).title,
            "num_items": len(items),
            "content": content,
            "num_questions": Sheet.of(items).num_questions,
            "layout": layout(items),
            "dropped": asdict(dropped),
            "contaminated": [overlap.item.id for overlap in overlaps] if train else None,
        }
    write_atomically(f"{context.out}/data_report.json", json.dumps(report, indent=2).encode())
    return {
        label: {"items": r["num_items"], "dropped": r["dropped"]["counts"], "content": r["content"]}
        for label, r in report.items()
    }
