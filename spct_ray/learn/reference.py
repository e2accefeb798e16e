"""The frozen model that GRPO's KL term holds the policy to (Eq. 15): forward passes only, no gradients, no optimizer.

Under ZeRO-3 its weights are partitioned like the policy's, else every rank holds a copy. With LoRA there is no second
model: the policy without its adapters is the model that training began with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
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
        self._adapters_off: Callable[[], Any] = contextlib.nullcontext
        if policy.has_adapters:
            from peft.helpers import rescale_adapter_scale

            # To 0 instead of passing them by: ZeRO-3 expects the same modules in the same order in every pass.
            self._adapters_off = partial(rescale_adapter_scale, policy.model, 0.0)
            self._logprobs: Callable[[Batch], Tensor] = policy.logprobs
            return
        dtype, on_gpu = policy.dtype, policy.device.type == "cuda"  # else there is a KL before step 1
        if resources.zero_stage < 3:
            module: Any = TokenLogprobs(load_model(model_dir, "lm", dtype, on_gpu)).to(policy.device)
        else:
            import deepspeed
            from transformers.integrations import HfDeepSpeedConfig

            config = {
                "train_micro_batch_size_per_gpu": 1,
                "bf16": {"enabled": dtype == torch.bfloat16},
                "zero_optimization": {"stage": 3},
            }
            active = HfDeepSpeedConfig(config)  # makes from_pretrained partition the weights while this object lives
            partitioned = TokenLogprobs(load_model(model_dir, "lm", dtype, on_gpu))
            del active
            deepspeed.utils.set_z3_leaf_module(partitioned.head, True)
            module = deepspeed.initialize(model=partitioned, config=config)[0]
        module.eval()
        self._logprobs = module

    @torch.no_grad()
    def logprobs(self, micro_batches: Sequence[Batch], num_passes: int) -> list[Tensor]:
        """As `Trainer.logprobs`, for each micro-batch. Every rank makes `num_passes` passes, empty ones if need be."""
        batches = [*micro_batches, *[EMPTY] * (num_passes - len(micro_batches))]
        with self._adapters_off():
            logps = [self._logprobs(batch.to(self._device)) for batch in batches]
        return logps[: len(micro_batches)]
