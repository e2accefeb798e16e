"""Reads rows from files and from the Hugging Face hub into validated Items, and counts what was dropped.

A file is JSON lines (also gzipped), a JSON array or Parquet, on any file system that fsspec supports. The built-in set
is in `spct_ray.data.builtin`.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar

from spct_ray.data.shapes import Row, Shape, UnusableRow, detect_shape, to_item
from spct_ray.data.validate import Limits, Problem, find_problem
from spct_ray.errors import DataError
from spct_ray.records import Item

BATCH_ROWS = 1000  # of Parquet in memory at once


@dataclass(frozen=True)
class SourceConfig:
    """One data set for training. `name` goes into every item id. `path` is a file, or a hub id such as
    "nvidia/HelpSteer2" for kind "hub"; `data_dir`, `split` and `revision` (a commit, tag or branch) are only read for
    the hub. `limit` counts kept items."""

    name: str
    path: str
    kind: Literal["file", "hub"] = "file"
    shape: Literal["auto", "own", "hh", "helpsteer2", "ultrafeedback", "chosen_rejected"] = "auto"
    data_dir: str | None = None
    split: str = "train"
    revision: str | None = None
    limit: int | None = None
    content: str = ""  # what a file holds, filled in by `with_content`: changed data is a changed step


@dataclass(frozen=True)
class BenchmarkSource:
    """One benchmark file in the own shape: never trained on, and training queries are checked against it."""

    name: str
    path: str
    content: str = ""  # as in SourceConfig


S = TypeVar("S", SourceConfig, BenchmarkSource)


def with_content(source: S) -> S:
    """The same source with a digest of all of its file.

    A hub data set is named by its `revision`; the steps that read one record a digest of the items they read. A file
    that is not there (yet) is left as it is; reading it says what is wrong.
    """
    path = Path(source.path)
    if (isinstance(source, SourceConfig) and source.kind == "hub") or not path.is_file():
        return source
    status = path.stat()
    return replace(source, content=_digest(str(path.resolve()), status.st_size, status.st_mtime_ns))


@cache
def _digest(path: str, size: int, mtime_ns: int) -> str:
    """Hash of a file's size and bytes. `mtime_ns` makes the cache notice a rewritten file."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


@dataclass
class Dropped:
    """How many items were dropped for each problem, and where the first of each was: file:line or item id."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, problem: Problem, where: str) -> None:
        """Count one more."""
        self.counts[problem.value] = self.counts.get(problem.value, 0) + 1
        self.first.setdefault(problem.value, where)


def read_source(config: SourceConfig, limits: Limits) -> tuple[list[Item], Dropped]:
    """The usable items of one source, in file order, and what was dropped.

    Raises DataError with file:line for a row that cannot be read, and when nothing usable is left.
    """
    items: list[Item] = []
    dropped = Dropped()
    seen: set[str] = set()
    shape: Shape | None = None if config.shape == "auto" else config.shape
    for number, where, row in rows(config):
        if config.limit is not None and len(items) >= config.limit:
            break
        shape = shape or detect_shape(row, where)
        item_id = f"{config.name}:{number if row.get('id') is None else row['id']}"
        try:
            item = to_item(row, shape, item_id, config.name, where)
        except UnusableRow as unusable:
            dropped.add(unusable.problem, where)
            continue
        problem = Problem.DUPLICATE_ID if item_id in seen else find_problem(item, limits)
        if problem is not None:
            dropped.add(problem, where)
            continue
        seen.add(item_id)
        items.append(item)
    if not items:
        raise DataError(
            f"{config.path}: no usable item; dropped by reason: {dropped.counts or 'none, the file is empty'}; "
            f"first of each: {dropped.first}. See spct_ray/data/validate.py for what each reason means"
        )
    return items, dropped


def rows(config: SourceConfig) -> Iterator[tuple[int, str, Row]]:
    """(row number from 1, "file:line" or "file:row n", row). Raises DataError for what cannot be read as rows."""
    if config.kind == "hub":
        yield from _hub_rows(config)
    elif not os.path.exists(config.path) and "://" not in config.path:
        raise DataError(f"{config.path}: no such file (source {config.name!r}; current directory: {os.getcwd()})")
    elif config.path.endswith(".parquet"):
        yield from _parquet_rows(config.path)
    elif config.path.endswith(".json"):
        yield from _array_rows(config.path)
    else:
        yield from _json_rows(config.path)


def _json_rows(path: str) -> Iterator[tuple[int, str, Row]]:
    import fsspec

    number = 0
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row: Any = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}: {row!r:.80}")
                yield number, f"{path}:{number}", row
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise DataError(
            f"{path}:{number}: cannot be read as JSON lines: {error}. Give one JSON object per line, in UTF-8"
        ) from error


def _array_rows(path: str) -> Iterator[tuple[int, str, Row]]:
    """A JSON array of objects, or JSON lines in a file named .json."""
    import fsspec

    with fsspec.open(path, "rt", encoding="utf-8") as file:
        text = file.read()
    if not text.lstrip().startswith("["):
        yield from _json_rows(path)
        return
    try:
        array = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: begins as a JSON array but cannot be read as one: {error}") from error
    for number, row in enumerate(array, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}:row {number}: expected a JSON object, found {type(row).__name__}: {row!r:.80}")
        yield number, f"{path}:row {number}", row


def _parquet_rows(path: str) -> Iterator[tuple[int, str, Row]]:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = count(1)
    with fsspec.open(path, "rb") as file:
        try:
            batches = pq.ParquetFile(file).iter_batches(BATCH_ROWS)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not a Parquet file: {error}") from error
        for batch in batches:
            for row in batch.to_pylist():
                number = next(numbers)
                yield number, f"{path}:row {number}", row


def _hub_rows(config: SourceConfig) -> Iterator[tuple[int, str, Row]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(config.path, data_dir=config.data_dir, split=config.split, revision=config.revision)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"hub data set {config.path!r} (data_dir {config.data_dir!r}, split {config.split!r}, revision "
            f"{config.revision!r}) cannot be loaded: {error}. Check the four, and that the hub can be reached"
        ) from error
    for number, row in enumerate(rows, 1):
        yield number, f"{config.path}[{config.split}]:row {number}", row
