"""Whether a recipe's training steps and engines fit their GPUs, by `scaling.py`, and which setting helps if not.

Leaves out models whose shape is not known (see `scaling.shape_of`) and everything on CPUs. Loads neither torch nor Ray
nor vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from spct_ray.engines.base import EngineConfig, EngineResources
from spct_ray.errors import ConfigError
from spct_ray.learn.flops import ModelShape, work_of
from spct_ray.stages.recipe import Recipe
from spct_ray.stages.scaling import (
    COMPLETION_TOKENS,
    FILE_BYTES_S,
    MEMORY_BYTES_S,
    MFU,
    PEAK_FLOPS,
    PROMPT_SHARE,
    Training,
    engine_memory,
    shape_of,
)


def grpo_seconds(recipe: Recipe, shape: ModelShape) -> dict[str, float]:
    """Time of a GRPO step by phase."""
    config, where = recipe.grpo, recipe.resources.grpo
    completion = min(COMPLETION_TOKENS, recipe.judge.budget)
    prompt, sequences = PROMPT_SHARE * config.max_prompt_tokens, config.prompts_per_step * config.group_size
    trees = [(prompt, [completion] * config.group_size)] * config.prompts_per_step
    work = work_of(shape, trees, sequences * completion)
    training = Training(where.train, config.lora, config.optim, config.beta > 0)
    engine, replicas = where.engine, where.rollout.num_replicas
    prefill = work_of(shape, [(prompt, ())] * config.prompts_per_step, 0).forward(shape)
    prefill /= replicas * engine.tensor_parallel * PEAK_FLOPS * MFU
    running = min(engine.max_num_seqs, math.ceil(sequences / replicas))
    waves = math.ceil(sequences / replicas / running)
    read = 2 * (shape.weights + running * shape.kv_numel * (prompt + completion / 2)) / engine.tensor_parallel
    decode = waves * completion * read / MEMORY_BYTES_S
    return {
        "sync": 2 * 2 * shape.weights / FILE_BYTES_S,
        "rollout": prefill + decode,
        "reference": training.forward_seconds(shape, work) if config.beta > 0 else 0.0,
        "train": training.seconds(shape, work),
    }


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
    return {name: engine for name, (resources, engine) in placed.items() if resources.gpus_per_replica > 0}


def beside(recipe: Recipe, name: str) -> float:
    """GiB that an engine takes on the GPUs of a training step: GRPO's, where each asks for a part of a GPU."""
    where, gpu_gib = recipe.resources.grpo, recipe.resources.cluster.gpu_gib
    shared = name == "grpo.train" and where.train.gpus_per_worker < 1 and 0 < where.rollout.gpus_per_replica < 1
    return where.engine.gpu_memory_utilization * gpu_gib if shared else 0.0


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


def on_gpus(recipe: Recipe, num: int) -> Recipe:
    """The recipe on so many whole GPUs: GRPO shares them out between ranks and engines as it does now, the other steps
    take them all."""
    where = recipe.resources
    train, rollout, size = where.grpo.train, where.grpo.rollout, where.grpo.engine.tensor_parallel
    now = rollout.num_replicas * size
    replicas = max(1, round(num * now / (now + train.num_workers) / size))
    ranks = num - replicas * size
    if ranks < 1:
        raise ConfigError(f"{num} GPUs are too few for an engine on {size} and one rank that trains beside it")
    policy = replace(
        where.grpo,
        train=replace(train, num_workers=ranks, gpus_per_worker=1),
        rollout=EngineResources(replicas, rollout.cpus_per_replica, size),
    )
    rft, meta = (replace(r, num_workers=num, gpus_per_worker=1) for r in (where.rft, where.meta))
    return replace(recipe, resources=replace(where, grpo=policy, rft=rft, meta=meta))


def tables(recipe: Recipe, gpus: Sequence[int]) -> str:
    """Markdown: GiB of each GPU by part, and seconds of a GRPO step by phase, for so many GPUs (none: as configured).

    Raises ConfigError for a model whose shape is not known.
    """
    shape = None if recipe.nano else shape_of(recipe.student.model)
    if shape is None:
        raise ConfigError(
            f"the shape of student.model {recipe.student.model!r} is not known: give the directory of a dense model"
        )
    variants = {f"{num} GPUs": on_gpus(recipe, num) for num in gpus} or {"as configured": recipe}
    columns: dict[str, dict[str, float]]
    lines = [f"{recipe.student.model}, {shape.weights / 1e9:.1f} B weights\n"]
    for name in trainings(next(iter(variants.values()))):
        columns = {}
        for title, variant in variants.items():
            training = trainings(variant)[name]
            parts = training.memory(shape)
            columns[f"{title}: {training.resources.num_workers} ranks"] = parts | {"sum": sum(parts.values())}
        lines.append(table(f"{name}, GiB", columns))
        for title, variant in variants.items():
            training, room = trainings(variant)[name], recipe.resources.cluster.gpu_gib - beside(variant, name)
            if sum(training.memory(shape).values()) > room:
                lines.append(f"{title} do not fit; what helps: {knobs(name, training, shape, room)}\n")
    columns = {
        f"{title}: {v.resources.grpo.rollout.num_replicas} engines": engine_memory(
            shape, v.resources.grpo.engine, recipe.resources.cluster.gpu_gib
        )
        for title, v in variants.items()
    }
    lines.append(table("grpo.engine, GiB", columns))
    columns = {}
    for title, variant in variants.items():
        seconds = grpo_seconds(variant, shape)
        columns[title] = seconds | {"sum": sum(seconds.values())}
    lines.append(table("GRPO step, seconds", columns))
    return "\n".join(lines)


def table(title: str, columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table with the parts as rows."""
    rows = [f"| {title} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for part in next(iter(columns.values())):
        rows.append(f"| {part} | {' | '.join(f'{column[part]:.1f}' for column in columns.values())} |")
    return "\n".join(rows) + "\n"
