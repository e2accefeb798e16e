"""GRPO's rollouts on disk, one Parquet file a step: to be read by a person, and replayed without engines.

A file is written before the update that is made from it, so that an update that fails can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spct_ray.data.store import write_rows
from spct_ray.stages.rollouts import Rollout

_SCHEMA = pa.schema(
    [
        ("group", pa.int32()),
        ("item_id", pa.string()),
        ("text", pa.string()),  # of the completion; for reading only
        ("outcome", pa.string()),
        ("well_formed", pa.bool_()),
        ("reward", pa.float64()),
        ("stop_reason", pa.string()),
        ("weight_version", pa.int64()),
        ("num_prompt_tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("engine_logprobs", pa.list_(pa.float64())),
    ]
)


class RolloutDump:
    """The directory rollouts/ of a step's directory, with a file step-00000012.parquet for each GRPO step in it."""

    def __init__(self, out: str | Path) -> None:
        self._directory = Path(out) / "rollouts"

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}.parquet"

    def write(self, step: int, groups: Sequence[Sequence[Rollout]], tokenizer: Any) -> None:
        """All groups of a step, whole or not at all; a step that is done again replaces its file."""
        rows = [
            {**r.to_row(), "group": number, "text": tokenizer.decode(list(r.token_ids[r.num_prompt_tokens :]))}
            for number, group in enumerate(groups)
            for r in group
        ]
        self._directory.mkdir(exist_ok=True)
        write_rows(str(self._path(step)), rows, _SCHEMA)

    def read(self, step: int) -> list[list[Rollout]]:
        """What `write` was given."""
        groups: list[list[Rollout]] = []
        for row in pq.read_table(self._path(step)).to_pylist():
            if row["group"] == len(groups):
                groups.append([])
            groups[-1].append(Rollout.from_row(row))
        return groups

    def steps(self) -> list[int]:
        """Which steps have a file, in order."""
        return sorted(int(path.stem.removeprefix("step-")) for path in self._directory.glob("step-*.parquet"))

    def prune(self, first_step: int) -> None:
        """Delete the files of steps before `first_step`."""
        for step in self.steps():
            if step < first_step:
                self._path(step).unlink()
