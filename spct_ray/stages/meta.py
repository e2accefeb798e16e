"""The meta RM: trained on unhinted cold-start judgements, right and wrong, and on-policy ones of the final judge.

Labels are Eq. 10's. Unparsable judgements have none and are left out, with a count. A share of the items, with all
their judgements, is held out; AUC, accuracy and calibration are measured on them alone.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spct_ray.errors import DataError
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.prompt import meta_messages
from spct_ray.judge.rule import is_correct, is_tied
from spct_ray.judge.seeds import derive_seed
from spct_ray.learn.examples import Example, make_example, write_examples
from spct_ray.learn.train_config import OptimConfig, TrainResources
from spct_ray.records import Message
from spct_ray.stages.supervised import SupervisedConfig, Task, encoded, run_on_ranks

Data = Literal["both", "off_policy", "on_policy"]


@dataclass(frozen=True)
class MetaConfig(SupervisedConfig):
    """The paper's values: lr 1e-5, batch 512, a copy of the base model (`init` "student").

    `heldout_share` of the items is never trained on. `data` is what is: cold-start judgements (off-policy), judgements
    of the judge that it will guide (on-policy), or both, as in the paper. Without `ties`, judgements that give their
    best score to several responses are left out: Eq. 10 calls them wrong, which takes no model to see, and a meta RM
    that can learn this learns little about the others.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, warmup_steps=30))
    batch_size: int = 512
    init: Literal["student", "rft", "grpo"] = "student"
    heldout_share: float = 0.1
    data: Data = "both"
    ties: bool = True


@dataclass(frozen=True, slots=True)
class _Labelled:
    item_id: str
    messages: tuple[Message, ...]
    label: int


@stage(version=3)
def run(context: StepContext, config: MetaConfig, resources: TrainResources) -> dict[str, Any]:
    """Train input "init" on inputs "sample" and "onpolicy" (of "items"); writes model/, metrics.jsonl, heldout.json.

    Raises DataError when nothing is left to train on or to hold out, SpctError when training diverges.
    """
    from spct_ray.evaluation.statistics import auc, ece

    task = Task("init", "meta", ("train.arrow",), scored="heldout")
    trained = run_on_ranks(context, config, resources, task, write_training_files)
    heldout = json.loads(Path(context.out, "heldout.json").read_text())
    logits, labels = heldout["logits"], heldout["labels"]
    measured: dict[str, Any] = {
        "heldout_accuracy": sum((x > 0) == bool(y) for x, y in zip(logits, labels, strict=True)) / len(labels),
        "heldout_share_right": sum(labels) / len(labels),
        "heldout_ece": ece([_sigmoid(x) for x in logits], labels, 10),
        "heldout_auc": auc(logits, labels),  # None with one class
    }
    shown = {name: None if value is None else round(value, 3) for name, value in measured.items()}
    context.log(", ".join(f"{name} {value}" for name, value in shown.items()))
    return trained | measured


def write_training_files(context: StepContext, config: MetaConfig) -> dict[str, int]:
    """Tokenise to train.arrow and heldout.arrow, split by item; counts by what became of the judgements."""
    model_dir = str(Path(context.inputs["init"]) / "model")
    counts: Counter[str] = Counter()
    parts: dict[str, list[Example]] = {"train": [], "heldout": []}
    judgements = list(labelled_judgements(context, counts, config.data, config.ties))
    for judgement, example in encoded(model_dir, _encode, judgements, config.max_tokens, counts):
        part = "heldout" if is_heldout(judgement.item_id, config.heldout_share, context.seed) else "train"
        counts[part] += 1
        parts[part].append(example)
    for part, examples in parts.items():
        if not examples:
            raise DataError(
                f"{context.name}: no judgement in the {part} set, counts {dict(counts)}; meta.heldout_share is "
                f"{config.heldout_share}, meta.max_tokens {config.max_tokens}"
            )
        write_examples(f"{context.out}/{part}.arrow", examples)
    return dict(counts)


def _encode(tokenizer: Any, judgement: _Labelled) -> Example:
    *prompt, text = judgement.messages
    return make_example(tokenizer, prompt, text.content, float(judgement.label))


def labelled_judgements(
    context: StepContext, counts: Counter[str], data: Data = "both", ties: bool = True
) -> Iterator[_Labelled]:
    """The cold start's judgements that saw no hint, then the on-policy ones, with what Eq. 10 says of them."""
    from spct_ray.cluster.sampling import read_trajectories
    from spct_ray.data.store import read_items

    items = {item.id: item for item in read_items(str(Path(context.inputs["items"]) / "train.parquet"))}
    sources = {"off_policy": ("sample", "cold_start"), "on_policy": ("onpolicy", "on_policy")}
    for role, kind in [source for name, source in sources.items() if data in ("both", name)]:
        for t in read_trajectories(context.inputs[role]):
            unfit = {"hinted": t.hinted, "unparsable": t.failure, "tied": not ties and t.scores and is_tied(t.scores)}
            counts[next((why for why, is_so in unfit.items() if is_so), kind)] += 1
            if any(unfit.values()):
                continue
            item = items[t.item_id]
            yield _Labelled(t.item_id, meta_messages(item, t.order, t.text), int(is_correct(t.scores, item.rewards)))


def is_heldout(item_id: str, share: float, seed: int) -> bool:
    """Whether an item, with all its judgements, is held out: a function of its id and the seed alone."""
    return derive_seed(seed, "heldout", item_id) % 10**6 < share * 10**6


def _sigmoid(logit: float) -> float:
    return 0.5 * (1 + math.tanh(logit / 2))
