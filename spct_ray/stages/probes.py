"""`spct evaluate --suite robustness`: benchmark items changed by probes, and the report of who was fooled.

`run` writes bench_<number>.parquet (0 is "clean", then `spct_ray.evaluation.robustness.PROBES`), which the ordinary
evaluate stage judges; `report` writes summary.json, pairs.parquet (every changed item beside the judges' choices) and
index.html.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spct_ray.errors import DataError
from spct_ray.graph.record import write_atomically
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.seeds import derive_seed

_SHOWN = 6  # fooled items of each judge, way and probe on the page


@dataclass(frozen=True)
class RobustnessConfig:
    """The numbers of samples that a vote takes; the largest is reported."""

    ks: tuple[int, ...]


@stage(version=4)
def run(context: StepContext, config: Mapping[str, Any], _: None) -> dict[str, Any]:
    """Write the clean and the changed items. Raises DataError when no item can be probed."""
    from spct_ray.data.store import judged_files, read_items, write_items
    from spct_ray.evaluation.robustness import probe_items

    items = [item for file in judged_files(context.inputs["items"]).values() for item in read_items(str(file))]
    found = probe_items(items, context.seed)
    if not found["clean"]:
        raise DataError("robustness: no item with several responses and one best among the benchmarks")
    for number, made in enumerate(found.values()):
        write_items(str(Path(context.out) / f"bench_{number:02d}.parquet"), made)
    return {name: len(made) for name, made in found.items()}


@stage(version=4)
def report(context: StepContext, config: RobustnessConfig, _: None) -> dict[str, Any]:
    """Write the report; the metrics hold the tables for the terminal."""
    import numpy as np

    from spct_ray.data.store import judged_files, read_items, write_rows
    from spct_ray.evaluation import page, robustness, votes
    from spct_ray.evaluation.judgements import best_credit, decided
    from spct_ray.stages.report import judge_names, judged_tables

    names = ("clean", *(probe.name for probe in robustness.PROBES))
    files = judged_files(context.inputs["items"]).values()
    items = {name: read_items(str(file)) for name, file in zip(names, files, strict=True)}
    seed, summary, rows = derive_seed(context.seed, "robustness"), dict[str, Any](), list[dict[str, Any]]()
    for judge in judge_names(context.inputs):
        tables = judged_tables(context.inputs, judge, {n: made for n, made in items.items() if made})
        ways: dict[str, Any] = {}
        for way in ("greedy", f"vote@{max(config.ks)}"):
            credit, answered = {n: np.zeros(0) for n in names}, {n: np.zeros(0) for n in names}
            for name, (_made, samples, greedy) in tables.items():
                table = greedy if way == "greedy" or samples is None else samples
                (decision,) = votes.decide("sum", table, votes.draw(table, table.num_samples, 1, 0), 1)
                credit[name] = best_credit(table.sheet, decision.scores_IO)
                answered[name] = decided(decision.scores_IO).astype(float)
                rows += _pairs(judge, way, name, items[name], decision.scores_IO, credit[name])
            flips = {"order flip": _flips(tables["clean"][2], seed)} if way == "greedy" else {}
            ways[way] = flips | robustness.rates(items, credit, answered, seed)
            ways[f"{way} clean accuracy"] = float(credit["clean"].mean())
        summary[judge] = ways
    result = {"suite": "robustness", "num_items": len(items["clean"]), "judges": summary}
    out = Path(context.out)
    write_rows(str(out / "pairs.parquet"), rows)
    write_atomically(str(out / "summary.json"), (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    made = robustness.tables(result)
    about = {"command": context.command, "items": f"{result['num_items']:,}"}
    sections = [page.Section("Who is fooled", made)]
    note = "Items that fooled a judge; their scores are sums over its judgements."
    html = page.render("Robustness", about, sections, page.Samples(_fooled(rows), ("judge", "probe"), note))
    write_atomically(str(out / "index.html"), html.encode())
    return {"summary_text": "\n\n".join(table.text() for table in made)}


def _fooled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
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


def _flips(greedy: Any, seed: int) -> dict[str, Any]:
    """Share of items whose greedy winner differs between two orders, both parsed."""

    from spct_ray.evaluation.statistics import bootstrap_ci

    winner = greedy.winners_IKO
    both = greedy.used_IK.all(axis=1)
    differ = (winner[:, 0] != winner[:, 1]).any(axis=-1)[both].astype(float)
    return {
        "what": "the same item in another order gets another winner",
        "counted": "both parsed",
        "rate": float(differ.mean()) if len(differ) else None,
        "ci": list(bootstrap_ci(differ, seed)) if len(differ) else None,
        "num_items": len(differ),
        "undecided": int((~both).sum()),
    }


def _pairs(judge: str, way: str, probe: str, items: Any, scores_IO: Any, credit_I: Any) -> list[dict[str, Any]]:
    import math

    return [
        {
            "judge": judge,
            "way": way,
            "probe": probe,
            "item_id": item.id,
            "query": item.messages[-1].content,
            "responses": list(item.responses),
            "best": item.best,
            "scores": [] if math.isnan(scores[0]) else [float(s) for s in scores[: len(item.responses)]],
            "credit": float(credit),
        }
        for item, scores, credit in zip(items, scores_IO, credit_I, strict=True)
    ]
