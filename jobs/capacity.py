"""Memory of each GPU and time of a GRPO step on paper, for a recipe as it is or on other numbers of GPUs.

`python -m jobs.capacity CONFIG [key=value ...] [--gpus 8 16 64]` prints Markdown tables. Arithmetic of shapes, not a
measurement: memory is what `spct plan` checks (stages/plan_check.py), the constants below are the assumptions about
time, and docs/scaling.md explains both.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from jobs.flops import Work, work_of
from spct_ray.cli import guarded
from spct_ray.config import load
from spct_ray.engines.base import EngineResources
from spct_ray.errors import ConfigError
from spct_ray.stages.plan_check import ModelShape, Training, engine_memory, knobs, shape_of, trainings
from spct_ray.stages.recipe import Recipe

# An H100 SXM, eight a node.
PEAK_FLOPS = 989e12  # dense bf16
MFU = 0.4  # share of it that training and prefill reach
MEMORY_BYTES_S = 0.6 * 3.35e12
FILE_BYTES_S = 2e9  # shared file system: of each writer and of each reader
NVLINK_BYTES_S, NETWORK_BYTES_S = 0.8 * 450e9, 0.8 * 50e9  # a GPU, within a node and beyond
CPU_ADAM_BYTES_S = 12.5e9  # host memory for one rank of eight; an update touches 28 bytes a weight
COMPLETION_TOKENS = 300  # mean of a judgement (paper: 220 to 380)
PROMPT_SHARE = 0.5  # mean prompt, as a share of the longest


def update_seconds(training: Training, shape: ModelShape, work: Work) -> float:
    """Time of an update: computing beside communicating, then the optimizer."""
    where, weights = training.resources, shape.weights
    ranks = where.num_workers
    trained = shape.adapters(training.lora) if training.lora.rank else weights
    flops = work.forward(shape) + work.backward(shape, frozen=bool(training.lora.rank))
    if where.gradient_checkpointing:
        flops += replace(work, logits=0).forward(shape)
    compute = flops / (ranks * PEAK_FLOPS * MFU)
    rows = max(1, math.ceil(work.tokens / ranks / where.micro_tokens))
    moved = 4 * trained * (rows if where.zero_stage > 1 else 2) + training.width * trained
    if where.zero_stage == 3:
        moved += 2 * training.width * weights * rows
    communicate = moved / link(ranks) if ranks > 1 else 0.0
    update = 28 * trained / ranks / (CPU_ADAM_BYTES_S if where.offload_optimizer else MEMORY_BYTES_S)
    return max(compute, communicate) + update


def forward_seconds(training: Training, shape: ModelShape, work: Work) -> float:
    """Time of a forward pass (the reference's)."""
    where, ranks = training.resources, training.resources.num_workers
    rows = max(1, math.ceil(work.tokens / ranks / where.micro_tokens))
    moved = training.width * shape.weights * rows if where.zero_stage == 3 and ranks > 1 else 0
    return max(work.forward(shape) / (ranks * PEAK_FLOPS * MFU), moved / link(ranks))


def checkpoint(training: Training, shape: ModelShape) -> tuple[float, float]:
    """Bytes of a checkpoint, fp32 masters and moments, and the seconds that the ranks take to write their parts."""
    size = 12 * (shape.adapters(training.lora) if training.lora.rank else shape.weights)
    return size, size / training.resources.num_workers / FILE_BYTES_S


def checkpoints(recipe: Recipe, shape: ModelShape) -> dict[str, float]:
    """GB of a checkpoint of each step that trains on GPUs, seconds to write it, and updates from one to the next."""
    figures: dict[str, float] = {}
    for name, training in trainings(recipe).items():
        step, (size, seconds) = name.partition(".")[0], checkpoint(training, shape)
        figures |= {f"{step}, GB": size / 1e9, f"{step}, seconds": seconds}
        figures[f"{step}, every"] = getattr(recipe, step).checkpoint_every
    return figures


def link(ranks: int) -> float:
    """Bytes a second between ranks."""
    return NVLINK_BYTES_S if ranks <= 8 else NETWORK_BYTES_S


def grpo_seconds(recipe: Recipe, shape: ModelShape) -> dict[str, float]:
    """Time of a GRPO step by phase, and of the whole: with `max_staleness` 1 the engines work beside the ranks."""
    config, where = recipe.grpo, recipe.resources.grpo
    completion = min(COMPLETION_TOKENS, recipe.judge.budget)
    prompt, sequences = PROMPT_SHARE * config.max_prompt_tokens, config.prompts_per_step * config.group_size
    trees = [(prompt, [completion] * config.group_size)] * config.prompts_per_step
    work = work_of(shape, trees, sequences * completion)
    training = Training(where.train, config.lora, config.optim, config.beta > 0)
    engine, replicas = where.engine, where.rollout.num_replicas
    prefill = work_of(shape, [(prompt, ())] * config.prompts_per_step, 0).forward(shape)
    prefill /= replicas * engine.tensor_parallel * PEAK_FLOPS * MFU
    running = min(engine.num_seqs(on_gpu=True), math.ceil(sequences / replicas))
    waves = math.ceil(sequences / replicas / running)
    read = 2 * (shape.weights + running * shape.kv_numel * (prompt + completion / 2)) / engine.tensor_parallel
    decode = waves * completion * read / MEMORY_BYTES_S
    sent = 2 * 2 * shape.weights  # gathered or written, then received or read
    phases = {
        "sync": sent / {"directory": FILE_BYTES_S, "nccl": NETWORK_BYTES_S, "ipc": MEMORY_BYTES_S}[engine.transfer],
        "rollout": prefill + decode,
        "reference": forward_seconds(training, shape, work) if config.beta > 0 else 0.0,
        "train": update_seconds(training, shape, work),
        "checkpoint": checkpoint(training, shape)[1] / config.checkpoint_every,
    }
    whole = sum(phases.values())
    if config.max_staleness:
        whole -= min(phases["rollout"], phases["reference"] + phases["train"])
    return phases | {"step": whole}


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
    shape = shape_of(recipe.student)
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
            training, room = trainings(variant)[name], recipe.resources.cluster.gpu_gib
            if not training.fits(shape, room):
                lines.append(f"{title} do not fit; what helps: {knobs(name, training, shape, room)}\n")
    columns = {}
    for title, variant in variants.items():
        engine, parts = variant.resources.grpo.engine, engine_memory(shape, variant.resources.grpo.engine)
        share = engine.gpu_memory_utilization * recipe.resources.cluster.gpu_gib
        cache = share - parts["weights"] - parts["reserve"]
        needed = {"weights": parts["weights"], "reserve": parts["reserve"], "cache": cache}
        title = f"{title}: {variant.resources.grpo.rollout.num_replicas} engines"
        columns[title] = needed | {"needed": parts["one sequence"]}
    lines.append(table("grpo.engine, GiB", columns))
    columns = {}
    for title, variant in variants.items():
        columns[title] = grpo_seconds(variant, shape)
    lines.append(table("GRPO step, seconds", columns))
    lines.append(table("checkpoints (two are kept)", {title: checkpoints(v, shape) for title, v in variants.items()}))
    return "\n".join(lines)


def table(title: str, columns: dict[str, dict[str, float]]) -> str:
    """A Markdown table with the parts as rows."""
    rows = [f"| {title} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for part in next(iter(columns.values())):
        rows.append(f"| {part} | {' | '.join(f'{column[part]:.1f}' for column in columns.values())} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    """Parse the arguments and print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.capacity", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=int, nargs="+", default=[], metavar="N", help="for so many GPUs, e.g. 8 16 64")
    options = parser.parse_args()
    command = shlex.join(["python", "-m", "jobs.capacity", *sys.argv[1:]])
    return guarded(lambda: print(tables(load(Recipe, options.config, options.overrides), options.gpus)), command)


if __name__ == "__main__":
    sys.exit(main())
