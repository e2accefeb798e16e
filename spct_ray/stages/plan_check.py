"""Whether a recipe's training steps and engines fit their GPUs, and which settings help if not.

Arithmetic of shapes, not a measurement; docs/scaling.md explains its assumptions, the constants below. Models that are
not plain dense decoders and steps on CPUs are not checked. Loads neither torch nor Ray nor vLLM.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spct_ray.engines.base import EngineConfig
from spct_ray.errors import ConfigError
from spct_ray.learn.train_config import LoraConfig, OptimConfig, TrainResources
from spct_ray.stages.recipe import Recipe
from spct_ray.stages.student import StudentConfig

GIB = 2**30
# What DeepSpeed and the trainer hold beside the model's state.
LIVE_NUMEL = 1e9  # stage3_max_live_parameters
BUCKET_NUMEL = 5e8  # reduce_bucket_size; two buffers of it in fp32, however little is trained
LOGITS_GIB = 1.0  # four copies of a chunk of learn.model's log-prob head
RESERVE_GIB = 6.0  # CUDA context, NCCL, fragmentation
ENGINE_GIB = 3.0  # the same of vLLM, with its activations and CUDA graphs
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
        sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
        if any(config.get(key) for key in MOE_KEYS) or not all(key in config for key in sizes):
            return None
        hidden, layers, intermediate, heads, vocab = (config[key] for key in sizes)
        kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
        window = config.get("sliding_window") or 0 if config.get("use_sliding_window", True) else 0
        types = config.get("layer_types") or ["sliding_attention"] * layers
        num_windowed = types.count("sliding_attention") if window else 0
        tied = bool(config.get("tie_word_embeddings", True))
        return cls(hidden, layers, intermediate, heads, kv_heads, head_dim, vocab, tied, window, num_windowed)

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


def shape_of(student: StudentConfig) -> ModelShape | None:
    """The student's shape: of a known hub id, or of a directory by its config.json; None where it is not known."""
    path = Path(student.model, "config.json")
    if student.source == "nano" or student.model in KNOWN or not path.is_file():
        return KNOWN.get(student.model)
    return ModelShape.of(json.loads(path.read_text()))


@dataclass(frozen=True)
class Training:
    """What of a training step its memory depends on."""

    resources: TrainResources
    lora: LoraConfig
    optim: OptimConfig
    has_reference: bool = False
    beside_gib: float = 0.0  # of an engine on the same GPU

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
        if self.beside_gib:
            sizes["engine beside it"] = self.beside_gib * GIB
        return {name: size / GIB for name, size in sizes.items()} | {"logits": LOGITS_GIB, "reserve": RESERVE_GIB}

    def fits(self, shape: ModelShape, room: float) -> bool:
        """Whether one GPU with `room` GiB holds it."""
        return sum(self.memory(shape).values()) <= room


def trainings(recipe: Recipe) -> dict[str, Training]:
    """The steps that train on GPUs, by the name of their resources. Where GRPO's ranks and engines ask for a part of a
    GPU each, they share it; an engine that sleeps meanwhile (ipc) keeps what is not weights or cache."""
    where, policy, scalar = recipe.resources, recipe.grpo, recipe.bradley_terry
    engine, ranks = where.grpo.engine, where.grpo.train
    is_shared = ranks.gpus_per_worker < 1 and 0 < where.grpo.rollout.gpus_per_replica < 1
    awake = engine.gpu_memory_utilization * where.cluster.gpu_gib
    beside = (ENGINE_GIB if engine.transfer == "ipc" else awake) if is_shared else 0.0
    steps = {
        "rft": Training(where.rft, recipe.rft.lora, recipe.rft.optim),
        "grpo.train": Training(ranks, policy.lora, policy.optim, policy.beta > 0, beside),
        "meta": Training(where.meta, recipe.meta.lora, recipe.meta.optim),
    }
    if scalar:
        steps["bradley_terry"] = Training(where.bradley_terry, scalar.lora, scalar.optim)
    return {name: training for name, training in steps.items() if training.resources.gpus_per_worker > 0}


def engine_memory(shape: ModelShape, engine: EngineConfig) -> dict[str, float]:
    """GiB of one GPU by part, with a cache for one sequence of full length."""
    width = 4 if engine.dtype == "float32" else 2
    weights = width * shape.weights / engine.tensor_parallel / GIB
    sequence = width * shape.kv_numel * engine.max_model_len / engine.tensor_parallel / GIB
    return {"weights": weights, "reserve": ENGINE_GIB, "one sequence": sequence}


