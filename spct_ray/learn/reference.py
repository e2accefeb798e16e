"""The frozen model that GRPO's KL term holds the policy to (Eq. 15): forward passes only, no gradients, no optimizer.

Under ZeRO-3 its weights are partitioned like the policy's, else every rank holds a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spct_ray.learn.batch import EMPTY, Batch
from spct_ray.learn.config import TrainResources
from spct_ray.learn.model import TokenLogprobs, load_model
from spct_ray.learn.trainer import Trainer


class Reference:
    """Made after the policy, whose process group and device it uses."""

    def __init__(self, model_dir: str, policy: Trainer, resources: TrainResources) -> None:
        self._device = policy.device
        dtype = policy.dtype  # else there is a KL before step 1
        if resources.zero_stage < 3:
            self._module: Any = TokenLogprobs(load_model(model_dir, "lm", dtype)).to(policy.device)
        else:
            import deepspeed
            from transformers.integrations import HfDeepSpeedConfig

            config = {
                "train_micro_batch_size_per_gpu": 1,
                "bf16": {"enabled": dtype == torch.bfloat16},
                "zero_optimization": {"stage": 3},
            }
            active = HfDeepSpeedConfig(config)  # makes from_pretrained partition the weights while this object lives
            module = TokenLogprobs(load_model(model_dir, "lm", dtype))
            del active
            deepspeed.utils.set_z3_leaf_module(module.head, True)
            self._module = deepspeed.initialize(model=module, config=config)[0]
        self._module.eval()

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[Batch], num_passes: int) -> list[Tensor]:
        """As `Trainer.logprobs`, for each micro-batch. Every rank makes `num_passes` passes, empty ones if need be."""
        batches = [*micro_batches, *[EMPTY] * (num_passes - len(micro_batches))]
        logps: list[Tensor] = [self._module(batch.to(self._device)) for batch in batches]
        return logps[: len(micro_batches)]
