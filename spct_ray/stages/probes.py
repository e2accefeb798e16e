"""`spct evaluate --suite robustness`: benchmark items changed by probes, and the report of who was fooled.

`run` writes bench_<number>.parquet (0 is "clean", then `spct_ray.evaluation.robustness.PROBES`), which the ordinary
evaluate stage judges; `report` writes summary.json, pairs.parquet (every changed item beside the judges' choices) and
index.html.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spct_ray.data.store import judged_files, read_items, write_items, write_rows
from spct_ray.errors import DataError
from spct_ray.evaluation import robustness, votes
from spct_ray.evaluation.judgements import best_credit, decided
from spct_ray.graph.record import write_atomically
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.seeds import derive_seed
from spct_ray.stages.report import judge_names, read_judge

_SHOWN = 6  # fooled items of each judge, way and probe on the page


@dataclass(frozen=True)
class RobustnessConfig:
    """The numbers of samples that a vote takes; the largest is reported."""

    ks: tuple[int, ...]


@stage(version=4)
def run(context: StepContext, config: Mapping[str, Any], _: None) -> dict[str, Any]:
    """Write the clean and the changed items. Raises DataError when no item can be probed."""
    items = [item for file in judged_files(context.inputs["items"]).values() for item in read_items(str(file))]
    by_probe = robustness.probe_items(items, context.seed)
    if not by_probe["clean"]:
        raise DataError("robustness: no item with several responses and one best among the benchmarks")
    for number, made in enumerate(by_probe.values()):
        write_items(f"{context.out}/bench_{number:02d}.parquet", made)
    return {name: len(made) for name, made in by_probe.items()}


@stage(version=5)
def report(context: StepContext, config: RobustnessConfig, _: None) -> dict[str, Any]:
    """Write the report; the metrics hold the tables for the terminal."""
    from spct_ray.evaluation import page  # brings matplotlib

    names = ("clean", *(probe.name for probe in robustness.PROBES))
    files = judged_files(context.inputs["items"]).values()
    items = {name: read_items(str(file)) for name, file in zip(names, files, strict=True)}
    seed, judges, rows = derive_seed(context.seed, "robustness"), dict[str, Any](), list[dict[str, Any]]()
    for judge in judge_names(context.inputs):
        judged = read_judge(context.inputs, judge, {name: made for name, made in items.items() if made})
        ways = judges[judge] = dict[str, Any]()
        for way in ("greedy", f"vote@{max(config.ks)}"):
            credit, answered = {n: np.zeros(0) for n in names}, {n: np.zeros(0) for n in names}
            for name, of in judged.items():
                table = of.greedy if way == "greedy" else of.votable
                (decision,) = votes.decide("sum", table, votes.draw(table, table.num_samples, 1, 0), 1)
                credit[name] = best_credit(table.sheet, decision.scores_IO)
                answered[name] = decided(decision.scores_IO).astype(float)
                rows += [
                    {
                        "judge": judge,
                        "way": way,
                        "probe": name,
                        "item_id": item.id,
                        "query": item.messages[-1].content,
                        "responses": list(item.responses),
                        "best": item.best,
                        "scores": [] if math.isnan(scores[0]) else scores[: len(item.responses)].tolist(),
                        "credit": float(share),
                    }
                    for item, scores, share in zip(items[name], decision.scores_IO, credit[name], strict=True)
                ]
            flips = {"order flip": robustness.flips(judged["clean"].greedy, seed)} if way == "greedy" else {}
            ways[way] = flips | robustness.rates(items, credit, answered, seed)
            ways[f"{way} clean accuracy"] = float(credit["clean"].mean())
    result = {"suite": "robustness", "num_items": len(items["clean"]), "judges": judges}
    write_rows(f"{context.out}/pairs.parquet", rows)
    write_atomically(f"{context.out}/summary.json", (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    tables, about = robustness.tables(judges), {"command": context.command, "items": f"{result['num_items']:,}"}
    note = "Items that fooled a judge; their scores are sums over its judgements."
    samples = page.Samples(_fooled(rows), ("judge", "probe"), note)
    html = page.render("Robustness", about, [page.Section("Who is fooled", tables)], samples)
    write_atomically(f"{context.out}/index.html", html.encode())
    return {"summary_text": "\n\n".join(table.text() for table in tables)}


def _fooled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first fooled items of each judge, way and probe, as samples of the page; all are in pairs.parquet."""
    shown, seen = [], Counter[tuple[str, str, str]]()
    for row in rows:
        key = (row["judge"], row["way"], row["probe"])
        if row["probe"] == "clean" or not row["scores"] or row["credit"] == 1 or seen[key] == _SHOWN:
            continue
        seen[key] += 1
        responses = [
            {"text": text, "score": f"{score:g}", "mark": "best" if i == row["best"] else ""}
            for i, (text, score) in enumerate(zip(row["responses"], row["scores"], strict=True))
        ]
        outcome = "tied" if row["credit"] else "wrong"
        shown.append({"judge": row["judge"], "probe": row["probe"], "tags": [row["way"]], "outcome": outcome,
                      "badge": row["probe"], "query": [row["query"]], "responses": responses})  # fmt: skip
    return shown