def check(recipe: Recipe) -> None:
    """Raise ConfigError where a training step or an engine cannot fit its GPUs, with what takes the memory and which
    settings help. Says nothing about models whose shape is not known, and about steps on CPUs."""
    shape, where, gpu_gib = shape_of(recipe.student), recipe.resources, recipe.resources.cluster.gpu_gib
    if shape is None:
        return
    checks: list[tuple[str, dict[str, float], float, str]] = []  # part of the resources, GiB by part, GiB there, help
    trained = trainings(recipe)
    for name, training in trained.items():
        checks.append((name, training.memory(shape), gpu_gib, knobs(name, training, shape, gpu_gib)))
    engines: dict[str, Any] = {"grpo": where.grpo, "onpolicy": where.onpolicy, "evaluate": where.evaluate}
    if recipe.sample.sampler.kind == "student":
        engines["sample"] = where.sample
    for name, resources in engines.items():
        engine: EngineConfig = resources.engine
        if getattr(resources, "rollout", resources).gpus_per_replica:
            room = engine.gpu_memory_utilization * gpu_gib
            helps = f"tensor_parallel={2 * engine.tensor_parallel} (with as many GPUs a replica), "
            helps += "a smaller max_model_len, a higher gpu_memory_utilization"
            checks.append((f"{name}.engine", engine_memory(shape, engine), room, helps))
    if "grpo.train" in trained and where.grpo.engine.transfer == "ipc":  # awake beside what the trainer always holds
        parts = trained["grpo.train"].memory(shape)
        state = sum(parts[part] for part in ("weights", "gradients", "optimizer", "reference", "reserve"))
        both = {"the engine awake": where.grpo.engine.gpu_memory_utilization * gpu_gib, "the trainer's state": state}
        share = math.floor(100 * max(0.0, 1 - state / gpu_gib)) / 100
        checks.append(("grpo.engine", both, gpu_gib, f"gpu_memory_utilization={share}"))
    problems = [
        f"resources.{name}: a GPU needs {sum(parts.values()):.1f} GiB ({listed(parts)}) and has {room:.1f}; "
        f"what helps: {helps}"
        for name, parts, room, helps in checks
        if sum(parts.values()) > room
    ]
    if problems:
        raise ConfigError("this plan cannot fit, by the arithmetic of docs/scaling.md:\n  " + "\n  ".join(problems))


def listed(parts: dict[str, float]) -> str:
    """`weights 5, gradients 10`: GiB, largest first, without what is below half of one."""
    return ", ".join(f"{name} {size:.0f}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size >= 0.5)


def knobs(name: str, training: Training, shape: ModelShape, room: float) -> str:
    """The settings that alone make a training step fit or, if none does, those that do together."""
    where = training.resources
    options: list[tuple[str, str, Any, bool]] = [
        ("resources", "zero_stage", 3, where.zero_stage < 3 and where.num_workers > 1),
        ("resources", "gradient_checkpointing", True, not where.gradient_checkpointing),
        ("resources", "micro_tokens", 2048, where.micro_tokens > 2048),
        ("resources", "offload_optimizer", True, not where.offload_optimizer and not training.optim.muon_lr),
        ("resources", "num_workers", 2 * where.num_workers, where.num_workers > 1 or where.zero_stage == 3),
        ("lora", "rank", 32, not training.lora.rank),
    ]
    keys = {"resources": f"resources.{name}", "lora": f"{name.partition('.')[0]}.lora"}
    alone, together, changed = list[str](), list[str](), training
    for part, key, value, is_new in options:
        setting = f"{keys[part]}.{key}={json.dumps(value)}"
        if is_new and _with(training, part, key, value).fits(shape, room):
            alone.append(setting)
        if is_new and not changed.fits(shape, room):
            changed = _with(changed, part, key, value)
            together.append(setting)
    if alone:
        return " or ".join(alone)
    return " with ".join(together) if changed.fits(shape, room) else "a smaller model or more GPUs"


def _with(training: Training, part: str, key: str, value: Any) -> Training:
    return replace(training, **{part: replace(getattr(training, part), **{key: value})})
