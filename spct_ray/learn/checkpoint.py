"""Training checkpoints: fp32 master weights and optimizer moments in safetensors, the rest in JSON, no pickle.

Every rank writes the pieces it owns, without communication. A reader takes the pieces that it owns under its own
partitioning from all files, so the number of ranks and the ZeRO stage may change between save and resume. A checkpoint
is a directory such as `step-00000100/`, complete once it has a `checkpoint.json`, which is written last. Learning rate
and random state are functions of the step number, and are not stored.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from spct_ray.errors import DataError
from spct_ray.files import write_atomically

_KEEP = 2
_FILE_NUMEL = 1 << 28  # elements per file (1 GiB), which bounds the copies made while writing


@dataclass(frozen=True)
class Fragment:
    """The part [start, start + n) of one flattened parameter that this rank holds: a view [n] of each kind of state.

    Kinds are fp32 (the master weight), exp_avg and exp_avg_sq (AdamW), and momentum_buffer (Muon). Fragments of one
    parameter may differ by kind; pieces held by several ranks are equal.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))


def checkpoint_dir(directory: str, step: int) -> Path:
    """The directory of the checkpoint after `step` updates."""
    return Path(directory) / f"step-{step:08d}"


def newest_step(directory: str) -> int | None:
    """Step number of the newest complete checkpoint."""
    return max(complete_steps(directory), default=None)


def remove_incomplete(directory: str) -> None:
    """Delete what killed writers left behind."""
    for path in Path(directory).glob("step-*"):
        if not (path / "checkpoint.json").exists():
            shutil.rmtree(path)


def write_fragments(path: Path, rank: int, fragments: Iterator[Fragment]) -> None:
    """Write this rank's pieces to `rank-R-PART.safetensors` files."""
    path.mkdir(parents=True, exist_ok=True)
    pending: list[Fragment] = []
    part = 0
    for fragment in fragments:
        pending.append(fragment)
        if sum(len(f) * len(f.tensors) for f in pending) >= _FILE_NUMEL:
            _write_file(path / f"rank-{rank:05d}-{part:05d}.safetensors", pending)
            pending, part = [], part + 1
    _write_file(path / f"rank-{rank:05d}-{part:05d}.safetensors", pending)


def complete(directory: str, step: int, content: dict[str, Any]) -> None:
    """Complete the checkpoint by writing `checkpoint.json`, and delete all but the newest two."""
    path = checkpoint_dir(directory, step)
    content = {**content, "step": step, "files": sorted(f.name for f in path.glob("*.safetensors"))}
    write_atomically(path / "checkpoint.json", json.dumps(content, indent=1).encode())
    for old in complete_steps(directory)[:-_KEEP]:
        (checkpoint_dir(directory, old) / "checkpoint.json").unlink()
        shutil.rmtree(checkpoint_dir(directory, old))


def read_content(path: Path) -> dict[str, Any]:
    """The `content` given to `complete`, with `step` and `files`."""
    content: dict[str, Any] = json.loads((path / "checkpoint.json").read_text())
    return content


def read_fragments(path: Path, files: list[str], fragments: Iterator[Fragment]) -> None:
    """Fill the views of this rank's fragments from the checkpoint. Raises DataError where the checkpoint has a gap."""
    readers: list[Any] = [safe_open(path / name, framework="pt") for name in files]
    pieces: dict[str, list[tuple[int, int, Any]]] = {}
    for reader in readers:
        for key, (start, length) in json.loads(reader.metadata()["pieces"]).items():
            pieces.setdefault(key, []).append((start, start + length, reader))
    for fragment in fragments:
        for kind, view in fragment.tensors.items():
            key, filled = f"{kind}/{fragment.name}", 0
            for start, stop, reader in sorted(pieces.get(key, ()), key=lambda piece: piece[:2]):
                low, high = fragment.start + filled, min(stop, fragment.start + len(fragment))
                if start <= low < high:
                    view[filled : filled + high - low].copy_(reader.get_slice(key)[low - start : high - start])
                    filled += high - low
            if filled != len(fragment):
                raise DataError(
                    f"{path}: {kind} of parameter {fragment.name} has {filled} of the {len(fragment)} elements needed "
                    f"from {fragment.start} on: the checkpoint is of another model or optimizer; delete it or point to "
                    "the right run"
                )


def _write_file(path: Path, fragments: list[Fragment]) -> None:
    # Cloned: safetensors refuses views of one storage.
    tensors = {
        f"{kind}/{f.name}": t.detach().to("cpu", torch.float32, copy=True)
        for f in fragments
        for kind, t in f.tensors.items()
    }
    pieces = {f"{kind}/{f.name}": (f.start, len(f)) for f in fragments for kind in f.tensors}
    save_file(tensors, path, metadata={"pieces": json.dumps(pieces)})


def complete_steps(directory: str) -> list[int]:
    """Step numbers of the complete checkpoints, in order."""
    names = (re.fullmatch(r"step-(\d+)", path.parent.name) for path in Path(directory).glob("step-*/checkpoint.json"))
    return sorted(int(match[1]) for match in names if match)
