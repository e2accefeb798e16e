"""Trainer to engines: new weights over a shared directory, and the checks that they arrived and compute the same.

A directory serves CPU and GPU engines alike, on every node that sees it; `engines.vllm_transfer` goes from GPU to GPU.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spct_ray.errors import ParityError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spct_ray.cluster.pool import EnginePool
    from spct_ray.engines.vllm_transfer import Source

_SHARD_BYTES = 4 * 2**30  # rank 0 holds no more than this on the host


def push_weights(
    trainer: Source, pool: EnginePool | None, directory: str, version: int, adapter_rank: int = 0
) -> dict[str, float]:
    """Give the trainer's weights to all engines of `pool` (None on all ranks but 0), as `version`.

    Every rank calls it. Rank 0 writes safetensors to `directory`/v<version>, whole or not at all, reloads the engines
    from there, and removes older versions; the newest stays for engines that are replaced later. Returns the seconds
    spent by phase: gather_s, write_s, reload_s (the last two are 0 on other ranks). With `adapter_rank` the weights are
    an adapter's, see `SentWeights`.
    """
    seconds = {"gather_s": 0.0, "write_s": 0.0, "reload_s": 0.0}
    weights = _timed(trainer.named_weights(), seconds)
    if trainer.rank != 0 or pool is None:
        for _ in weights:
            pass
        return seconds
    target = Path(directory).resolve() / f"v{version}"
    started = time.perf_counter()
    _write(weights, target, adapter_rank)
    seconds["write_s"] = time.perf_counter() - started - seconds["gather_s"]
    started = time.perf_counter()
    pool.reload(str(target), version)
    seconds["reload_s"] = time.perf_counter() - started
    for old in set(target.parent.glob("v*")) - {target}:
        shutil.rmtree(old)
    return seconds


class SentWeights:
    """The trainer's weights as they go out to engines that hold them in `dtype`; notes the checksums of what went.

    With `adapter_rank` the trainer's adapters go out alone, padded with zeros to that rank, beside its base weights,
    which engines have from the start and which are only summed, once.
    """

    def __init__(self, trainer: Source, dtype: torch.dtype, adapter_rank: int = 0) -> None:
        self.rank, self.dtype, self.adapter_rank = trainer.rank, trainer.dtype, adapter_rank
        self._trainer: Any = trainer
        self._engine_dtype = dtype
        self._base: dict[str, tuple[Tensor, int]] = {}
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """What goes out; every rank must iterate to the end, rank 0 sums meanwhile."""
        if self.adapter_rank and not self._base:
            for name, weight in self._trainer.named_weights(with_adapters=False):
                self._base[name] = self._sum(weight)
        self._sums = dict(self._base)
        for name, weight in self._padded_adapters() if self.adapter_rank else self._trainer.named_weights():
            self._sums[name] = self._sum(weight)
            yield name, weight

    def _sum(self, weight: Tensor) -> tuple[Tensor, int]:
        from spct_ray.engines.checksums import checksum

        return (checksum(weight, self._engine_dtype) if self.rank == 0 else weight.new_zeros(())), weight.numel()

    def _padded_adapters(self) -> Iterator[tuple[str, Tensor]]:
        from torch.nn.functional import pad

        for name, half in self._trainer.named_adapters():
            is_a = name.endswith(".lora_A.weight")  # [rank, in], else [out, rank]
            missing = self.adapter_rank - half.shape[0 if is_a else 1]
            yield name, pad(half, (0, 0, 0, missing) if is_a else (0, missing))

    def weight_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """As the trainer's."""
        shapes: list[tuple[str, tuple[int, ...]]] = self._trainer.weight_shapes()
        return shapes

    def checksums(self) -> dict[str, tuple[int, int]]:
        """Checksum and number of elements of each tensor that went out last."""
        import torch

        values = torch.stack([value for value, _ in self._sums.values()]).tolist()
        return {name: (value, numel) for value, (name, (_, numel)) in zip(values, self._sums.items(), strict=True)}


class Parity(NamedTuple):
    """|log p_trainer - log p_engine| in nats over all compared tokens: a mean, or quantile, or the bound on it."""

    mean: float
    p99: float


def check_parity(
    trainer_logprobs: Sequence[Sequence[float]], engine_logprobs: Sequence[Sequence[float]], tolerance: Parity
) -> Parity:
    """How far trainer and engine are apart over all tokens of the same sequences under both.

    Raises ParityError when the mean or the 99th percentile exceeds `tolerance` (or is not a number), with the worst
    place: the two then do not compute the same, and what the engine samples would be credited to the wrong policy.
    """
    lengths = [len(t) for t in trainer_logprobs], [len(e) for e in engine_logprobs]
    if lengths[0] != lengths[1] or not any(lengths[0]):
        raise ParityError(f"trainer and engine scored different tokens, counts {lengths[0]} and {lengths[1]}")
    differences = sorted(
        (math.inf if math.isnan(t - e) else abs(t - e), sequence, token)
        for sequence, pair in enumerate(zip(trainer_logprobs, engine_logprobs, strict=True))
        for token, (t, e) in enumerate(zip(*pair, strict=True))
    )
    num = len(differences)
    found = Parity(sum(d for d, _, _ in differences) / num, differences[math.ceil(0.99 * num) - 1][0])
    if found.mean > tolerance.mean or found.p99 > tolerance.p99:
        largest, sequence, token = differences[-1]
        raise ParityError(
            f"|dlogp| between trainer and engine over {num} tokens: mean {found.mean:.4g} (tolerance "
            f"{tolerance.mean:.4g}), 99th percentile {found.p99:.4g} (tolerance {tolerance.p99:.4g}), largest "
            f"{largest:.4g} at token {token} of sequence {sequence}: trainer {trainer_logprobs[sequence][token]:.4f}, "
            f"engine {engine_logprobs[sequence][token]:.4f}. Where the checksums of the weights agree, the two compute "
            "differently: compare in float32 (dtype of both), and look at attention, soft-caps and rotary embeddings"
        )
    return found


def _timed(weights: Iterable[tuple[str, Tensor]], seconds: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
    started = time.perf_counter()
    for named in weights:
        seconds["gather_s"] += time.perf_counter() - started
        yield named
        started = time.perf_counter()
    seconds["gather_s"] += time.perf_counter() - started


def _write(weights: Iterable[tuple[str, Tensor]], target: Path, adapter_rank: int) -> None:
    """Safetensors shards, or a PEFT adapter, under a temporary name, then renamed."""
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
    if adapter_rank:
        modules = sorted({name.split(".")[-3] for name in shard})
        config = {"peft_type": "LORA", "r": adapter_rank, "lora_alpha": adapter_rank, "target_modules": modules}
        (partial / "adapter_config.json").write_text(json.dumps(config))
    save_file(shard, partial / f"{'adapter_model' if adapter_rank else f'model-{num_shards:05d}'}.safetensors")
    shutil.rmtree(target, ignore_errors=True)  # a resumed run pushes a version again
    os.replace(partial, target)
