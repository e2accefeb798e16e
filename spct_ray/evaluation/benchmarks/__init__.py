"""Benchmarks by name, one module each, and how their files are read.

A specification is NAME (read from the hub) or NAME=PATH: a file, or a folder of files, in the benchmark's own shape or
in this project's. `own=PATH` is any file of ours, scored by plain accuracy. NAME is a module of this package, or
`module:ATTRIBUTE`, the import path of a `Benchmark` defined elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from spct_ray.config import imported
from spct_ray.data.shapes import Cells, UnusableRow
from spct_ray.data.sources import Dropped, SourceConfig, rows, with_content
from spct_ray.data.validate import Limits, Problem, find_problem
from spct_ray.errors import ConfigError, DataError, suggestion
from spct_ray.evaluation.benchmarks import own
from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Row
from spct_ray.evaluation.judgements import facts_of
from spct_ray.records import Item

_SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet")
_IDS = ("id", "pair_id", "pair_uid", "bon_uid", "question_id")
_OWN = {"messages", "responses", "rewards"}  # columns of this project's own shape, which every benchmark may have

BENCHMARKS: dict[str, Benchmark] = {
    module.name: import_module(f"{__name__}.{module.name}").BENCHMARK
    for module in iter_modules(__path__)
    if module.name != "benchmark"
}


@dataclass(frozen=True)
class BenchmarkSpec:
    """One benchmark to run: `label` names its files and results, `path` is empty for the hub; `content` is a digest of
    its files, filled in by `with_digest`: changed data is a changed step."""

    name: str
    path: str = ""
    label: str = ""
    content: tuple[str, ...] = ()


def find(name: str) -> Benchmark:
    """The benchmark of that name or import path. Raises ConfigError with the nearest name."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if ":" not in name:
        hint = suggestion(name.lower().replace("-", "_"), BENCHMARKS)
        raise ConfigError(f"unknown benchmark {name!r}; {hint} For a file of your own write own=PATH")
    benchmark = imported(name, "benchmark")
    if not isinstance(benchmark, Benchmark):
        raise ConfigError(f"benchmark {name!r} is a {type(benchmark).__name__}, expected a Benchmark")
    return benchmark


def parse_spec(text: str) -> BenchmarkSpec:
    """`rewardbench`, `rewardbench=file.jsonl` or `own=file.jsonl` (labelled by the file's name). Raises ConfigError."""
    name, _, path = text.strip().partition("=")
    benchmark = find(name)
    if not path and not benchmark.hub:
        raise ConfigError(f"benchmark {name!r} is not on the hub: give its file or folder, {name}=PATH")
    if path and not Path(path).exists():
        raise ConfigError(f"benchmark {name!r}: no such file or folder: {path}")
    named = Path(path).name.partition(".")[0] if name == "own" else name.rpartition(":")[2]
    label = "".join(c if c.isalnum() else "_" for c in named)
    return BenchmarkSpec(name, path, label)


def with_digest(spec: BenchmarkSpec) -> BenchmarkSpec:
    """The same with a digest of every file."""
    return replace(spec, content=tuple(with_content(source).content for source in _sources(spec)))


def read_benchmark(spec: BenchmarkSpec, limits: Limits, limit: int | None, seed: int) -> tuple[list[Item], Dropped]:
    """The items of one benchmark, and what was dropped; with `limit`, those of so many rows drawn by the seed.

    Raises DataError with file, row and column for a row that is not of the benchmark's shape, and when nothing is left.
    """
    benchmark, dropped = find(spec.name), Dropped()
    items: dict[str, Item] = {}
    total = 0  # rows of all files so far: tells rows apart that have the same id, or none
    for source in _sources(spec):
        for number, where, row in rows(source):
            total += 1
            item_id = f"{spec.label}:{next((row[key] for key in _IDS if row.get(key) is not None), number)}"
            if item_id in items or f"{item_id}#0" in items:
                item_id += f"@{total}"
            try:
                of_row = _items(benchmark, Row(Cells(row, spec.name, where), item_id, limits))
            except UnusableRow as unusable:
                dropped.add(unusable.problem, where)
                continue
            for item in of_row:
                problem = find_problem(item, limits)
                if problem and not (benchmark.several_right and problem is Problem.NO_UNIQUE_BEST):
                    dropped.add(problem, where)
                else:
                    items[item.id] = replace(item, source=spec.label)
    if not items:
        raise DataError(
            f"benchmark {spec.label}: no usable item in {spec.path or benchmark.hub}; "
            f"dropped: {dropped.counts or 'none, there is no row'}"
        )
    return _limited(list(items.values()), limit, seed), dropped


def _items(benchmark: Benchmark, row: Row) -> list[Item]:
    read = own.read if set(row.row) >= _OWN and not benchmark.several_right else benchmark.read
    items = read(row)
    for item in items:
        if benchmark.subsets and item.subset not in benchmark.subsets:
            hint = suggestion(item.subset, benchmark.subsets)
            raise row.error(f"'subset' {item.subset!r} is none of {benchmark.title}'s; {hint}")
    return items


def _sources(spec: BenchmarkSpec) -> Iterator[SourceConfig]:
    if not spec.path:
        for hub, split in find(spec.name).hub:
            yield SourceConfig(spec.label, hub, "hub", split=split)
        return
    path = Path(spec.path)
    files = sorted(f for f in path.rglob("*") if f.name.endswith(_SUFFIXES)) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path}: no file that ends in {', '.join(_SUFFIXES)}")
    for file in files:
        yield SourceConfig(spec.label, str(file))


def _limited(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """All items of `limit` questions, drawn by the seed, in their order."""
    questions = list(dict.fromkeys(facts_of(item)["question"] for item in items))
    if limit is None or limit >= len(questions):
        return list(items)
    kept = set(random.Random(seed).sample(questions, limit))
    return [item for item in items if facts_of(item)["question"] in kept]
