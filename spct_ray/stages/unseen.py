"""What a run's judges are measured on beside its held-out items: built-in items of kinds or sizes never trained on.

A step of its own between the items and the evaluations, so that asking for other sets trains nothing again. It needs
no data; benchmarks from files are `ItemsConfig.benchmarks` or `spct evaluate`.
Outputs: links to all files of the items step, but heldout.parquet cut to size, and bench_<name>.parquet of each set.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from spct_ray.data.builtin import BuiltinConfig, generate
from spct_ray.errors import ConfigError
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.seeds import derive_seed
from spct_ray.stages.items import NAME


@dataclass(frozen=True)
class UnseenConfig:
    """`size_heldout` items of each of `sets`, by name, whose topics and values are those of held-out items. Of the
    run's held-out items the first `heldout_size` are judged beside them (null: all)."""

    sets: dict[str, BuiltinConfig] = field(default_factory=dict)
    heldout_size: int | None = None


@stage(version=2)
def run(context: StepContext, config: UnseenConfig, _: None) -> dict[str, Any]:
    """Write the files. Raises ConfigError for a name that is taken or no name, and for sets that cannot be made."""
    from spct_ray.data.store import read_items, write_items

    given, out = Path(context.inputs["items"]), Path(context.out)
    for name in {"data_report.json", *(file.name for file in given.glob("*.parquet"))} - {"heldout.parquet"}:
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(os.path.relpath(given / name, out))  # relative, so that a root can be moved
    heldout = read_items(str(given / "heldout.parquet"))[: config.heldout_size]
    write_items(str(out / "heldout.parquet"), heldout)
    for name, builtin in config.sets.items():
        if not NAME.fullmatch(name) or name == "heldout" or (given / f"bench_{name}.parquet").exists():
            raise ConfigError(f"unseen.sets: {name!r} is no free name: use letters, digits, _ and -, not a benchmark's")
        made = generate(replace(builtin, size_train=0), derive_seed(context.seed, "unseen", name))[1]
        items = [replace(item, id=f"{name}:{item.id}") for item in made]
        write_items(str(out / f"bench_{name}.parquet"), items)
    return {"heldout": len(heldout), **{name: builtin.size_heldout for name, builtin in config.sets.items()}}
