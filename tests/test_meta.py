"""The meta RM stage and the scoring of evaluated judgements, on a real Ray with a tiny model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import make_tiny_model

from spct_ray.cluster.sampling import TRAJECTORY_SCHEMA
from spct_ray.data.store import write_items
from spct_ray.errors import DataError
from spct_ray.graph.step import StepContext
from spct_ray.judge.prompt import meta_messages
from spct_ray.learn.examples import ExampleFiles
from spct_ray.learn.scorers import MetaScorer
from spct_ray.learn.train_config import OptimConfig, TrainResources
from spct_ray.records import Item, Message, Trajectory
from spct_ray.stages import meta, meta_scores

CONFIG = meta.MetaConfig(OptimConfig(lr=5e-3), batch_size=16, max_steps=20, heldout_share=0.3, max_tokens=300)
ITEMS = [
    Item(f"item-{i}", (Message("user", "Name a prime"),), ("4", "7"), (0.0, 1.0), source="test") for i in range(24)
]


def trajectory(item: Item, sample: int, right: bool, failure: str = "") -> Trajectory:
    text = f"Analysis: the {'second' if right else 'first'} one wins. Scores: \\boxed{{x}}"
    scores = () if failure else ((3, 8) if right else (8, 3))
    order = (0, 1) if sample % 2 else (1, 0)
    return Trajectory(item.id, sample, order, text, scores, failure, False, False, 1.0, 0, "grpo", 0, 10, 10, "stop")


def write_trajectories(directory: Path, trajectories: list[Trajectory]) -> str:
    (directory / "trajectories").mkdir(parents=True)
    rows = [{"key": t.key, **t.to_row()} for t in trajectories]
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAJECTORY_SCHEMA), directory / "trajectories" / "0.parquet")
    return str(directory)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("meta")
    make_tiny_model(str(root / "student" / "model"), hidden=32, layers=1)
    (root / "items").mkdir()
    for name in ("train", "heldout"):
        write_items(str(root / "items" / f"{name}.parquet"), ITEMS)
    cold_start = [trajectory(item, 0, i % 2 == 0) for i, item in enumerate(ITEMS)]
    hinted = replace(trajectory(ITEMS[0], 1, True), hinted=True)
    tied = replace(trajectory(ITEMS[0], 2, False), scores=(5, 5))
    write_trajectories(root / "sample", [*cold_start, hinted, tied])
    on_policy = [trajectory(item, k, (i + k) % 3 == 0) for i, item in enumerate(ITEMS) for k in range(2)]
    write_trajectories(root / "onpolicy", [*on_policy, trajectory(ITEMS[0], 2, False, "no_box")])
    return root


def make_context(root: Path, name: str, **inputs: str) -> StepContext:
    (root / name).mkdir(exist_ok=True)
    defaults = {role: str(root / role) for role in ("items", "sample", "onpolicy")}
    return StepContext(name, 3, str(root / name), {**defaults, "init": str(root / "student"), **inputs}, "spct run x")


def test_labels_follow_eq_10_and_unparsable_judgements_are_counted_out(root: Path) -> None:
    context, counts = make_context(root, "labels"), Counter[str]()
    labelled = list(meta.labelled_judgements(context, counts))
    assert counts == {"cold_start": 25, "on_policy": 48, "unparsable": 1, "hinted": 1}
    assert all(("second" in j.messages[-1].content) == bool(j.label) for j in labelled)
    assert len(list(meta.labelled_judgements(context, Counter(), "off_policy"))) == 25
    assert len(list(meta.labelled_judgements(context, Counter(), "on_policy"))) == 48
    without = Counter[str]()
    assert len(list(meta.labelled_judgements(context, without, ties=False))) == 72
    assert without["tied"] == 1


def test_heldout_items_share_no_item_with_training(root: Path) -> None:
    counts = meta.write_training_files(make_context(root, "split"), replace(CONFIG, ties=False))
    assert counts["train"] + counts["heldout"] == 72
    assert counts["train"] % 3 == counts["heldout"] % 3 == 0  # three judgements an item stay together
    assert len(ExampleFiles(str(root / "split" / "heldout.arrow"))) == counts["heldout"]
    ids = [f"item-{i}" for i in range(4000)]
    assert 0.27 < sum(meta.is_heldout(i, 0.3, 3) for i in ids) / len(ids) < 0.33


def test_nothing_to_train_on_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="no judgement in the train set"):
        meta.write_training_files(make_context(root, "none"), replace(CONFIG, max_tokens=3))


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=int(300e6), log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_meta_rm_learns_and_scores_evaluated_judgements(root: Path, ray_session: None) -> None:
    context = make_context(root, "meta")
    metrics = meta.run(context, CONFIG, TrainResources(zero_stage=2, threads=1, max_failures=0))
    assert metrics["heldout_auc"] > 0.95
    assert metrics["heldout_accuracy"] > 0.9
    assert metrics["heldout_ece"] < 0.2
    heldout = json.loads((root / "meta" / "heldout.json").read_text())
    assert len(heldout["logits"]) == len(heldout["labels"]) == metrics["heldout"]

    judged = [trajectory(item, k, k == 0) for item in ITEMS for k in range(2)]
    base = write_trajectories(root / "evaluate_base", [*judged, trajectory(ITEMS[3], 5, False, "truncated")])
    grpo = write_trajectories(root / "evaluate_grpo", judged[:3])
    context = make_context(root, "scores", meta=str(root / "meta"), evaluate_base=base, evaluate_grpo=grpo)
    assert meta_scores.run(context, {}, meta_scores.MetaScoresResources()) == {
        "judgements": 51,
        "distinct": 2,  # all items have one query and one pair of responses; the judgement is right or wrong
    }
    rows = pq.read_table(root / "scores" / "logits.parquet").to_pylist()
    assert Counter(row["model"] for row in rows) == {"base": 48, "grpo": 3}
    logits = {(row["model"], row["key"]): row["logit"] for row in rows}
    assert ("base", "item-3/s5") not in logits
    talks = [meta_messages(item, t.order, t.text) for item, t in zip(ITEMS, judged[::2], strict=True)]
    alone = MetaScorer(str(root / "meta" / "model")).score(talks)
    assert [logits["base", t.key] for t in judged[::2]] == pytest.approx(alone, abs=0.05)
    assert min(alone) > max(logits["base", t.key] for t in judged[1::2])
