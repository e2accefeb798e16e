"""Trainer to engines: new weights over a shared directory, and the check that they arrived.

Leaves out transfer from GPU to GPU; a directory serves CPU and GPU engines alike, on every node that sees it.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spct_ray.errors import ParityError

if TYPE_CHECKING:
    from torch import Tensor

    from spct_ray.cluster.pool import EnginePool

_SHARD_BYTES = 4 * 2**30  # rank 0 holds no more than this on the host


class WeightSource(Protocol):
    """A rank of the trainer, as far as it concerns weights."""

    rank: int

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """Whole tensors under their Hugging Face names; every rank must iterate to the end."""


def push_weights(trainer: WeightSource, pool: EnginePool | None, directory: str, version: int) -> dict[str, float]:
    """Give the trainer's weights to all engines of `pool` (None on all ranks but 0), as `version`.

    Every rank calls it. Rank 0 writes safetensors to `directory`/v<version>, whole or not at all, reloads the engines
    from there, and removes older versions; the newest stays for engines that are replaced later. Returns the seconds
    spent by phase: gather_s, write_s, reload_s (the last two are 0 on other ranks).
    """
    seconds = {"gather_s": 0.0, "write_s": 0.0, "reload_s": 0.0}
    weights = _timed(trainer.named_weights(), seconds)
    if trainer.rank != 0 or pool is None:
        for _ in weights:
            pass
        return seconds
    target = Path(directory).resolve() / f"v{version}"
    started = time.perf_counter()
    _write(weights, target)
    seconds["write_s"] = time.perf_counter() - started - seconds["gather_s"]
    started = time.perf_counter()
    pool.reload(str(target), version)
    seconds["reload_s"] = time.perf_counter() - started
    for old in set(target.parent.glob("v*")) - {target}:
        shutil.rmtree(old)
    return seconds


def check_parity(
    trainer_logprobs: Sequence[Sequence[float]], engine_logprobs: Sequence[Sequence[float]], tolerance: float
) -> float:
    """The largest |log p_trainer - log p_engine| over all tokens of the same sequences under both.

    Raises ParityError when it exceeds `tolerance` (or is not a number), with the place and both values: the engine
    then does not hold the trainer's weights, and everything it samples would be credited to the wrong policy.
    """
    lengths = [len(t) for t in trainer_logprobs], [len(e) for e in engine_logprobs]
    if lengths[0] != lengths[1] or not any(lengths[0]):
        raise ParityError(f"trainer and engine scored different tokens, counts {lengths[0]} and {lengths[1]}")
    differences = [
        (abs(t - e), sequence, token)
        for sequence, pair in enumerate(zip(trainer_logprobs, engine_logprobs, strict=True))
        for token, (t, e) in enumerate(zip(*pair, strict=True))
    ]
    largest, sequence, token = max(differences, key=lambda d: math.inf if math.isnan(d[0]) else d[0])
    if not largest <= tolerance:
        mean = sum(d for d, _, _ in differences) / len(differences)
        raise ParityError(
            f"max |dlogp| between trainer and engine is {largest:.4g} (mean {mean:.4g} of {len(differences)} tokens), "
            f"tolerance {tolerance:.4g}; worst at token {token} of sequence {sequence}: "
            f"trainer {trainer_logprobs[sequence][token]:.4f}, engine {engine_logprobs[sequence][token]:.4f}. "
            "A mean far below the maximum points to rounding (compare in float32, or raise the tolerance); a large one "
            "means that the engine holds other weights: see what its reload leaves out (tied output layer, buffers)"
        )
    return largest


def _timed(weights: Iterable[tuple[str, Tensor]], seconds: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
    started = time.perf_counter()
    for named in weights:
        seconds["gather_s"] += time.perf_counter() - started
        yield named
        started = time.perf_counter()
    seconds["gather_s"] += time.perf_counter() - started


def _write(weights: Iterable[tuple[str, Tensor]], target: Path) -> None:
    """Safetensors shards under a temporary name, then renamed."""
    from safetensors.torch import save_file

    partial = target.with_name(f"partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shard: dict[str, Any] = {}
    size = num_shards = 0
    for name, weight in weights:
        if shard and size + weight.nbytes > _SHARD_BYTES:
            save_file(shard, partial / f"model-{num_shards:05d}.safetensors")
            shard, size, num_shards = {}, 0, num_shards + 1
        shard[name] = weight.cpu().contiguous()
        size += weight.nbytes
    save_file(shard, partial / f"model-{num_shards:05d}.safetensors")
    shutil.rmtree(target, ignore_errors=True)  # a resumed run pushes a version again
    os.replace(partial, target)
