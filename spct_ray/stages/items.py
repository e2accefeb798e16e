"""From sources to Items: read, refuse, hold out, decontaminate; writes the files that every later step reads.

Outputs: train.parquet, heldout.parquet, bench_<name>.parquet, data_report.json (kept and dropped, by source and
reason).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from spct_ray.data.builtin import BuiltinConfig, generate
from spct_ray.data.sources import Dropped, SourceConfig, read_source
from spct_ray.data.validate import Limits, Problem, decontaminate, split_heldout
from spct_ray.errors import ConfigError, DataError
from spct_ray.files import write_atomically
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.records import Item

NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class ItemsConfig:
    """Which data, and how it is cut. `builtin: null` leaves the built-in set out; it brings its own held-out items.
    Of all other sources `heldout_share` of the queries is held out, at most `heldout_size` items of them. `benchmarks`
    are never trained on, and training queries are checked against them."""

    builtin: BuiltinConfig | None = field(default_factory=BuiltinConfig)
    sources: tuple[SourceConfig, ...] = ()
    benchmarks: tuple[SourceConfig, ...] = ()
    heldout_share: float = 0.05
    heldout_size: int = 2000
    limits: Limits = field(default_factory=Limits)
    decontaminate_words: int = 13

    def __post_init__(self) -> None:
        names = ["builtin", *(s.name for s in self.sources), *(b.name for b in self.benchmarks)]
        for name in names:
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"the source name {name!r} becomes part of ids and file names: use letters, digits, _ and -"
                )
            if names.count(name) > 1:
                raise ConfigError(f"two sources are named {name!r}; names must differ ('builtin' is taken)")
        if not 0 <= self.heldout_share < 1:
            raise ConfigError(f"heldout_share must be in [0, 1), found {self.heldout_share}")
        if self.decontaminate_words < 1:
            raise ConfigError(f"decontaminate_words must be at least 1, found {self.decontaminate_words}")


@stage(version=4)
def run(context: StepContext, config: ItemsConfig, _: None) -> dict[str, Any]:
    """Write the items and the report; returns the report's totals. Raises DataError."""
    from spct_ray.data.store import write_items

    read: dict[str, list[Item]] = {}
    dropped: dict[str, Dropped] = {}
    for source in (*config.sources, *config.benchmarks):
        context.log(f"reading {source.name} from {source.path}")
        read[source.name], dropped[source.name] = read_source(source, config.limits)
    benchmarks = {f"bench_{b.name}": read[b.name] for b in config.benchmarks}

    ours = [item for source in config.sources for item in read[source.name]]
    train, heldout = split_heldout(ours, config.heldout_share, context.seed)
    for item in heldout[config.heldout_size :]:
        dropped[_source_of(item)].add(Problem.OVER_HELDOUT_SIZE, item.id)
    # Everything held out stays protected, also what is over the size: other sources may ask the same.
    protected = [*heldout, *(item for items in benchmarks.values() for item in items)]
    heldout = heldout[: config.heldout_size]
    if config.builtin is not None:  # its two halves are disjoint by construction but share the wording of constraints
        builtin_train, builtin_heldout = generate(config.builtin, context.seed)
        train, heldout = [*builtin_train, *train], [*builtin_heldout, *heldout]
        dropped["builtin"] = Dropped()
    train, overlaps = decontaminate(train, protected, config.decontaminate_words)
    for overlap in overlaps:
        where = f"{overlap.item.id} shares with {overlap.protected.id}: {overlap.words[:200]}"
        dropped[_source_of(overlap.item)].add(Problem.CONTAMINATED, where)
    if not train:
        raise DataError(f"no training item is left; dropped: { {name: d.counts for name, d in dropped.items()} }")

    files = {"train": train, "heldout": heldout, **benchmarks}
    content = {name: write_items(f"{context.out}/{name}.parquet", items) for name, items in files.items()}
    kept = {name: len(items) for name, items in files.items()}
    sizes = {name: Counter(str(len(item.responses)) for item in items) for name, items in files.items()}
    report = {
        "kept": kept,
        "kept_by_source": {name: Counter(map(_source_of, items)) for name, items in files.items()},
        "kept_by_num_responses": {name: dict(sorted(counts.items())) for name, counts in sizes.items()},
        "dropped": {name: asdict(drops) for name, drops in dropped.items()},
    }
    write_atomically(f"{context.out}/data_report.json", json.dumps(report, indent=2).encode())
    totals = dict(sum((Counter(drops.counts) for drops in dropped.values()), Counter[str]()))
    context.log(f"kept {kept}, dropped {totals}")
    return {"kept": kept, "dropped": totals, "content": content}


def _source_of(item: Item) -> str:
    """The configured name of the item's source, which begins its id."""
    return item.id.partition(":")[0] if ":" in item.id else "builtin"
