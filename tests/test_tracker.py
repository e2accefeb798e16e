"""Metrics of a training step in its tracker and in Parquet: each step once, also after a kill."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from graph_toys import step_ids

from spct_ray.config import load
from spct_ray.errors import ConfigError
from spct_ray.learn.metrics_file import MetricsFile, require_tracker
from spct_ray.stages.recipe import Recipe, build_steps

ROOT = Path(__file__).parent.parent
Points = list[tuple[str, int, float]]

WANDB = """
import json, os, pathlib
class Run:
    def __init__(self, path):
        self.path = path
        self.lines = json.loads(path.read_text()) if path.exists() else []
        self.step = self.lines[-1][0] + 1 if self.lines else 0
    def log(self, values, step):
        self.lines.append([step, values])
        self.path.write_text(json.dumps(self.lines))
    def finish(self):
        pass
def init(project, name, id, resume, dir):
    assert (project, resume) == ("spct-ray", "allow")
    return Run(pathlib.Path(os.environ["FAKE_SERVER"], f"{id}.json"))
"""
MLFLOW = """
import json, os, pathlib, types
from mlflow.entities import Metric
class MlflowClient:
    def __init__(self):
        self.root = pathlib.Path(os.environ["FAKE_SERVER"])
    def get_experiment_by_name(self, name):
        return None
    def create_experiment(self, name):
        return name
    def create_run(self, experiment_id, run_name):
        (self.root / "run.json").write_text("[]")
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run"))
    def get_metric_history(self, run_id, key):
        lines = json.loads((self.root / f"{run_id}.json").read_text())
        return [types.SimpleNamespace(step=step) for step, values in lines if key in values]
    def log_batch(self, run_id, metrics):
        path = self.root / f"{run_id}.json"
        lines = json.loads(path.read_text()) + [[metrics[0].step, {m.key: m.value for m in metrics}]]
        path.write_text(json.dumps(lines))
    def set_terminated(self, run_id):
        pass
"""
ENTITIES = """
import collections
Metric = collections.namedtuple("Metric", "key value timestamp step")
"""


def tensorboard_points(directory: Path) -> Points:
    """The scalars of all event files: records of length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    points = []
    for path in sorted(directory.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[12 + length + 4 :]
    return points


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(path: Path, first: int, last: int, tracker: Any, shift: float = 0.0) -> MetricsFile:
    """An attempt that begins at `first`; whole values, which event files keep exactly."""
    file = MetricsFile(path.parent, first, tracker)
    for step in range(first, last):
        file.append({"step": step, "loss": 10.0 - step + shift, "tokens": 7})
    return file


def test_tensorboard_and_parquet_hold_each_step_once_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train(path, 0, 5, "tensorboard")  # killed after its checkpoint of step 3
    train(path, 3, 6, "tensorboard", shift=0.5).close()
    lines = lines_of(path)
    assert [line["step"] for line in lines] == list(range(6))
    expected = [(name, line["step"], line[name]) for line in lines for name in ("loss", "tokens")]
    assert tensorboard_points(tmp_path / "tensorboard") == expected
    assert pq.read_table(tmp_path / "metrics.parquet").to_pylist() == lines


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_with_a_server_is_given_each_step_once_over_restarts(
    tmp_path: Path, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages of the same interface that keep what they are told in a file."""
    packages, server, step_directory = tmp_path / "packages", tmp_path / "server", tmp_path / "grpo-1"
    for directory in (packages / "mlflow", packages / "wandb", server, step_directory):
        directory.mkdir(parents=True)
    (packages / "wandb" / "__init__.py").write_text(WANDB)
    (packages / "mlflow" / "__init__.py").write_text(MLFLOW)
    (packages / "mlflow" / "entities.py").write_text(ENTITIES)
    for name in ("wandb", "mlflow", "mlflow.entities"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("FAKE_SERVER", str(server))
    path = step_directory / "metrics.jsonl"
    train(path, 0, 2, "none")  # turned on later: what came before is made up for
    train(path, 2, 5, tracker)
    train(path, 3, 6, tracker).close()
    (file,) = server.iterdir()
    expected = [[line["step"], {"loss": line["loss"], "tokens": 7}] for line in lines_of(path)]
    assert json.loads(file.read_text()) == expected
    for name in ("wandb", "mlflow", "mlflow.entities"):
        sys.modules.pop(name, None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_tracker("tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"tracker is wandb, but the package wandb is not installed: pip install wandb"
    ):
        require_tracker("wandb")
    require_tracker("none")


def test_one_key_sets_the_tracker_of_every_step_that_trains_and_changes_no_id() -> None:
    demo = str(ROOT / "conf" / "demo.yaml")
    graph = build_steps(load(Recipe, demo, ["bradley_terry={}", "resources.tracker=mlflow"]))
    assert step_ids(graph, 1) == step_ids(build_steps(load(Recipe, demo, ["bradley_terry={}"])), 1)
    steps = {step.name: step for step in graph}
    trains = [steps["grpo"].resources.train, *(steps[name].resources for name in ("rft", "meta", "bradley_terry"))]
    assert [resources.tracker for resources in trains] == ["mlflow"] * 4
    with pytest.raises(ConfigError, match=r"resources\.meta\.tracker: all steps share one, set resources\.tracker"):
        build_steps(load(Recipe, demo, ["resources.meta.tracker=wandb"]))
