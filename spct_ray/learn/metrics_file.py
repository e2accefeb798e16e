"""metrics.jsonl: one JSON object a training step, without gaps or duplicates over restarts; and its copies.

A tracker is told of each step as it comes, and metrics.parquet has them all in the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from spct_ray.learn.config import TrackerName
from spct_ray.learn.tracker import open_tracker


class MetricsFile:
    """One line a step, numbered from 0: opened at `first_step`, it forgets the lines of that and later steps.

    The tracker is told of what it has missed. Raises ConfigError where its package is not installed.
    """

    def __init__(self, path: Path, first_step: int, tracker: TrackerName = "none") -> None:
        self._path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed process may leave half a line
        kept = [line for line in whole if json.loads(line)["step"] < first_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self._tracker = open_tracker(tracker, path.parent)
        for line in kept:
            self._track(json.loads(line))

    def append(self, line: Mapping[str, float]) -> None:
        """Write one line through to the disk. Raises ValueError for a number that is not finite."""
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
        """Write metrics.parquet beside the lines, whole or not at all, and close the tracker."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        lines = [json.loads(line) for line in self._path.read_text().splitlines()]
        names = dict.fromkeys(name for line in lines for name in line)
        temporary = self._path.with_suffix(".parquet.tmp")
        pq.write_table(pa.table({name: [line.get(name) for line in lines] for name in names}), temporary)
        os.replace(temporary, self._path.with_suffix(".parquet"))
        if self._tracker is not None:
            self._tracker.close()
