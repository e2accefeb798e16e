"""A scalar baseline on the same data with the same trainer: a Bradley-Terry reward model of the training items.

Pairs are the best response of an item and each other one, all that Eq. 10 uses of the rewards. It is
measured by `spct evaluate RUN:bradley_terry`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spct_ray.errors import DataError
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.learn.examples import Example, make_pair, write_examples
from spct_ray.learn.train_config import OptimConfig, TrainResources
from spct_ray.records import Message
from spct_ray.stages.supervised import SupervisedConfig, Task, encoded, run_on_ranks

_Pair = tuple[tuple[Message, ...], str, str]  # query, chosen, rejected


@dataclass(frozen=True)
class BradleyTerryConfig(SupervisedConfig):
    """`batch_size` counts pairs; the model starts as a copy of `init`."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, warmup_steps=30))
    batch_size: int = 512
    init: Literal["student", "rft", "grpo"] = "student"


@stage(version=1)
def run(context: StepContext, config: BradleyTerryConfig, resources: TrainResources) -> dict[str, Any]:
    """Train input "init" on the training items of input "items"; writes model/, metrics.jsonl and checkpoints/.

    Raises DataError when no pair is short enough, SpctError when training diverges.
    """
    task = Task("init", "bradley_terry", ("pairs.arrow",))
    return run_on_ranks(context, config, resources, task, write_training_file)


def write_training_file(context: StepContext, config: BradleyTerryConfig) -> dict[str, int]:
    """Tokenise pairs.arrow; counts of pairs kept and dropped, and of items without a pair."""
    from spct_ray.data.store import read_items

    counts: Counter[str] = Counter()
    pairs: list[_Pair] = []
    for item in read_items(str(Path(context.inputs["items"]) / "train.parquet")):
        counts["single_responses"] += len(item.responses) == 1
        best = item.responses[item.best]
        others = [response for place, response in enumerate(item.responses) if place != item.best]
        pairs += [(item.messages, best, other) for other in others]
    model_dir = str(Path(context.inputs["init"]) / "model")
    kept = (example for _, example in encoded(model_dir, _encode, pairs, config.max_tokens, counts))
    counts["pairs"] = write_examples(f"{context.out}/pairs.arrow", kept)
    if not counts["pairs"]:
        raise DataError(
            f"{context.name}: no pair of responses to train on, counts {dict(counts)}; bradley_terry.max_tokens is "
            f"{config.max_tokens}, for query and both responses"
        )
    return dict(counts)


def _encode(tokenizer: Any, pair: _Pair) -> Example:
    return make_pair(tokenizer, *pair)
