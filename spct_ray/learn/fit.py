"""The supervised loop that RFT and the meta RM share: batch by step number, update, log, checkpoint, resume."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from spct_ray.learn.batch import Batch, BatchSize, make_batch, plan_rows
from spct_ray.learn.config import TrackerName
from spct_ray.learn.examples import Example, ExampleFiles, MixedOrder
from spct_ray.learn.metrics_file import MetricsFile
from spct_ray.learn.trainer import Trainer

T = TypeVar("T")
RowMaker = Callable[[Sequence[Example], int, int, int], list[Batch]]  # (examples, rank, ranks, micro_tokens) -> rows


def fit(
    trainer: Trainer,
    examples: ExampleFiles,
    order: MixedOrder,
    loss_fn: Callable[[Batch, BatchSize], Tensor],
    *,
    out: str,
    micro_tokens: int,
    checkpoint_every: int,
    tracker: TrackerName,
    progress: Callable[[int, int, str, str], None],
    make_rows: RowMaker | None = None,
) -> None:
    """Train until `order` is used up, from the newest checkpoint in `out`/checkpoints. Collective.

    Writes `out`/metrics.jsonl: step (from 0), loss, grad_norm, lr, tokens (trained on), tokens_per_second (real tokens,
    prompts included) and seconds; metrics.parquet at the end. `loss_fn` is given a packed row (label in `extras`) and
    the size of the whole update, by which it divides. `make_rows` packs other examples than single sequences
    (`rank_rows`).
    """
    make_rows = make_rows or rank_rows
    trainer.resume(f"{out}/checkpoints")
    path = Path(out, "metrics.jsonl")
    metrics = MetricsFile(path, trainer.steps_done, tracker) if trainer.rank == 0 else None

    def prepare(step: int) -> tuple[list[Batch], BatchSize, int]:
        batch = [examples[i] for i in order.batch(step)]
        num_tokens = sum(len(e.ids) for e in batch)
        size = BatchSize(len(batch), num_tokens - sum(e.prompt_length for e in batch))
        return make_rows(batch, trainer.rank, trainer.world_size, micro_tokens), size, num_tokens

    steps = range(trainer.steps_done, order.num_steps)
    started = time.monotonic()
    for step, (rows, size, num_tokens) in zip(steps, one_ahead(prepare, steps), strict=True):
        numbers = trainer.step(rows, lambda row, size=size: loss_fn(row, size))  # type: ignore[misc]
        if metrics is not None:
            seconds = time.monotonic() - started
            rates = {"tokens_per_second": round(num_tokens / seconds, 1), "seconds": round(seconds, 4)}
            metrics.append({"step": step, **numbers, "tokens": size.num_tokens, **rates})
            progress(step + 1, order.num_steps, "steps", f"loss {numbers['loss']:.4f}")
        if (step + 1) % checkpoint_every == 0 or step + 1 == order.num_steps:
            trainer.save(f"{out}/checkpoints", {})
        started = time.monotonic()
    if metrics is not None:
        metrics.close()


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


def rank_rows(examples: Sequence[Example], rank: int, num_ranks: int, micro_tokens: int) -> list[Batch]:
    """One rank's share as packed rows of at most `micro_tokens`, with the examples' labels."""
    ids, prompts = [e.ids for e in examples], [e.prompt_length for e in examples]
    rows = plan_rows(ids, prompts, micro_tokens=micro_tokens, num_ranks=num_ranks)[rank]
    batches = [make_batch([ids[i] for i in row], [prompts[i] for i in row]) for row in rows]
    return [
        replace(batch, extras={"label": torch.tensor([examples[i].label for i in row])})
        for batch, row in zip(batches, rows, strict=True)
    ]
