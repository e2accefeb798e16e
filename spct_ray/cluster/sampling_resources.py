"""Resources of sampling, apart from its code, so that configurations load without Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from spct_ray.engines.base import EngineConfig


@dataclass(frozen=True)
class SamplingResources:
    """Judges side by side, what each takes, and how many judgements make a block (the unit of work and of resume)."""

    num_replicas: int = 1
    cpus_per_replica: float = 1
    gpus_per_replica: float = 0
    block_size: int = 512
    engine: EngineConfig = field(default_factory=EngineConfig)
