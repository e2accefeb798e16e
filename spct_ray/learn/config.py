"""Settings of a training run: how (OptimConfig, method) and where (TrainResources). Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from spct_ray.errors import ConfigError
from spct_ray.precision import Precision

TrackerName = Literal["tensorboard", "wandb", "mlflow", "none"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. The learning rate warms up linearly, then stays or falls to 0 at the last step.

    `dtype` is that of the weights in use, see `spct_ray.precision`; checkpoints hold fp32 masters either way.
    """

    lr: float = 5e-6
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    dtype: Precision = "auto"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of training all weights, see `spct_ray.learn.lora`. `rank` 0 is off.

    `target_modules` are names of linear layers, such as q_proj; none stands for all of the trunk's.
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"lora: rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}; rank is at least 0 (off), alpha "
                "is above 0, dropout at least 0 and below 1"
            )


@dataclass(frozen=True)
class PolicyLoss:
    """What one GRPO update minimises; see `learn.grpo` for the objectives and the KL estimators.

    Ratios are clipped to 1 - `clip` .. 1 + `clip_high` (None: `clip`; DAPO's clip-higher takes 0.28). `tis_cap` bounds
    the importance weights that correct for the engine's arithmetic. `max_tokens` is dr_grpo's divisor.
    """

    objective: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    beta: float = 0.08
    kl: Literal["k1", "k2", "k3"] = "k3"
    clip: float = 0.2
    clip_high: float | None = None
    tis_cap: float = 2.0
    max_tokens: int = 1024


@dataclass(frozen=True)
class TrainResources:
    """Where training runs. `threads` 0 shares out the machine's cores; `micro_tokens` bounds a packed row.

    `offload_optimizer` keeps master weights and moments in CPU memory (compiles DeepSpeedCPUAdam on first use).
    `tracker` is set for the whole run by `resources.tracker`, see `learn.tracker`.
    """

    num_workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    zero_stage: Literal[1, 2, 3] = 1
    offload_optimizer: bool = False
    micro_tokens: int = 4096
    threads: int = 0
    max_failures: int = 2
    gradient_checkpointing: bool = False
    tracker: TrackerName = "tensorboard"


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of update number `step` (from 0)."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (1 - progress) if optim.schedule == "linear" else optim.lr
