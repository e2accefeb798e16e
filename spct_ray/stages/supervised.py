"""What the two supervised stages share: RFT and the meta RM differ in head, loss and data, not in how they train.

Ranks are Ray Train workers with DeepSpeed; the data order is a function of (seed, step), so a killed run goes on where
its newest checkpoint was.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spct_ray.errors import ConfigError
from spct_ray.graph.record import write_atomically
from spct_ray.graph.step import StepContext
from spct_ray.learn.config import LoraConfig, OptimConfig, TrainResources

if TYPE_CHECKING:
    from torch import Tensor

    from spct_ray.learn.examples import MixedOrder
    from spct_ray.learn.fit import RowMaker
    from spct_ray.learn.model import Head
    from spct_ray.learn.trainer import Trainer

TrainLoop = Callable[[StepContext, Any, TrainResources], None]  # runs on every rank
Counts = dict[str, int]


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


def run_on_ranks(
    context: StepContext,
    config: Any,
    resources: TrainResources,
    train_loop: TrainLoop,
    write: Callable[[StepContext, Any], Counts],
) -> dict[str, Any]:
    """`write` the training files, train, and give the counts with `summary_of_metrics`.

    Files are written once, before any rank starts: a resumed step finds `counts.json` beside them.
    """
    from spct_ray.cluster.train import run_ranks

    written = Path(context.out, "counts.json")
    if not written.exists():
        write_atomically(str(written), json.dumps(write(context, config)).encode())
    counts: Counts = json.loads(written.read_text())
    context.log(", ".join(f"{number} {name}" for name, number in counts.items()))
    run_ranks(train_loop, (context, config, resources), resources, context)
    return {**counts, **summary_of_metrics(context.out)}


def train(
    context: StepContext,
    config: SupervisedConfig,
    resources: TrainResources,
    *,
    init: str,
    head: Head,
    loss_fn: Callable[..., Tensor],
    examples: Sequence[str],
    shares: Sequence[float] = (0.0,),
    make_rows: RowMaker | None = None,
) -> Trainer:
    """On every rank: load `init`, resume, train on the first of the files `examples` with `loss_fn`, export to model/.

    `shares` are of examples of the second file, see `learn.examples.MixedOrder`.
    """
    from spct_ray.learn.examples import ExampleFiles
    from spct_ray.learn.fit import fit
    from spct_ray.learn.trainer import Trainer

    files = ExampleFiles([f"{context.out}/{name}" for name in examples])
    order = data_order(files.sizes, config, context.seed, shares)
    trainer = Trainer(
        str(Path(context.inputs[init]) / "model"),
        head=head,
        optim=config.optim,
        resources=resources,
        total_steps=order.num_steps,
        seed=context.seed,
        lora=config.lora,
    )
    fit(
        trainer,
        files,
        order,
        partial(loss_fn, trainer),
        out=context.out,
        micro_tokens=resources.micro_tokens,
        checkpoint_every=config.checkpoint_every,
        tracker=resources.tracker,
        progress=context.progress,
        make_rows=make_rows,
    )
    trainer.export(f"{context.out}/model")
    return trainer


def data_order(
    sizes: Sequence[int], config: SupervisedConfig, seed: int, shares: Sequence[float] = (0.0,)
) -> MixedOrder:
    """`max_steps` batches or, when that is 0, as many as give `epochs` passes over the first kind of examples."""
    from spct_ray.learn.examples import MixedOrder

    batch_size, epochs, max_steps = config.batch_size, config.epochs, config.max_steps
    if batch_size < 1 or epochs < 0 or max_steps < 0 or not (epochs or max_steps):
        raise ConfigError(f"batch_size {batch_size}, epochs {epochs}, max_steps {max_steps}: nothing to train on")
    num_drawn = max(1, round(epochs * sizes[0] * len(shares) / sum(1 - share for share in shares)))
    return MixedOrder(tuple(sizes), max_steps * batch_size or num_drawn, batch_size, seed, tuple(shares))


def summary_of_metrics(out: str) -> dict[str, Any]:
    """Steps, the mean loss of the last tenth of them, and the median speed, from metrics.jsonl."""
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    tail = lines[-max(1, len(lines) // 10) :]
    return {
        "steps": len(lines),
        "loss_last_tenth": statistics.fmean(line["loss"] for line in tail),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
    }
