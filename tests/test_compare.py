"""`spct evaluate --stored` on roots made by hand, and what balanced orders save, against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_evaluation import PROMPT, is_right, judgement, judgements, make_model

from spct_ray.cli import main
from spct_ray.config import to_plain
from spct_ray.data.builtin import BuiltinConfig
from spct_ray.data.store import judged_files, read_items, write_items
from spct_ray.evaluation.judgements import tabulate
from spct_ray.evaluation.votes import compare_orders, draw_independent
from spct_ray.graph.record import StepRecord, step_directory, write_record
from spct_ray.graph.step import StepContext
from spct_ray.records import Item, Message, Trajectory
from spct_ray.stages import unseen
from spct_ray.stages.evaluate import EvaluateConfig, tasks_of

NUM = 24


def pairs(num: int = NUM, single: int = 0) -> list[Item]:
    ask = (Message("user", "Name a prime."),)
    rows = [Item(f"p{i}", ask, ("7", f"{2 * i + 4}"), (1.0, 0.0)) for i in range(num)]
    return rows + [Item(f"s{i}", ask, ("7",), (1.0,)) for i in range(single)]


def make_run(
    root: Path,
    skill: float,
    items_id: str = "items0000000",
    k: int = 8,
    sets: dict[str, BuiltinConfig] | None = None,
    num: int = NUM,
) -> Path:
    """A root with what `spct evaluate --stored` reads of a finished run: one judge, and a meta RM that knows what is
    right; with `sets`, the step that adds them stands for the items."""

    def record(
        name: str, step_id: str, inputs: dict[str, str], config: Any, metrics: dict[str, Any] | None = None
    ) -> Path:
        sources = {role: {"step": role, "id": one} for role, one in inputs.items()}
        directory = Path(step_directory(str(root), name, step_id))
        directory.mkdir(parents=True, exist_ok=True)
        write_record(str(directory), StepRecord(name, step_id, "f", 1, 1, config, sources, {}, metrics or {}))
        return directory

    items = record("items", items_id, {}, {})
    content = write_items(str(items / "heldout.parquet"), pairs(num, single=4))
    record("items", items_id, {}, {}, {"content": {"heldout": content}})
    (items / "data_report.json").write_text("{}")
    if sets:
        plain = items.rename(root / "plain")
        record("items", items_id, {}, {})
        context = StepContext("unseen", 1, str(items), {"items": str(plain)}, "")
        unseen.run(context, unseen.UnseenConfig(sets, heldout_size=10), None)
    inputs = {"items": items_id, "judge": "judge0000000"}
    made = record("evaluate_grpo", "e" * 12, inputs, to_plain(EvaluateConfig(PROMPT, "scale", k, 0.7)))
    judgements(made, str(items), skill, k, 0.05, root.name)
    make_model(Path(step_directory(str(root), "judge", "judge0000000")) / "model")
    make_model(Path(step_directory(str(root), "meta", "meta00000000")) / "model")
    scores = record("meta_scores", "s" * 12, {"evaluate_grpo": "e" * 12, "meta": "meta00000000"}, {})
    by_id = {item.id: item for file in judged_files(str(items)).values() for item in read_items(str(file))}
    rows = [
        {
            "model": name,
            "key": row["key"],
            "logit": 3.0 if (name == "grpo") == is_right(row, by_id[row["item_id"]]) else 0.0,
        }
        for name in ("rft", "grpo")  # of another judge, with the same keys
        for row in pq.read_table(made / "trajectories").to_pylist()
        if not row["failure"]
    ]
    pq.write_table(pa.Table.from_pylist(rows), scores / "logits.parquet")
    return root


def test_runs_stand_side_by_side_from_what_they_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weak, strong = make_run(tmp_path / "weak", 0.6), make_run(tmp_path / "strong", 0.9)
    assert main(["evaluate", "--stored", str(weak), f"{strong}:grpo", "--root", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    block = json.loads((tmp_path / "out" / "summary.json").read_text())["benchmarks"]["heldout"]
    assert list(block["models"]) == ["weak_grpo", "strong_grpo"]
    assert block["paired"]["strong_grpo - weak_grpo, vote@8"]["difference"] > 0.1
    model = block["models"]["weak_grpo"]
    assert model["meta_rm"]["auc"] == 1.0  # its own logits, not those of the other judge with the same keys
    assert model["k_meta"]["1"]["score"] > model["k_meta"]["8"]["score"] == model["vote"]["8"]["score"]
    one = model["vote"]["1"]
    assert 0 < one["undecided_rate"] < 0.2
    assert one["score"] == pytest.approx(one["right_of_decided"] * (1 - one["undecided_rate"]))
    assert set(model["orders"]) == {"2", "4"}  # 8 samples show each order four times
    assert model["orders"]["2"]["num_items"] == NUM
    for words in ("Meta vote@8 by k_meta", "Orders of pairs at equal k", "weak_grpo, 4", "weak_grpo, meta, error 0.01"):
        assert words in out
    for early in model["adaptive"].values():
        assert early["differ_ci"][0] <= early["differ_from_k_max"] <= early["differ_ci"][1]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "how many of the samples it keeps" in page
    assert "Orders of pairs at equal k" in page


def test_unseen_sets_stand_beside_the_held_out_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three = BuiltinConfig(0, 12, (3,), (1.0,))
    root = make_run(tmp_path / "run", 0.9, k=3, sets={"three": three})
    assert main(["evaluate", "--stored", str(root), "--k", "1,3", "--root", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = summary["benchmarks"]
    assert {label: block["num_questions"] for label, block in found.items()} == {"heldout": 10, "three": 12}
    assert found["three"]["chance"] == pytest.approx(1 / 3)
    assert set(found["three"]["models"]["run_grpo"]["by_subset"]) == {"n = 3", "3 responses"}
    assert [block["in_distribution"] for block in found.values()] == [True, False]
    assert all("meta_rm" in block["models"]["run_grpo"] for block in found.values())
    assert "own items (three): official score in % of 12 questions" in capsys.readouterr().out


def test_many_runs_are_compared_with_the_first(tmp_path: Path) -> None:
    roots = [make_run(tmp_path / name, 0.7, k=2) for name in ("a", "b", "c", "d")]
    assert main(["evaluate", "--stored", *map(str, roots), "--k", "1,2", "--root", str(tmp_path / "out")]) == 0
    block = json.loads((tmp_path / "out" / "summary.json").read_text())["benchmarks"]["heldout"]
    pairs = [name.partition(",")[0] for name in block["paired"] if name.endswith(", greedy")]
    assert pairs == ["b_grpo - a_grpo", "c_grpo - a_grpo", "d_grpo - a_grpo"]


def test_what_cannot_be_compared_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make_run(tmp_path / "one", 0.7, k=2), make_run(tmp_path / "other", 0.7, "itemsB000000", k=2)
    revised = make_run(tmp_path / "revised", 0.7, k=2, num=NUM - 1)  # the same step, of a hub data set that changed
    for arguments, message in (
        ([str(one), str(other), "--k", "1,2"], "were evaluated on different items"),
        ([str(one), str(revised), "--k", "1,2"], "were evaluated on different items"),
        ([str(one), "--k", "4"], "--k must name numbers from 1 to 2, the samples an item that one_grpo drew"),
        ([str(one), str(one), "--k", "2"], "the targets have equal names"),
        ([f"{one}:sft"], "not 'sft'"),
        ([f"{one}:rft"], "no finished evaluation of rft"),
        ([str(tmp_path)], "is no run"),
    ):
        assert main(["evaluate", "--stored", *arguments, "--root", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def leaning(item: Item, k: int) -> list[Trajectory]:
    """A judge who always likes what stands first: right in one order, wrong in the other."""
    import random

    tasks = [task for task in tasks_of(item, EvaluateConfig(PROMPT, "scale", k), 1) if task.temperature]
    return [judgement(task, task.order[0] == item.best, False, "m", random.Random(0)) for task in tasks]


def test_balanced_orders_save_what_a_judge_that_leans_loses() -> None:
    items = pairs(200, single=3)
    table = tabulate(items, [t for item in items for t in leaning(item, 8)], 5.5)
    taken = draw_independent(table, 4, 50, 0)[:200]
    assert (taken.sum(axis=-1) == 4).all()
    found = compare_orders(table, 2, 0)
    assert found is not None
    # The judge scores the first one 6..9 and the other 2..5, by the same numbers every time: both orders cancel out.
    assert found["balanced"] == {"accuracy": 0.5, "variance": 0.0}
    # Two coins: right and wrong a quarter of the time each, else tied (half): variance 2 x 1/4 x (1/2)^2 = 1/8.
    assert found["independent"]["accuracy"] == pytest.approx(0.5, abs=0.01)
    assert found["independent"]["variance"] == pytest.approx(0.125, abs=0.005)
    assert found["num_items"] == 200
    assert found["difference"]["variance"]["ci"][1] < 0
    assert compare_orders(table, 8, 0) is None  # each order was shown four times only
    assert compare_orders(table, 1, 0) is None
