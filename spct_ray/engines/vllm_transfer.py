"""Weights from the trainer's GPUs straight to the engines', by vLLM's own weight transfer: IPC on one GPU, else NCCL.

vLLM drives both sides: it iterates the trainer's weights and calls the engines through a client, which here is a pool.
The way over a directory needs no GPU and outlives a dead engine (see `spct_ray.cluster.sync`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from spct_ray.engines.base import EngineConfig

InfoOf = Callable[[int], dict[str, Any] | None]

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Source(Protocol):
    """A rank of the trainer, as far as it concerns weights."""

    rank: int
    dtype: torch.dtype

    def named_weights(self) -> Iterator[tuple[str, Tensor]]: ...

    def weight_shapes(self) -> list[tuple[str, tuple[int, ...]]]: ...


class Pool(Protocol):
    """Engines, each told its own `info_of` its number."""

    def transfer(self, method: str, info_of: InfoOf, weight_version: int) -> None: ...


class WeightTransfer:
    """Rank 0's pool of engines (None on other ranks) tied to the ranks for a whole run. Collective throughout.

    The pool must not replace dead engines: a new one would be no part of the group. Where an engine dies within a
    transfer by NCCL, rank 0 may wait for it forever, as NCCL has no way to tell.
    """

    def __init__(self, trainer: Source, pool: Pool | None, engine: EngineConfig, num_replicas: int) -> None:
        _import_vllm()
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        info: IPCTrainerInitInfo | NCCLTrainerInitInfo
        if engine.transfer == "ipc":
            buffer = ipc_buffer_bytes(trainer)
            info = IPCTrainerInitInfo(rank=trainer.rank, packed=True, packed_buffer_size_bytes=buffer)
        else:
            world_size = 1 + num_replicas * engine.tensor_parallel
            info = NCCLTrainerInitInfo(get_ip(), get_open_port(), world_size, rank=trainer.rank)
        self._client = PoolClient(pool, engine.tensor_parallel)
        self._engine = WeightTransferTrainerFactory.trainer_init(
            info, client=self._client, source=weight_source(trainer)
        )

    def send(self, version: int) -> None:
        """Give the engines the trainer's weights, as `version`."""
        import torch
        from vllm.device_allocator.alloc_conf import EXPANDABLE_SEGMENTS, set_alloc_conf, with_conf_flag

        self._client.version = version
        before = torch._C._accelerator_getAllocatorSettings()
        # Another process maps an expandable segment slowly, and only where it may trace this one: the buffer that IPC
        # shares comes from a plain one.
        set_alloc_conf(with_conf_flag(before, EXPANDABLE_SEGMENTS, False))
        try:
            self._engine.send_weights()
        finally:
            set_alloc_conf(before)


def ipc_buffer_bytes(trainer: Source) -> int:
    """Bytes of the buffer that IPC shares: vLLM's own number, or the largest tensor, which must fit."""
    from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

    largest = max(math.prod(shape) for _, shape in trainer.weight_shapes()) * trainer.dtype.itemsize
    return largest if largest > DEFAULT_PACKED_BUFFER_SIZE_BYTES else int(DEFAULT_PACKED_BUFFER_SIZE_BYTES)


def _import_vllm() -> None:
    """Import vLLM without its effect on a trainer: it makes torch compile with one thread."""
    name = "TORCHINDUCTOR_COMPILE_THREADS"
    before = os.environ.get(name)
    import vllm  # noqa: F401
    from torch._inductor import config

    if before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = before
    config.compile_threads = config.decide_compile_threads()


class PoolClient:
    """vLLM's `VLLMWeightSyncClient` over a pool: what it asks, every engine does."""

    def __init__(self, pool: Pool | None, workers_per_engine: int) -> None:
        self._pool, self._workers_per_engine, self.version = pool, workers_per_engine, 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The workers of engine i follow those of the engines before it in the NCCL group; rank 0 is the trainer."""
        offset = init_info.get("rank_offset")
        self._call(
            "init_weight_transfer_engine",
            lambda i: {**init_info, "rank_offset": offset + i * self._workers_per_engine} if offset else init_info,
        )

    def start_weight_update(self) -> None:
        self._call("start_weight_update", lambda _: None)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", lambda _: update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", lambda _: None)

    def _call(self, method: str, info_of: InfoOf) -> None:
        assert self._pool is not None  # vLLM asks on rank 0 only
        self._pool.transfer(method, info_of, self.version)


def weight_source(trainer: Source) -> Any:
    """The trainer's weights as vLLM wants them; iterating gathers, asking for shapes does not."""
    from vllm.distributed.weight_transfer import ParamMeta
    from vllm.distributed.weight_transfer import WeightSource as VllmSource

    class TrainerSource(VllmSource):  # type: ignore[misc]
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, trainer.dtype, shape) for name, shape in trainer.weight_shapes()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(trainer.named_weights())

    return TrainerSource()
