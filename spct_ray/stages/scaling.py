"""Memory of each GPU and time of an update on paper: arithmetic of shapes, not a measurement.

The constants below are the assumptions; docs/scaling.md explains them. Leaves out models that are not plain dense
decoders, and what becomes of the numbers (see `plan_check.py`). Loads neither torch nor Ray nor vLLM.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from spct_ray.engines.base import EngineConfig
from spct_ray.learn.flops import ModelShape, Work
from spct_ray.learn.train_config import LoraConfig, OptimConfig, TrainResources

GIB = 2**30
# What DeepSpeed and the trainer hold beside the model's state.
LIVE_NUMEL = 1e9  # stage3_max_live_parameters
BUCKET_NUMEL = 5e8  # reduce_bucket_size; two buffers of it in fp32, however little is trained
LOGITS_GIB = 1.0  # four copies of a chunk of learn.model's log-prob head
RESERVE_GIB = 6.0  # CUDA context, NCCL, fragmentation
ENGINE_GIB = 3.0  # the same of vLLM, with its activations and CUDA graphs
# An H100 SXM, eight a node.
PEAK_FLOPS = 989e12  # dense bf16
MFU = 0.4  # share of it that training and prefill reach
MEMORY_BYTES_S = 0.6 * 3.35e12
NVLINK_BYTES_S, NETWORK_BYTES_S = 0.8 * 450e9, 0.8 * 50e9  # a GPU, within a node and beyond
FILE_BYTES_S = 2e9  # shared file system: of each writer and of each reader
CPU_ADAM_BYTES_S = 12.5e9  # host memory for one rank of eight; an update touches 28 bytes a weight
COMPLETION_TOKENS = 300  # mean of a judgement (paper: 220 to 380)
PROMPT_SHARE = 0.5  # mean prompt, as a share of the longest

KNOWN = {
    "google/gemma-2-27b": ModelShape(4608, 46, 36864, 32, 16, 128, 256000, window=4096, num_windowed=23),
    "Qwen/Qwen2.5-0.5B-Instruct": ModelShape(896, 24, 4864, 14, 2, 64, 151936),
}


def shape_of(model: str) -> ModelShape | None:
    """The shape of a known hub id, or of a directory by its config.json; None where it is not known."""
    if model in KNOWN:
        return KNOWN[model]
    path = Path(model, "config.json")
    if not path.is_file():
        return None
    return ModelShape.of(json.loads(path.read_text()))


@dataclass(frozen=True)
class Training:
    """What of a training step its memory depends on."""

    resources: TrainResources
    lora: LoraConfig
    optim: OptimConfig
    has_reference: bool = False

    @property
    def width(self) -> int:
        """Bytes of a weight in use."""
        return 4 if self.optim.dtype == "float32" else 2

    def memory(self, shape: ModelShape) -> dict[str, float]:
        """GiB of one GPU by part."""
        where, width, weights = self.resources, self.width, shape.weights
        ranks, stage = where.num_workers, where.zero_stage
        trained = shape.adapters(self.lora) if self.lora.rank else weights
        gathered = min(weights, max(LIVE_NUMEL, 2 * shape.layer_weights + shape.embedding))
        whole_or_part = width * weights / (ranks if stage == 3 else 1)
        layer_bytes = where.micro_tokens * shape.activation_numel * width
        inputs_bytes = where.micro_tokens * shape.layers * shape.hidden * width
        # Checkpointed: one layer with its gradients at a time.
        kept = inputs_bytes + 2 * layer_bytes if where.gradient_checkpointing else shape.layers * layer_bytes
        # The output layer's gradient waits until the tied embedding's is there, too. DeepSpeed reduces what exceeds its
        # bucket as a whole, from a copy in fp32; by then the layers' activations are gone.
        embedding = 0 if self.lora.rank else width * shape.embedding + max(0, (width + 4) * shape.embedding - kept)
        sizes = {
            "weights": whole_or_part,
            "gradients": 4 * trained / (ranks if stage > 1 else 1),
            "optimizer": 0 if where.offload_optimizer else 12 * trained / ranks,
            "reference": whole_or_part if self.has_reference and not self.lora.rank else 0,
            "gathered": width * gathered if stage == 3 and ranks > 1 else 0,
            "buckets": 8 * BUCKET_NUMEL,
            "embedding": embedding,
            "activations": kept,
        }
        return {name: size / GIB for name, size in sizes.items()} | {"logits": LOGITS_GIB, "reserve": RESERVE_GIB}

    def state(self, shape: ModelShape) -> float:
        """GiB of one GPU that stay from step to step."""
        parts = self.memory(shape)
        return sum(parts[name] for name in ("weights", "gradients", "optimizer", "reference", "reserve"))

    def checkpoint(self, shape: ModelShape) -> tuple[float, float]:
        """Bytes of a checkpoint, fp32 masters and moments, and the seconds that the ranks take to write their parts."""
        size = 12 * (shape.adapters(self.lora) if self.lora.rank else shape.weights)
        return size, size / self.resources.num_workers / FILE_BYTES_S

    def seconds(self, shape: ModelShape, work: Work) -> float:
        """Time of an update: computing beside communicating, then the optimizer."""
        where, weights = self.resources, shape.weights
        ranks = where.num_workers
        trained = shape.adapters(self.lora) if self.lora.rank else weights
        flops = work.forward(shape) + work.backward(shape, frozen=bool(self.lora.rank))
        if where.gradient_checkpointing:
            flops += replace(work, logits=0).forward(shape)
        compute = flops / (ranks * PEAK_FLOPS * MFU)
        rows = max(1, math.ceil(work.tokens / ranks / where.micro_tokens))
        moved = 4 * trained * (rows if where.zero_stage > 1 else 2) + self.width * trained
        if where.zero_stage == 3:
            moved += 2 * self.width * weights * rows
        communicate = moved / link(ranks) if ranks > 1 else 0.0
        update = 28 * trained / ranks / (CPU_ADAM_BYTES_S if where.offload_optimizer else MEMORY_BYTES_S)
        return max(compute, communicate) + update

    def forward_seconds(self, shape: ModelShape, work: Work) -> float:
        """Time of a forward pass (the reference's)."""
        where, ranks = self.resources, self.resources.num_workers
        rows = max(1, math.ceil(work.tokens / ranks / where.micro_tokens))
        moved = self.width * shape.weights * rows if where.zero_stage == 3 and ranks > 1 else 0
        return max(work.forward(shape) / (ranks * PEAK_FLOPS * MFU), moved / link(ranks))


def link(ranks: int) -> float:
    """Bytes a second between ranks."""
    return NVLINK_BYTES_S if ranks <= 8 else NETWORK_BYTES_S


def engine_memory(shape: ModelShape, engine: EngineConfig, gpu_gib: float) -> dict[str, float]:
    """GiB of one GPU by part; `cache` is what is left of its share, `needed` what one sequence of full length takes."""
    width = 4 if engine.dtype == "float32" else 2
    weights = width * shape.weights / engine.tensor_parallel / GIB
    needed = width * shape.kv_numel * engine.max_model_len / engine.tensor_parallel / GIB
    cache = engine.gpu_memory_utilization * gpu_gib - weights - ENGINE_GIB
    return {"weights": weights, "reserve": ENGINE_GIB, "cache": cache, "needed": needed}
