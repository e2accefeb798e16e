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
from pathlib import Path
from typing import Any, Literal

from spct_ray.data.shapes import Row, Shape, UnusableRow, detect_shape, to_item
from spct_ray.data.validate import Limits, Problem, find_problem
from spct_ray.errors import DataError
from spct_ray.records import Item


@dataclass(frozen=True)
class SourceConfig:
    """One data set. `name` goes into every item id. `path` is a file, or a hub id such as "nvidia/HelpSteer2" for kind
    "hub"; `data_dir`, `split` and `revision` (a commit, tag or branch) are only read for the hub. `limit` counts kept
    items. `content` is a digest of the file, set by `with_content`: changed data is a changed step."""

    name: str
    path: str
    kind: Literal["file", "hub"] = "file"
    shape: Literal["auto", "own", "chosen_rejected", "helpsteer2", "ultrafeedback"] = "auto"
    data_dir: str | None = None
    split: str = "train"
    revision: str | None = None
    limit: int | None = None
    content: str = ""


def with_content(source: SourceConfig) -> SourceConfig:
    """The same source with a digest of all of its file.

    A hub data set is named by its `revision`; the steps that read one record a digest of the items they read. A file
    that is not there (yet) is left as it is; reading it says what is wrong.
    """
    path = Path(source.path)
    if source.kind == "hub" or not path.is_file():
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
    items: dict[str, Item] = {}
    dropped = Dropped()
    shape: Shape | None = None if config.shape == "auto" else config.shape
    for number, where, row in rows(config):
        if len(items) == config.limit:
            break
        shape = shape or detect_shape(row, where)
        item_id = f"{config.name}:{number if row.get('id') is None else row['id']}"
        try:
            item = to_item(row, shape, item_id, config.name, where)
            problem = Problem.DUPLICATE_ID if item_id in items else find_problem(item, limits)
        except UnusableRow as unusable:
            problem = unusable.problem
        if problem:
            dropped.add(problem, where)
        else:
            items[item_id] = item
    if not items:
        raise DataError(
            f"{config.path}: no usable item; dropped by reason: {dropped.counts or 'none, the file is empty'}; "
            f"first of each: {dropped.first}. See spct_ray/data/validate.py for what each reason means"
        )
    return list(items.values()), dropped


def rows(config: SourceConfig) -> Iterator[tuple[int, str, Row]]:
    """(row number from 1, "file:line" or "file:row n", row). Raises DataError for what cannot be read as rows."""
    path, place = config.path, f"{config.path}:row "
    numbered: Iterator[tuple[int, Any]]
    if config.kind == "hub":
        numbered, place = enumerate(_hub_rows(config), 1), f"{path}[{config.split}]:row "
    elif not os.path.exists(path) and "://" not in path:
        raise DataError(f"{path}: no such file (source {config.name!r}; current directory: {os.getcwd()})")
    elif path.endswith(".parquet"):
        numbered = enumerate(_parquet_rows(path), 1)
    elif path.endswith(".json") and (array := _json_array(path)) is not None:
        numbered = enumerate(array, 1)
    else:
        numbered, place = _json_lines(path), f"{path}:"
    for number, row in numbered:
        where = f"{place}{number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}: {row!r:.80}")
        yield number, where, row


def _json_lines(path: str) -> Iterator[tuple[int, Any]]:
    import fsspec

    number = 0
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise DataError(
            f"{path}:{number}: cannot be read as JSON lines: {error}. Give one JSON object per line, in UTF-8"
        ) from error


def _json_array(path: str) -> list[Any] | None:
    """The array in a file named .json; None where it holds JSON lines."""
    import fsspec

    try:
        with fsspec.open(path, "rt", encoding="utf-8") as file:
            text = file.read()
        return json.loads(text) if text.lstrip().startswith("[") else None
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as a JSON array: {error}") from error


def _parquet_rows(path: str) -> Iterator[Any]:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(path, "rb") as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not a Parquet file: {error}") from error
        for batch in parquet.iter_batches(1000):
            yield from batch.to_pylist()


def _hub_rows(config: SourceConfig) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(config.path, data_dir=config.data_dir, split=config.split, revision=config.revision)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"hub data set {config.path!r} (data_dir {config.data_dir!r}, split {config.split!r}, revision "
            f"{config.revision!r}) cannot be loaded: {error}. Check the four, and that the hub can be reached"
        ) from error
