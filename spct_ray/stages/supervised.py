"""Supervised training, as RFT, the meta RM and the Bradley-Terry baseline share it: they differ in head, loss and data.

Ranks are Ray Train workers with DeepSpeed. The data order is a function of (seed, step), so a killed run goes on from
its newest checkpoint.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from spct_ray.errors import ConfigError
from spct_ray.files import write_atomically
from spct_ray.graph.step import StepContext
from spct_ray.learn.examples import Example, ExampleFiles, MixedOrder
from spct_ray.learn.metrics_file import MetricsFile, mean_of_last_tenth, read_metrics
from spct_ray.learn.train_config import LoraConfig, OptimConfig, TrainResources

if TYPE_CHECKING:
    from spct_ray.learn.batch import Batch, BatchSize

R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True)
class SupervisedConfig:
    """Optimiser, adapters and amount of training.

    `max_steps` 0 means `epochs` (a fraction is allowed) over the examples. Examples of more than `max_tokens` tokens
    are dropped, with a count.
    """

    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    batch_size: int = 1024
    epochs: float = 1.0
    max_steps: int = 0
    max_tokens: int = 4096
    checkpoint_every: int = 50


@dataclass(frozen=True)
class Task:
    """One kind of supervised training: the model of the input `init` with a loss of `learn.losses.LOSSES`.

    It is trained on the first of the files `examples`, mixed with `shares` of a second one (see
    `learn.examples.MixedOrder`). If `scored` names held-out examples, SCORED.arrow, the trained model's logits of them
    are written to SCORED.json with their labels.
    """

    init: str
    loss: Literal["sft", "meta", "bradley_terry"]
    examples: tuple[str, ...]
    shares: tuple[float, ...] = (0.0,)
    scored: str = ""


def run_on_ranks(
    context: StepContext,
    config: SupervisedConfig,
    resources: TrainResources,
    task: Task,
    write: Callable[[StepContext, Any], dict[str, int]],
) -> dict[str, Any]:
    """`write` the training files, train, and return the counts, the number of steps, the mean loss of their last tenth
    and the median speed.

    Files are written once, before any rank starts: a resumed step finds `counts.json` beside them.
    """
    from spct_ray.cluster.train import run_ranks

    written = Path(context.out, "counts.json")
    if not written.exists():
        write_atomically(written, json.dumps(write(context, config)).encode())
    counts: dict[str, int] = json.loads(written.read_text())
    context.log(", ".join(f"{number} {name}" for name, number in counts.items()))
    run_ranks(train, (context, config, resources, task), resources, context)
    lines = read_metrics(context.out)
    return {
        **counts,
        "steps": len(lines),
        "loss_last_tenth": mean_of_last_tenth(lines, "loss"),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
    }


def encoded(
    model_dir: str, encode: Callable[[Any, R], Example], rows: Sequence[R], max_tokens: int, too_long: Counter[str]
) -> Iterator[tuple[R, Example]]:
    """Each row with its example, encoded by the tokenizer of `model_dir`. Rows of more than `max_tokens` tokens are
    dropped and counted in `too_long`."""
    from spct_ray.cluster.tokenise import encode_all

    for row, example in zip(rows, encode_all(model_dir, encode, rows), strict=True):
        if len(example.ids) <= max_tokens:
            yield row, example
        else:
            too_long["too_long"] += 1


def train(context: StepContext, config: SupervisedConfig, resources: TrainResources, task: Task) -> None:
    """On every rank: train until the data order is used up, from the newest checkpoint on, export to model/, and score
    the examples that `task` names.

    Writes metrics.jsonl: step (from 0), loss, grad_norm, lr, tokens (trained on), tokens_per_second (real tokens,
    prompts included) and seconds.
    """
    from spct_ray.learn.batch import BatchSize
    from spct_ray.learn.losses import LOSSES
    from spct_ray.learn.scorers import score_over_ranks
    from spct_ray.learn.trainer import Trainer

    loss = LOSSES[task.loss]
    examples = ExampleFiles(*(f"{context.out}/{name}" for name in task.examples))
    order = data_order(examples.sizes, config, context.seed, task.shares)
    trainer = Trainer(
        str(Path(context.inputs[task.init]) / "model"),
        head=loss.head,
        optim=config.optim,
        resources=resources,
        total_steps=order.num_steps,
        seed=context.seed,
        lora=config.lora,
    )
    trainer.resume(f"{context.out}/checkpoints")
    metrics = MetricsFile.on_rank_0(trainer.rank, context.out, trainer.steps_done, resources.tracker)

    def prepare(step: int) -> tuple[list[Batch], BatchSize, int]:
        batch = [examples[i] for i in order.batch(step)]
        num_tokens = sum(len(e.ids) for e in batch)
        size = BatchSize(len(batch), num_tokens - sum(e.prompt_length for e in batch))
        return loss.make_rows(batch, trainer.rank, trainer.world_size, resources.micro_tokens), size, num_tokens

    steps = range(trainer.steps_done, order.num_steps)
    started = time.monotonic()
    for step, (rows, size, num_tokens) in zip(steps, one_ahead(prepare, steps), strict=True):
        numbers = trainer.step(rows, lambda row, size=size: loss.loss_fn(trainer, row, size))  # type: ignore[misc]
        if metrics is not None:
            seconds = time.monotonic() - started
            rates = {"tokens_per_second": round(num_tokens / seconds, 1), "seconds": round(seconds, 4)}
            metrics.append({"step": step, **numbers, "tokens": size.num_tokens, **rates})
            context.progress(step + 1, order.num_steps, "steps", f"loss {numbers['loss']:.4f}")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == order.num_steps:
            trainer.save(f"{context.out}/checkpoints", {})
        started = time.monotonic()
    if metrics is not None:
        metrics.close()
    trainer.export(f"{context.out}/model")
    if task.scored:
        held = ExampleFiles(f"{context.out}/{task.scored}.arrow")
        scored = [held[i] for i in range(len(held))]
        logits = score_over_ranks(trainer, scored, resources.micro_tokens)
        if trainer.rank == 0:
            content = {"logits": logits, "labels": [int(example.label) for example in scored]}
            write_atomically(Path(context.out, f"{task.scored}.json"), json.dumps(content).encode())


def one_ahead(make: Callable[[int], T], steps: Sequence[int]) -> Iterator[T]:
    """`make(step)` for each step, made in a thread while the caller works on the one before. Raises what `make` does,
    when that step's turn comes."""
    with ThreadPoolExecutor(1) as thread:
        ahead = deque[Future[T]]()
        for step in steps:
            ahead.append(thread.submit(make, step))
            if len(ahead) == 2:
                yield ahead.popleft().result()
        for last in ahead:
            yield last.result()


def data_order(
    sizes: Sequence[int], config: SupervisedConfig, seed: int, shares: Sequence[float] = (0.0,)
) -> MixedOrder:
    """`max_steps` batches or, when that is 0, as many as give `epochs` passes over the first kind of examples."""
    batch_size, epochs, max_steps = config.batch_size, config.epochs, config.max_steps
    if batch_size < 1 or epochs < 0 or max_steps < 0 or not (epochs or max_steps):
        raise ConfigError(f"batch_size {batch_size}, epochs {epochs}, max_steps {max_steps}: nothing to train on")
    num_drawn = max(1, round(epochs * sizes[0] * len(shares) / sum(1 - share for share in shares)))
    return MixedOrder(tuple(sizes), max_steps * batch_size or num_drawn, batch_size, seed, tuple(shares))
