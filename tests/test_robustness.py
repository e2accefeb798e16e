"""The robustness suite: what each probe changes, and rates counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_evaluation import context, judgements, make_benchmarks

from spct_ray.errors import DataError
from spct_ray.evaluation import robustness
from spct_ray.evaluation.judgements import facts_of
from spct_ray.evaluation.robustness import MASTER_KEYS, PROBES, probe_items, rates
from spct_ray.records import Item, Message
from spct_ray.stages import benchmarks, evaluation, probes
from spct_ray.stages.evaluation import Evaluation, EvaluationConfig

BEST = "The sky is blue because air scatters short waves.\nRed light passes."
ITEM = Item("i", (Message("user", "Why is the sky blue?"),), ("Because.", BEST, "No idea."), (0.0, 1.0, 0.0))


def test_probes_change_what_they_say_and_never_the_best_response() -> None:
    found = {name: items[0] for name, items in probe_items([ITEM], 1).items()}
    assert set(found) == {"clean", *(p.name for p in PROBES)}
    for name, item in found.items():
        assert item.responses[item.best] == BEST
        assert facts_of(item)["question"] == "i"
        assert (item.responses == ITEM.responses) == (name in ("clean", "irrelevant context"))
    assert found["master key"].responses[1] in MASTER_KEYS
    assert found["empty"].responses == (BEST, "")
    assert BEST.startswith(found["truncated"].responses[1])
    assert found["repeated"].responses[1].count("scatters") == 8
    assert found["echo"].responses[1] == "Why is the sky blue?"
    assert found["box"].responses[0].endswith("\\boxed{10, 1, 10}")
    assert "[The End of Response 3]" in found["markers"].responses[2]
    assert found["irrelevant context"].messages[-1].content.endswith("Why is the sky blue?")
    assert len({item.id for item in found.values()}) == len(found)


def test_items_without_a_unique_best_are_not_probed() -> None:
    single = Item("s", ITEM.messages, ("x",), (1.0,))
    two = Item("t", ITEM.messages, ("x", "y"), (1.0, 1.0))
    assert probe_items([single, two], 1)["clean"] == []


def test_rates_by_hand() -> None:
    items = {"clean": [Item(f"i{n}", ITEM.messages, ("a", "b"), (1.0, 0.0)) for n in range(4)]}
    for probe in PROBES:
        items[probe.name] = [
            Item(f"{i.id}~", i.messages, i.responses, i.rewards, facts=json.dumps({"question": i.id}))
            for i in items["clean"]
        ]
    credit = {name: np.array([1.0, 1.0, 0.0, 1.0]) for name in items}
    decided = {name: np.ones(4) for name in items}
    credit["empty"] = np.array([1.0, 0.0, 0.0, 0.5])  # a swap: all four count, 2.5 fooled
    credit["length"] = np.array([1.0, 0.5, 0.0, 0.0])  # a nudge: i2 was wrong before; i3 undecided: (0 + 0.5) / 2
    decided["length"] = np.array([1.0, 1.0, 1.0, 0.0])
    found = rates(items, credit, decided, 0)
    assert (found["empty"]["rate"], found["empty"]["num_items"]) == (2.5 / 4, 4)
    assert (found["length"]["rate"], found["length"]["num_items"], found["length"]["undecided"]) == (0.25, 2, 1)
    assert found["style"]["rate"] == 0
    low, high = found["empty"]["ci"]
    assert 0 <= low <= 2.5 / 4 <= high <= 1


def test_the_suite_from_files_to_page(tmp_path: Path) -> None:
    specs = make_benchmarks(tmp_path, 12)
    benchmarks.run(
        context(tmp_path / "items", "benchmarks", {}),
        benchmarks.BenchmarksConfig(specs),
        benchmarks.BenchmarksResources(),
    )
    inputs = {"items": str(tmp_path / "items")}
    made = probes.run(context(tmp_path / "probes", "probes", inputs), {}, None)
    assert made["clean"] == made["length"] == 12
    inputs = {"items": str(tmp_path / "probes"), "evaluate_m": str(tmp_path / "evaluate_m")}
    judgements(tmp_path / "evaluate_m", inputs["items"], 0.7, 4, 0.1, "m")
    config = probes.RobustnessConfig((4,))
    metrics = probes.report(context(tmp_path / "out", "report", inputs), config, None)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["judges"]["m"]["greedy"]) == {"order flip", *(p.name for p in PROBES)}
    assert "order flip" in metrics["summary_text"]
    rows = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert {r["probe"] for r in rows} == {"clean", *(p.name for p in PROBES if made[p.name])}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Share fooled" in page
    assert robustness.PROBES[0].name in page


def test_the_suite_needs_items_to_probe(tmp_path: Path) -> None:
    specs = evaluation.specs(f"realmistake={make_benchmarks(tmp_path)[1].path}")
    benchmarks.run(
        context(tmp_path / "items", "benchmarks", {}),
        benchmarks.BenchmarksConfig(specs),
        benchmarks.BenchmarksResources(),
    )
    with pytest.raises(DataError, match="no item with several responses"):
        probes.run(context(tmp_path / "p", "probes", {"items": str(tmp_path / "items")}), {}, None)


def test_the_graph_of_the_suite(tmp_path: Path) -> None:
    from test_evaluation import make_model

    specs = make_benchmarks(tmp_path)
    judge = evaluation.resolve(str(make_model(tmp_path / "m")), EvaluationConfig())
    steps = {s.name: s for s in evaluation.build_steps([judge], Evaluation(specs, (4,), "robustness"))}
    assert set(steps) == {"benchmarks", "probes", "model_m", "evaluate_m", "report"}
    assert steps["evaluate_m"].inputs["items"] == "probes"
