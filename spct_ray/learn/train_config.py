"""Configuration of a training run: method and resources. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from spct_ray.errors import ConfigError
from spct_ray.precision import Precision

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW at `lr` or, where `muon_lr` is above 0, Muon at `muon_lr` for the matrices and AdamW for the rest.

    The rest are embeddings, output layer, norms, biases and a scalar head. Both learning rates warm up linearly, then
    stay constant or decay to 0 over the last `decay_share` of the steps after the warm-up. `dtype` is that of the
    working weights, see `spct_ray.precision`; checkpoints hold fp32 masters either way.
    """

    lr: float = 5e-6
    muon_lr: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    decay_share: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    dtype: Precision = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"optim: decay_share is {self.decay_share}; it is above 0 and at most 1 (all steps)")
        if self.muon_lr < 0:
            raise ConfigError(f"optim: muon_lr is {self.muon_lr}; it is above 0, or 0 for AdamW alone")
        if self.muon_lr and self.grad_clip:
            raise ConfigError(
                f"optim: muon_lr is {self.muon_lr} and grad_clip {self.grad_clip}; DeepSpeed would clip Muon's update, "
                "whose norm is that of an orthogonal matrix whatever the gradient, and so divide the learning rate: "
                "set grad_clip to 0"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters instead of training all weights, see `spct_ray.learn.lora`; off at `rank` 0.

    `target_modules` are names of linear layers such as q_proj; empty means all linear layers of the trunk.
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


OBJECTIVES = {
    name: f"spct_ray.learn.policy:{kind}"
    for name, kind in {"grpo": "Grpo", "dr_grpo": "DrGrpo", "dapo": "Dapo"}.items()
}


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The policy's loss; see `learn.policy` for the objectives and the KL estimators.

    `objective` is a name in `OBJECTIVES` or the import path `module:Class` of a subclass of `learn.policy.Grpo`. A
    batch of rollouts is split into `updates_per_batch` updates of equal size, whose ratios are to the policy before the
    first of them and are clipped to [1 - `clip`, 1 + `clip_high`] (None: `clip`; DAPO's clip-higher is 0.28).
    `tis_cap` bounds the importance weights that correct for the engine's arithmetic.
    """

    objective: str = "grpo"
    beta: float = 0.08
    kl: Literal["k2", "k3"] = "k3"
    clip: float = 0.2
    clip_high: float | None = None
    tis_cap: float = 2.0
    updates_per_batch: int = 1

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES and ":" not in self.objective:
            raise ConfigError(
                f"objective is {self.objective!r}; it is one of {', '.join(OBJECTIVES)}, or the import path "
                "module:Class of your own"
            )
        if self.updates_per_batch < 1:
            raise ConfigError(f"updates_per_batch is {self.updates_per_batch}; a batch of rollouts is for 1 or more")
        if self.updates_per_batch == 1 and (self.clip, self.clip_high) != (PolicyLoss.clip, PolicyLoss.clip_high):
            raise ConfigError(
                f"clip is {self.clip} and clip_high {self.clip_high}, but updates_per_batch is 1: the one update of a "
                "batch starts at the policy that its ratios are to, so every ratio is 1 and no clip can act. Set "
                "updates_per_batch above 1, or leave both at their defaults"
            )

    @property
    def clip_range(self) -> tuple[float, float]:
        """Smallest and largest ratio that is not clipped."""
        return 1 - self.clip, 1 + (self.clip if self.clip_high is None else self.clip_high)


@dataclass(frozen=True)
class TrainResources:
    """Where training runs. `threads` 0 divides the machine's cores among its ranks; `micro_tokens` bounds a packed row.

    `offload_optimizer` keeps master weights and moments in CPU memory (DeepSpeedCPUAdam is compiled on first use).
    `tracker` is set for the whole run by `resources.tracker`, see `learn.metrics_file`.
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


def lr_factor(optim: OptimConfig, step: int, total_steps: int) -> float:
    """The factor of `lr` and `muon_lr` in update `step` (from 0)."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    falling = max(1.0, optim.decay_share * (total_steps - optim.warmup_steps))
    progress = min(1.0, max(0.0, 1 - (total_steps - step) / falling))
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if optim.schedule == "linear" else 1.0
