"""Resources of sampling, apart from its code, so that configurations load without Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from spct_ray.engines.base import EngineConfig
from spct_ray.placement import check_engine


@dataclass(frozen=True)
class SamplingResources:
    """Judges side by side, what each takes, and how many judgements make a block (the unit of work and of resume).

    `gpus_per_replica` is the engine's `tensor_parallel`, a part of a GPU, or 0 on CPUs; null leaves it to the cluster:
    `tensor_parallel` on one with GPUs, else 0. ConfigError where the two contradict each other.
    """

    num_replicas: int = 1
    cpus_per_replica: float = 1
    gpus_per_replica: float | None = 0
    block_size: int = 512
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        check_engine(self.gpus_per_replica, self.engine.tensor_parallel, self.engine.gpu_memory_utilization)

    @property
    def senders(self) -> SamplingResources:
        """Of the Ray Data actors that send blocks to engines, which have the GPUs."""
        return SamplingResources(self.num_replicas, self.cpus_per_replica, 0, self.block_size)
