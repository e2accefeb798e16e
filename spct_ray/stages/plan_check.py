"""Whether a recipe's training steps and engines fit their GPUs, and which settings help if not.

Arithmetic of shapes, not a measurement; docs/scaling.md explains its assumptions, the constants below. Models that are
not plain dense decoders and steps on CPUs are not checked. Loads neither torch nor Ray nor vLLM.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spct_ray.engines.base import EngineConfig
from spct_ray.errors import ConfigError
from spct_ray.learn.train_config import LoraConfig, OptimConfig, TrainResources
from spct_ray.stages.recipe import Recipe

GIB = 2**30
# What DeepSpeed and the trainer hold beside the model's state.
LIVE_NUMEL = 1e9  # stage3_max_live_parameters
BUCKET_NUMEL = 5e8  # reduce_bucket_size; two buffers of it in fp32, however little is trained
LOGITS_GIB = 1.0  # four copies of a chunk of learn.model's log-prob head
RESERVE_GIB = 6.0  # CUDA context, NCCL, fragmentation
ENGINE_GIB = 3.0  # the same of vLLM, with its activations and CUDA graphs
FILE_BYTES_S = 2e9  # shared file system: of each writer and of each reader
MOE_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder with gated MLP; `num_windowed` of its layers attend to the last `window` tokens only."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = True
    window: int = 0
    num_windowed: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape | None:
        """The shape that a (text) config.json describes; None for a mixture of experts and where a size is missing."""
        config = config.get("text_config", config)
        if any(config.get(key) for key in MOE_KEYS):
            return None
        try:
            hidden, layers, heads = (config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
            window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
            types = config.get("layer_types") or ["sliding_attention"] * layers
            return cls(
                hidden,
                layers,
                config["intermediate_size"],
                heads,
                config.get("num_key_value_heads") or heads,
                config.get("head_dim") or hidden // heads,
                config["vocab_size"],
                bool(config.get("tie_word_embeddings", True)),
                window or 0,
                types.count("sliding_attention") if window else 0,
            )
        except KeyError:
            return None

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear maps."""
        hidden, query, key = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key),
            "v_proj": (hidden, key),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, self.intermediate),
            "up_proj": (hidden, self.intermediate),
            "down_proj": (self.intermediate, hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Without norms."""
        return sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def embedding(self) -> int:
        """Weights of the embedding; the output layer has as many."""
        return self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """All of them."""
        return self.layers * self.layer_weights + self.embedding * (1 if self.tied else 2)

    @property
    def kv_numel(self) -> int:
        """Cached values of a token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def activation_numel(self) -> int:
        """Values that one layer keeps of a token for its backward pass: inputs of norms, linear maps and products."""
        return 6 * self.hidden + 2 * (self.heads + self.kv_heads) * self.head_dim + 4 * self.intermediate

    def adapters(self, lora: LoraConfig) -> int:
        """Weights of LoRA's A and B."""
        chosen = [self.linear[name] for name in lora.target_modules or self.linear if name in self.linear]
        return self.layers * lora.rank * sum(inputs + outputs for inputs, outputs in chosen)


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


def engine_memory(shape: ModelShape, engine: EngineConfig, gpu_gib: float) -> dict[str, float]:
    """GiB of one GPU by part; `cache` is what is left of its share, `needed` what one sequence of full length takes."""
    width = 4 if engine.dtype == "float32" else 2
    weights = width * shape.weights / engine.tensor_parallel / GIB
    needed = width * shape.kv_numel * engine.max_model_len / engine.tensor_parallel / GIB
    cache = engine.gpu_memory_utilization * gpu_gib - weights - ENGINE_GIB
    return {"weights": weights, "reserve": ENGINE_GIB, "cache": cache, "needed": needed}


def checkpoints(recipe: Recipe) -> dict[str, float]:
    """GB of a checkpoint of each step that trains on GPUs, seconds to write it, and updates from one to the next."""
    shape, found = None if recipe.nano else shape_of(recipe.student.model), dict[str, float]()
    if shape is None:
        return found
    for name, training in trainings(recipe).items():
        step, (size, seconds) = name.partition(".")[0], training.checkpoint(shape)
        found |= {f"{step}, GB": size / 1e9, f"{step}, seconds": seconds}
        found[f"{step}, every"] = getattr(recipe, step).checkpoint_every
    return found


def trainings(recipe: Recipe) -> dict[str, Training]:
    """The steps that train on GPUs, by the name of their resources."""
    where, policy = recipe.resources, recipe.grpo
    found = {
        "rft": Training(where.rft, recipe.rft.lora, recipe.rft.optim),
        "grpo.train": Training(where.grpo.train, policy.lora, policy.optim, policy.beta > 0),
        "meta": Training(where.meta, recipe.meta.lora, recipe.meta.optim),
    }
    if recipe.bradley_terry:
        scalar = recipe.bradley_terry
        found["bradley_terry"] = Training(where.bradley_terry, scalar.lora, scalar.optim)
    return {name: training for name, training in found.items() if training.resources.gpus_per_worker > 0}


def engines(recipe: Recipe) -> dict[str, EngineConfig]:
    """The engines on GPUs that hold the student or what becomes of it, by the name of their resources."""
    where = recipe.resources
    placed: dict[str, tuple[Any, EngineConfig]] = {
        "grpo": (where.grpo.rollout, where.grpo.engine),
        "onpolicy": (where.onpolicy, where.onpolicy.engine),
        "evaluate": (where.evaluate, where.evaluate.engine),
    }
    if recipe.sample.sampler.kind == "student":
        placed["sample"] = (where.sample, where.sample.engine)
    return {name: engine for name, (resources, engine) in placed.items() if resources.gpus_per_replica}


def beside(recipe: Recipe, name: str) -> float:
    """GiB that an engine takes on the GPUs of a training step: GRPO's, where each asks for a part of a GPU. Asleep,
    it keeps what is not weights or cache."""
    where, gpu_gib = recipe.resources.grpo, recipe.resources.cluster.gpu_gib
    if name != "grpo.train" or where.train.gpus_per_worker >= 1 or not 0 < where.rollout.gpus_per_replica < 1:
        return 0.0
    return ENGINE_GIB if where.engine.transfer == "ipc" else where.engine.gpu_memory_utilization * gpu_gib


def check(recipe: Recipe) -> None:
    """Raise ConfigError where a training step or an engine cannot fit its GPUs, with what takes the memory and which
    settings help. Says nothing about models whose shape is not known, and about steps on CPUs."""
    shape = None if recipe.nano else shape_of(recipe.student.model)
    if shape is None:
        return
    gpu_gib, problems = recipe.resources.cluster.gpu_gib, []
    for name, training in trainings(recipe).items():
        room = gpu_gib - beside(recipe, name)
        parts = training.memory(shape)
        if sum(parts.values()) > room:
            problems.append(
                f"resources.{name}: a GPU needs {sum(parts.values()):.0f} GiB ({listed(parts)}) and has {room:.0f}; "
                f"what helps: {knobs(name, training, shape, room)}"
            )
    for name, engine in engines(recipe).items():
        parts = engine_memory(shape, engine, gpu_gib)
        if parts["cache"] < parts["needed"]:
            problems.append(
                f"resources.{name}.engine: weights of {parts['weights']:.0f} GiB leave {max(0.0, parts['cache']):.1f} "
                f"of {engine.gpu_memory_utilization * gpu_gib:.0f} GiB for the cache; a sequence of full length takes "
                f"{parts['needed']:.1f}; what helps: tensor_parallel={2 * engine.tensor_parallel} (with as many GPUs a "
                "replica), a smaller max_model_len, a higher gpu_memory_utilization"
            )
    policy = trainings(recipe).get("grpo.train")
    if policy and recipe.resources.grpo.engine.transfer == "ipc":
        share, state = recipe.resources.grpo.engine.gpu_memory_utilization, policy.state(shape)
        if state + share * gpu_gib > gpu_gib:
            problems.append(
                f"resources.grpo.engine: awake it takes {share * gpu_gib:.0f} GiB beside the trainer's state of "
                f"{state:.0f}, and the GPU has {gpu_gib:.0f}; what helps: gpu_memory_utilization="
                f"{math.floor(100 * max(0.0, 1 - state / gpu_gib)) / 100}"
            )
    if problems:
        raise ConfigError("this plan cannot fit, by the arithmetic of docs/scaling.md:\n  " + "\n  ".join(problems))


def listed(parts: dict[str, float]) -> str:
    """`weights 5, gradients 10`: GiB, largest first, without what is below half of one."""
    return ", ".join(f"{name} {size:.0f}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size >= 0.5)


def knobs(name: str, training: Training, shape: ModelShape, room: float) -> str:
    """The settings that alone make a training step fit or, if none does, those that do together."""
    where, alone, together, changed = training.resources, list[str](), list[str](), training
    step = name.partition(".")[0]
    steps: list[tuple[str, bool, Callable[[Training], Training]]] = [
        (f"resources.{name}.zero_stage=3", where.zero_stage < 3 and where.num_workers > 1, _with(zero_stage=3)),
        (
            f"resources.{name}.gradient_checkpointing=true",
            not where.gradient_checkpointing,
            _with(gradient_checkpointing=True),
        ),
        (f"resources.{name}.micro_tokens=2048", where.micro_tokens > 2048, _with(micro_tokens=2048)),
        (
            f"resources.{name}.offload_optimizer=true",
            not where.offload_optimizer and not training.optim.muon_lr,
            _with(offload_optimizer=True),
        ),
        (
            f"resources.{name}.num_workers={2 * where.num_workers}",
            where.num_workers > 1 or where.zero_stage == 3,
            _with(num_workers=2 * where.num_workers),
        ),
        (f"{step}.lora.rank=32", not training.lora.rank, lambda t: replace(t, lora=replace(t.lora, rank=32))),
    ]
    for setting, is_new, change in steps:
        if not is_new:
            continue
        if sum(change(training).memory(shape).values()) <= room:
            alone.append(setting)
        if sum(changed.memory(shape).values()) > room:
            changed = change(changed)
            together.append(setting)
    if alone:
        return " or ".join(alone)
    return " with ".join(together) if sum(changed.memory(shape).values()) <= room else "a smaller model or more GPUs"


def _with(**values: Any) -> Callable[[Training], Training]:
    return lambda training: replace(training, resources=replace(training.resources, **values))
