"""metrics.jsonl: one JSON object a training step, without gaps or duplicates over restarts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


class MetricsFile:
    """One line a step, numbered from 0: opened at `first_step`, it forgets the lines of that and later steps."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed process may leave half a line
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line for line in whole if json.loads(line)["step"] < first_step))
        os.replace(temporary, path)

    def append(self, line: Mapping[str, float]) -> None:
        """Write one line through to the disk. Raises ValueError for a number that is not finite."""
        with self._path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
