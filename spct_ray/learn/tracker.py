"""Metrics where people watch them: TensorBoard, Weights & Biases, MLflow. Each is a copy of metrics.jsonl, the record.

A tracker says from which step on it has nothing, and is given each step once, also over restarts. The packages are
imported when they are asked for.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from spct_ray.errors import ConfigError
from spct_ray.learn.config import TrackerName

PROJECT = "spct-ray"
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """An open tracker of one training step of the graph."""

    next_step: int  # the first step that it does not have

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def require(name: TrackerName) -> None:
    """Raise ConfigError where the tracker's package is not installed."""
    if name != "none" and importlib.util.find_spec(_PACKAGES[name]) is None:
        raise ConfigError(
            f"resources.tracker is {name}, but the package {_PACKAGES[name]} is not installed: pip install "
            f"{_PACKAGES[name]}, or set resources.tracker to none or another of {', '.join(_PACKAGES)}"
        )


def open_tracker(name: TrackerName, directory: Path) -> Tracker | None:
    """The tracker of the training step in `directory`, the same run of it when opened again; None for "none"."""
    require(name)
    kinds: dict[str, Callable[[Path], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow}
    return kinds[name](directory) if name in kinds else None


class _TensorBoard:
    """Event files in tensorboard/. Event files only grow, so they are made anew when opened again."""

    def __init__(self, directory: Path) -> None:
        from tensorboardX import SummaryWriter

        shutil.rmtree(directory / "tensorboard", ignore_errors=True)
        self._writer: Any = SummaryWriter(str(directory / "tensorboard"))
        self.next_step = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of the project `PROJECT`; account, server and offline mode by W&B's own environment variables."""

    def __init__(self, directory: Path) -> None:
        import wandb

        run_id = _remembered(directory / "wandb_run", lambda: uuid.uuid4().hex)
        self._run: Any = wandb.init(project=PROJECT, name=directory.name, id=run_id, resume="allow", dir=str(directory))
        self.next_step: int = self._run.step

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """A run of the experiment `PROJECT` on the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, directory: Path) -> None:
        from mlflow import MlflowClient

        self._client: Any = MlflowClient()
        self._run = _remembered(directory / "mlflow_run", lambda: self._create(directory.name))
        history = self._client.get_metric_history(self._run, "loss")
        self.next_step: int = max((metric.step + 1 for metric in history), default=0)

    def _create(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        run_id: str = self._client.create_run(number, run_name=name).info.run_id
        return run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _remembered(path: Path, make: Callable[[], str]) -> str:
    """The text of a file, which is made on first use."""
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(make())
        temporary.rename(path)
    return path.read_text()
