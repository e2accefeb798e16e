"""Items on disk: one Parquet file, written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spct_ray.errors import DataError
from spct_ray.files import replacing
from spct_ray.records import Item

# Given, not inferred: a column that is empty in every row must keep its type.
_TYPES = {
    "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    "responses": pa.list_(pa.string()),
    "rewards": pa.list_(pa.float64()),
}
ITEM_SCHEMA = pa.schema([(field.name, _TYPES.get(field.name, pa.string())) for field in dataclasses.fields(Item)])


def write_rows(path: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None) -> None:
    """Write `rows` to the Parquet file `path`, replacing it in one move. Without a schema it is taken from the rows."""
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), partial)


def write_items(path: str, items: Sequence[Item]) -> str:
    """Write `items` to the Parquet file `path`, as `write_rows`. Returns a digest of the items."""
    rows = [item.to_row() for item in items]
    write_rows(path, rows, ITEM_SCHEMA)
    return hashlib.blake2b(
        "".join(json.dumps(row, sort_keys=True) for row in rows).encode(), digest_size=16
    ).hexdigest()


def read_items(path: str) -> list[Item]:
    """The items of a file that `write_items` wrote, in order. Raises DataError for any other file."""
    try:
        table = pq.read_table(path, schema=ITEM_SCHEMA)
    except (OSError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{path}: not an items file ({error}); the items stage writes them") from error
    return [Item.from_row(row) for row in table.to_pylist()]


def judged_files(directory: str) -> dict[str, Path]:
    """The item files of a finished step that judges are measured on: "heldout", where there is one, and each benchmark
    by its name."""
    files = [*Path(directory).glob("heldout.parquet"), *sorted(Path(directory).glob("bench_*.parquet"))]
    return {file.stem.removeprefix("bench_"): file for file in files}
