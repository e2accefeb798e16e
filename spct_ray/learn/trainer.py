"""One training rank on DeepSpeed ZeRO: forward, update, checkpoint, export. The same code on CPU and CUDA.

Weights are bf16 (or fp32) with fp32 master copies, and gradients are summed in fp32, so neither micro-batches nor the
number of ranks change an update beyond bf16 rounding in the forward pass. Losses and data come from the caller; Ray
Train starts the processes (`spct_ray.cluster.train`).
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spct_ray.errors import ConfigError, SpctError
from spct_ray.files import replacing
from spct_ray.judge.seeds import derive_seed
from spct_ray.learn import checkpoint
from spct_ray.learn.batch import EMPTY, Batch
from spct_ray.learn.lora import add_adapters, whole_weights
from spct_ray.learn.model import Head, LastTokenScore, TokenLogprobs, load_model, partitioned_loading
from spct_ray.learn.optimizers import make_optimizer, run_muon_eagerly
from spct_ray.learn.train_config import LoraConfig, OptimConfig, TrainResources, lr_factor
from spct_ray.learn.zero_state import ZeroState
from spct_ray.memory import give_back_freed
from spct_ray.precision import resolve

_GATHER_NUMEL = 1 << 28  # elements gathered at once under ZeRO-3
_TRIM_PERIOD_S = 3.0  # every step of a large model; one of a nano model would lose a fifth of its time


class Trainer:
    """One rank of data-parallel training. All methods are collective unless they say otherwise: every rank calls them.

    Uses the existing process group, or creates one for a single process. Head "lm" drives `logprobs`, head "scalar"
    drives `scores`. With `lora`, only adapters (and a scalar head) are trained and checkpointed. `steps_done` counts
    updates, across resumes.
    """

    def __init__(
        self,
        model_dir: str,
        *,
        head: Head,
        optim: OptimConfig,
        resources: TrainResources,
        total_steps: int,
        seed: int,
        lora: LoraConfig | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        deepspeed = _import_deepspeed(resources)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        self.optim, self.total_steps, self.seed, self.steps_done = optim, total_steps, seed, 0
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
        self._zero_stage = resources.zero_stage
        self.dtype: torch.dtype = getattr(torch, resolve(optim.dtype, on_gpu=resources.gpus_per_worker > 0))
        config = _deepspeed_config(optim, resources, self.dtype)
        torch.manual_seed(derive_seed(seed, "weights"))  # a new scalar head is drawn at random, alike on all ranks
        with partitioned_loading(config if resources.zero_stage == 3 else None):
            self.model = load_model(model_dir, head, self.dtype, self.device.type == "cuda")
        vocab = self.model.config.get_text_config().vocab_size
        if len(self.tokenizer) > vocab:
            raise ConfigError(
                f"{model_dir}: the tokenizer has {len(self.tokenizer)} tokens, the model's vocabulary {vocab}: they do "
                "not belong together, or tokens were added and the embeddings not resized"
            )
        self.has_adapters = bool(lora and lora.rank)
        if lora and lora.rank:
            torch.manual_seed(derive_seed(seed, "adapters"))
            add_adapters(self.model, lora)
        self.model.train()
        if resources.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        module = TokenLogprobs(self.model) if head == "lm" else LastTokenScore(self.model)
        if isinstance(module, TokenLogprobs):
            deepspeed.utils.set_z3_leaf_module(module.head, True)
        self._optimizer = make_optimizer(module, optim, resources)
        self._engine = deepspeed.initialize(model=module, optimizer=self._optimizer, config=config)[0]
        self._trimmed_at = 0.0
        self._state = ZeroState(self._engine, self._optimizer, self.model, resources.zero_stage, self.rank)

    def logprobs(self, batch: Batch) -> Tensor:
        """Log p [N] (fp32) of each trained token; without dropout where gradients are off."""
        return self._forward(batch)

    def scores(self, batch: Batch) -> Tensor:
        """Raw logits [B] (fp32) of the scalar head, read at each sequence's last token."""
        return self._forward(batch)

    def _forward(self, batch: Batch) -> Tensor:
        if self.model.training != torch.is_grad_enabled():
            self._engine.train(torch.is_grad_enabled())
        output: Tensor = self._engine(batch.to(self.device))
        return output

    def step(self, micro_batches: Sequence[Batch], loss_fn: Callable[[Batch], Tensor]) -> dict[str, float]:
        """One update with the gradient of the sum of `loss_fn` over all micro-batches of all ranks.

        `loss_fn` calls `logprobs` (or `scores`) once and divides by the normaliser of the whole update. Ranks may hold
        different numbers of micro-batches, or none. Returns the summed loss, the gradient norm before clipping (with
        Muon, of its orthogonalised updates and AdamW's gradients together) and AdamW's learning rate. Raises SpctError
        when the gradient is not finite; the weights are then unusable: restart from the last checkpoint.
        """
        torch.manual_seed(derive_seed(self.seed, "step", self.steps_done, self.rank))
        factor = lr_factor(self.optim, self.steps_done, self.total_steps)
        lr = self.optim.lr * factor
        for group in self._optimizer.param_groups:
            group["lr"] = self.optim.muon_lr * factor if group.get("use_muon") else lr
        count = int(self._reduce(torch.tensor(len(micro_batches)), dist.ReduceOp.MAX))
        loss_sum = torch.zeros((), device=self.device)
        for i in range(count):
            self._engine.set_gradient_accumulation_boundary(i == count - 1)
            loss = loss_fn(micro_batches[i]) if i < len(micro_batches) else self._empty_loss()
            self._engine.backward(loss * self.world_size)  # because DeepSpeed averages over ranks
            loss_sum += loss.detach()
        if self.device.type == "cpu" and time.monotonic() > self._trimmed_at + _TRIM_PERIOD_S:
            give_back_freed()
            self._trimmed_at = time.monotonic()
        self._engine.step()
        grad_norm = float(self._engine.get_global_grad_norm())
        loss_value = float(self._reduce(loss_sum, dist.ReduceOp.SUM))
        if not math.isfinite(grad_norm):
            raise SpctError(
                f"update {self.steps_done}: gradient norm {grad_norm}, loss {loss_value}: training diverged; "
                f"lower the learning rate (now {lr:.2e}) or look at the data of this step"
            )
        self.steps_done += 1
        return {"loss": loss_value, "grad_norm": grad_norm, "lr": lr}

    def save(self, directory: str, state: dict[str, Any]) -> None:
        """Write a checkpoint of this step and the caller's JSON `state`; keeps the newest two complete ones."""
        path = checkpoint.checkpoint_dir(directory, self.steps_done)
        if self.rank == 0:
            checkpoint.remove_incomplete(directory)
        dist.barrier()
        self._state.create_moments()
        checkpoint.write_fragments(path, self.rank, self._state.fragments())
        dist.barrier()
        if self.rank == 0:
            checkpoint.complete(directory, self.steps_done, {"state": state, "num_ranks": self.world_size})
        dist.barrier()

    def resume(self, directory: str, at: int | None = None) -> dict[str, Any] | None:
        """Load the newest complete checkpoint, or that of step `at`, written by any number of ranks; None if there is
        none. Returns the `state` it was saved with."""
        newest = checkpoint.newest_step(directory) if at is None and self.rank == 0 else at
        chosen = torch.tensor(-1 if newest is None else newest)
        step = int(self._reduce(chosen if self.rank == 0 else torch.tensor(-1), dist.ReduceOp.MAX))
        if step < 0:
            return None
        path = checkpoint.checkpoint_dir(directory, step)
        content = checkpoint.read_content(path)
        self._state.create_moments()
        self._state.set_step(step)
        with torch.no_grad():
            checkpoint.read_fragments(path, content["files"], self._state.fragments())
            self._state.update_weights()
        self.steps_done = step
        state: dict[str, Any] = content["state"]
        return state

    def named_weights(self, with_adapters: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Full weights by their HF names, tied ones once, adapters added; every rank must iterate to the end.

        Under ZeRO-3 they are copies, gathered bucket by bucket; otherwise they are the live weights, valid until the
        next `step`.
        """
        waiting = whole_weights(self.model)
        if self._zero_stage < 3:
            yield from ((whole.name, whole.value(with_adapters)) for whole in waiting)
            return
        import deepspeed

        while waiting:
            bucket, parameters = [waiting.pop(0)], list[Any]()
            parameters += bucket[0].parameters
            while waiting and sum(p.ds_numel for p in (*parameters, *waiting[0].parameters)) <= _GATHER_NUMEL:
                bucket.append(waiting.pop(0))
                parameters += bucket[-1].parameters
            with deepspeed.zero.GatheredParameters(parameters):
                weights = [(whole.name, whole.value(with_adapters).clone()) for whole in bucket]
            yield from weights

    def named_adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Adapters alone, see `WholeWeight.adapter`; every rank must iterate to the end."""
        adapted = [whole for whole in whole_weights(self.model) if whole.layer is not None]
        if self._zero_stage < 3:
            yield from (named for whole in adapted for named in whole.adapter().items())
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for whole in adapted for p in whole.parameters[1:]]):
            weights = [(name, half.clone()) for whole in adapted for name, half in whole.adapter().items()]
        yield from weights

    def weight_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of `named_weights`, without gathering them. Not collective."""
        firsts = [(whole.name, whole.parameters[0]) for whole in whole_weights(self.model)]
        return [(name, tuple(getattr(weight, "ds_shape", weight.shape))) for name, weight in firsts]

    def export(self, directory: str) -> None:
        """Write model, config, generation config, tokenizer and chat template for transformers and vLLM.

        The directory appears whole or not at all. Rank 0 holds all weights in CPU memory meanwhile.
        """
        weights: dict[str, Tensor] = {}
        for name, weight in self.named_weights():
            if self.rank == 0:
                weights[name] = weight.cpu()
        if self.rank == 0:
            with replacing(directory) as temporary:
                self.model.save_pretrained(temporary, state_dict=weights)
                self.tokenizer.save_pretrained(temporary)
        dist.barrier()

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def _reduce(self, value: Tensor, operation: Any) -> Tensor:
        value = value.to(self.device)
        dist.all_reduce(value, op=operation)
        return value

    def _empty_loss(self) -> Tensor:
        """A loss of 0 that runs the whole network, for ranks that have fewer micro-batches than others."""
        return self._forward(EMPTY).sum() * 0.0


def _import_deepspeed(resources: TrainResources) -> Any:
    """DeepSpeed, set up for this process: accelerator, process group, threads. Importing it reads the environment."""
    if resources.gpus_per_worker == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    kind = deepspeed.get_accelerator().device_name()
    wanted = "cuda" if resources.gpus_per_worker else "cpu"
    if kind != wanted:
        raise ConfigError(f"gpus_per_worker is {resources.gpus_per_worker}, but DeepSpeed found {kind}, not {wanted}")
    if wanted == "cpu":
        run_muon_eagerly()
    if not dist.is_initialized():
        backend = "nccl" if resources.gpus_per_worker else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # Private, because no public option keeps DeepSpeed from compiling its shared-memory all-reduce for CPU ranks.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    if resources.gpus_per_worker:
        deepspeed.get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    cores = len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_SIZE"])
    torch.set_num_threads(resources.threads or max(1, cores))
    return deepspeed


def _deepspeed_config(optim: OptimConfig, resources: TrainResources, dtype: torch.dtype) -> dict[str, Any]:
    on_gpu = resources.gpus_per_worker > 0
    zero: dict[str, Any] = {
        "stage": resources.zero_stage,
        "overlap_comm": on_gpu,
        "contiguous_gradients": on_gpu,
    }
    if optim.muon_lr and resources.zero_stage == 3:
        zero["reduce_scatter"] = False  # required by DeepSpeed
    if resources.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the boundary is set by hand in `step`
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": optim.grad_clip,
        "zero_optimization": zero,
    }
