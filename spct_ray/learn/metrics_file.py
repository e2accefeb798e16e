"""metrics.jsonl, the record of a training run: one JSON object per step, without gaps or duplicates across restarts.

metrics.parquet is its final copy, and a tracker (TensorBoard, Weights & Biases, MLflow, Trackio) receives every step.
Not by accelerate's trackers: they log nothing without accelerate's process-wide PartialState, which chooses the CUDA
device itself, and they cannot say which steps a resumed run already has.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spct_ray.errors import ConfigError
from spct_ray.files import replacing, write_atomically
from spct_ray.learn.train_config import TrackerName

PROJECT = "spct-ray"
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in a step's directory, without a half-written last line; empty if there is no file."""
    path = Path(directory, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def mean_of_last_tenth(lines: Sequence[Mapping[str, float]], name: str) -> float:
    """The mean of one metric over the last tenth of the steps, at least one."""
    return statistics.fmean(line[name] for line in lines[-max(1, len(lines) // 10) :])


class MetricsFile:
    """The metrics.jsonl of a step's directory, opened at `first_step`: lines of that and later steps are discarded.

    The tracker receives the lines that it missed. Raises ConfigError where its package is not installed.
    """

    def __init__(self, directory: str | Path, first_step: int, tracker: TrackerName = "none") -> None:
        self._path = Path(directory, "metrics.jsonl")
        lines = [line for line in read_metrics(directory) if line["step"] < first_step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self._tracker = open_tracker(tracker, Path(directory))
        for line in lines:
            self._track(line)

    @classmethod
    def on_rank_0(cls, rank: int, directory: str, first_step: int, tracker: TrackerName) -> MetricsFile | None:
        """The file for rank 0, None for the other ranks."""
        return cls(directory, first_step, tracker) if rank == 0 else None

    def append(self, line: Mapping[str, float]) -> None:
        """Append one line and sync it to disk. Raises ValueError for a number that is not finite."""
        with self._path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._track(line)

    def _track(self, line: Mapping[str, float]) -> None:
        step = int(line["step"])
        if self._tracker is not None and step >= self._tracker.next_step:
            self._tracker.log(step, {name: value for name, value in line.items() if name != "step"})

    def close(self) -> None:
        """Write metrics.parquet beside the lines and close the tracker."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        lines = read_metrics(self._path.parent)
        names = dict.fromkeys(name for line in lines for name in line)
        with replacing(self._path.with_suffix(".parquet")) as temporary:
            pq.write_table(pa.table({name: [line.get(name) for line in lines] for name in names}), temporary)
        if self._tracker is not None:
            self._tracker.close()


class Tracker(Protocol):
    """An open tracker of one training run, which receives each step once, also across restarts."""

    next_step: int  # the first step that it has not received

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def require_tracker(name: TrackerName) -> None:
    """Raise ConfigError where the tracker's package is not installed."""
    if name != "none" and importlib.util.find_spec(_PACKAGES[name]) is None:
        raise ConfigError(
            f"resources.tracker is {name}, but the package {_PACKAGES[name]} is not installed: pip install "
            f"{_PACKAGES[name]}, or set resources.tracker to none or another of {', '.join(_PACKAGES)}"
        )


def open_tracker(name: TrackerName, directory: Path) -> Tracker | None:
    """The tracker of the training run in `directory`, which continues the same run when reopened; None for "none"."""
    require_tracker(name)
    kinds: dict[str, Callable[[Path], Tracker]] = {
        "tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio,
    }  # fmt: skip
    return kinds[name](directory) if name in kinds else None


class _TensorBoard:
    """Event files in tensorboard/, rewritten when reopened because event files are append-only."""

    next_step = 0

    def __init__(self, directory: Path) -> None:
        from tensorboardX import SummaryWriter

        shutil.rmtree(directory / "tensorboard", ignore_errors=True)
        self._writer: Any = SummaryWriter(str(directory / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of the project `PROJECT`; W&B's environment variables set account, server and offline mode."""

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
    """A run of the experiment `PROJECT` at MLFLOW_TRACKING_URI."""

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


class _Trackio(_Wandb):
    """The same with Trackio, whose runs have W&B's interface; its environment variables set directory or server."""

    def __init__(self, directory: Path) -> None:
        import trackio

        self._run: Any = trackio.init(
            PROJECT, directory.name, resume="allow", embed=False, auto_log_cpu=False, auto_log_gpu=False
        )
        # Private, because Trackio has no public name for it, for local or remote runs.
        self.next_step = self._run._next_step


def _remembered(path: Path, make: Callable[[], str]) -> str:
    """The text of a file, written on first use."""
    if not path.exists():
        write_atomically(path, make().encode())
    return path.read_text()
