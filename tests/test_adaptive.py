"""What adaptive k saves on stored samples, against numbers made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import adaptive as job
from spct_ray.cluster.sampling import TRAJECTORY_SCHEMA
from spct_ray.config import to_plain
from spct_ray.data.store import write_items
from spct_ray.errors import ConfigError
from spct_ray.graph.record import StepRecord, step_directory, write_record
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Item, Message, Trajectory
from spct_ray.stages.adaptive import savings

# One pair that the first four samples settle, one that no look settles (even), one that four samples give to the wrong
# side, and one that nobody could judge: 4, 8, 4 and 8 of 8 samples, and the third of four decisions differs.
SCORES = [[(9, 1)] * 8, [(9, 1), (1, 9)] * 4, [(1, 9)] * 4 + [(10, 1)] * 4, [()] * 8]


def finish(root: Path, name: str, function: str, inputs: dict[str, str], **config: object) -> Path:
    """A finished step; its id is its name, long enough for a directory."""
    directory = Path(step_directory(str(root), name, name.ljust(12, "0")))
    directory.mkdir(parents=True)
    read = {role: {"step": source, "id": source.ljust(12, "0")} for role, source in inputs.items()}
    record = StepRecord(name, name.ljust(12, "0"), f"spct_ray.stages.{function}", 1, 1, dict(config), read, {})
    write_record(str(directory), record)
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with one evaluated judge, whose meta RM likes earlier samples better."""
    items = [Item(f"i{i}", (Message("user", "Q"),), ("a", "b"), (1.0, 0.0)) for i in range(len(SCORES))]
    write_items(str(finish(tmp_path, "items", "items:run", {}) / "heldout.parquet"), items)
    prompt = to_plain(JudgeConfig(template="compact"))
    evaluated = finish(
        tmp_path, "evaluate_rft", "evaluate:run", {"items": "items"}, judge=prompt, single="scale", k_max=8
    )
    made = [
        Trajectory(item.id, k, (0, 1), "t", s, "" if s else "no_box", False, False, 0.5, k, "rft", 0, 9, 10 + k, "stop")
        for item, rows in zip(items, SCORES, strict=True)
        for k, s in enumerate(rows)
    ]
    greedy = [Trajectory("i0", 0, (0, 1), "t", (1, 9), "", False, False, 0.0, 0, "rft", 0, 9, 99, "stop")]
    rows = [{"key": t.key, **t.to_row()} for t in made[::-1] + greedy]
    (evaluated / "trajectories").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAJECTORY_SCHEMA), evaluated / "trajectories" / "0.parquet")
    scored = finish(tmp_path, "meta_scores", "meta_scores:run", {"items": "items", "evaluate_rft": "evaluate_rft"})
    logits = [{"model": "rft", "key": t.key, "logit": -float(t.sample)} for t in made if not t.failure]
    other = [{"model": "grpo", "key": "i0/s0", "logit": 99.0}]
    pq.write_table(pa.Table.from_pylist(logits + other), scored / "logits.parquet")
    return tmp_path


def test_savings_are_those_of_the_rule_by_hand(root: Path) -> None:
    plain, meta = savings(str(root), [0.05])
    assert (plain.judge, plain.item_set, plain.guided, plain.k_max, plain.num_items) == ("rft", "heldout", False, 8, 4)
    assert plain.mean_k == (4 + 8 + 4 + 8) / 4
    four, eight = sum(range(10, 14)), sum(range(10, 18))
    assert plain.share_of_tokens == pytest.approx((2 * four + 2 * eight) / (4 * eight))
    assert plain.equal == pytest.approx(3 / 4)
    assert plain.equal_ci[0] <= plain.equal <= plain.equal_ci[1]
    assert plain.accuracy == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert plain.accuracy_k_max == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert (meta.guided, meta.equal) == (True, 1.0)  # it keeps the first half, which says the same


def test_the_job_prints_a_table_and_one_object(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    job.main(str(root), "0.01,0.05")
    *table, last = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + 2 * 2
    assert [s["error"] for s in json.loads(last)["savings"]] == [0.01, 0.05, 0.01, 0.05]
    with pytest.raises(ConfigError, match="write numbers"):
        job.main(str(root), "little")
    with pytest.raises(ConfigError, match="no finished evaluation of two samples"):
        list(savings(str(tmp_path_factory.mktemp("empty")), [0.01]))
