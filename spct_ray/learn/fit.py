"""The supervised loop that RFT and the meta RM share: batch by step number, update, log, checkpoint, resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spct_ray.learn.batch import Batch, make_batch, plan_micro_batches, share_of_rank
from spct_ray.learn.examples import DataOrder, Example, ExampleFile
from spct_ray.learn.metrics_file import MetricsFile
from spct_ray.learn.trainer import Trainer


@dataclass(frozen=True)
class BatchSize:
    """Of one update, over all ranks: what a loss divides by."""

    num_sequences: int
    num_tokens: int  # trained on


def fit(
    trainer: Trainer,
    examples: ExampleFile,
    order: DataOrder,
    loss_fn: Callable[[Batch, BatchSize], Tensor],
    *,
    out: str,
    micro_tokens: int,
    checkpoint_every: int,
    progress: Callable[[int, int, str, str], None],
) -> None:
    """Train until `order` is used up, from the newest checkpoint in `out`/checkpoints. Collective.

    Writes `out`/metrics.jsonl: step (from 0), loss, grad_norm, lr, tokens (trained on), tokens_per_second (real tokens,
    prompts included) and seconds. `loss_fn` is given a micro-batch (label in `extras`) and the size of the whole
    update, by which it divides.
    """
    trainer.resume(f"{out}/checkpoints")
    metrics = MetricsFile(Path(out, "metrics.jsonl"), trainer.steps_done) if trainer.rank == 0 else None
    for step in range(trainer.steps_done, order.num_steps):
        started = time.monotonic()
        batch = [examples[i] for i in order.batch(step)]
        size = BatchSize(len(batch), sum(len(e.ids) - e.prompt_length for e in batch))
        lengths = [len(e.ids) for e in batch]
        share = [batch[i] for i in share_of_rank(lengths, trainer.rank, trainer.world_size)]
        numbers = trainer.step(micro_batches(share, micro_tokens), lambda part, size=size: loss_fn(part, size))  # type: ignore[misc]
        if metrics is not None:
            seconds = time.monotonic() - started
            rates = {"tokens_per_second": round(sum(lengths) / seconds, 1), "seconds": round(seconds, 4)}
            metrics.append({"step": step, **numbers, "tokens": size.num_tokens, **rates})
            progress(step + 1, order.num_steps, "steps", f"loss {numbers['loss']:.4f}")
        if (step + 1) % checkpoint_every == 0 or step + 1 == order.num_steps:
            trainer.save(f"{out}/checkpoints", {})


def micro_batches(examples: list[Example], micro_tokens: int) -> list[Batch]:
    """Padded batches of at most `micro_tokens`, with the examples' labels."""
    plan = plan_micro_batches([len(e.ids) for e in examples], micro_tokens)
    parts = [[examples[i] for i in indices] for indices in plan]
    return [
        make_batch([e.ids for e in p], [e.prompt_length for e in p], {"label": torch.tensor([e.label for e in p])})
        for p in parts
    ]
