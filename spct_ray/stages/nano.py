"""The nano student, made from nothing: tokenizer, random weights, and a short pretraining that teaches it to copy.

The paper starts from a pretrained model. So does this step's output: next-token training on prompts (no judgement among
them) and on lines of words said twice. Judging by quotation needs copying, which a few thousand judgements alone teach
only slowly (docs/results.md). The result knows neither the format nor the task.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from spct_ray.data.builtin import SOURCE
from spct_ray.data.program import ProgramConfig, ProgramJudge
from spct_ray.data.store import read_items
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.prompt import JudgeConfig, judge_messages
from spct_ray.judge.seeds import derive_seed
from spct_ray.learn.config import OptimConfig, TrainResources
from spct_ray.learn.nano import NanoConfig, write_nano
from spct_ray.records import Item

VERSION = 1
TOKENIZER_ITEMS = 2000  # items whose prompts and judgements the tokenizer is trained on
REPEATED_WORDS = (8, 20)  # words in a line that is said twice
MAX_TOKENS = 512  # of one text


@dataclass(frozen=True)
class NanoStudentConfig:
    """Shape of the model and its pretraining: `num_texts` texts, each seen once, half of them prompts."""

    shape: NanoConfig = field(default_factory=NanoConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, warmup_steps=30, weight_decay=0.01))
    num_texts: int = 6400
    batch_size: int = 32
    judge: JudgeConfig = field(default_factory=JudgeConfig)


def run(context: StepContext, config: NanoStudentConfig, resources: TrainResources) -> dict[str, Any]:
    """Train on the prompts of input "items"; writes model/, metrics.jsonl and checkpoints/. Resumes within training."""
    from transformers import AutoTokenizer

    from spct_ray.cluster.train import run_ranks
    from spct_ray.learn.examples import Example, write_examples

    items = read_items(str(Path(context.inputs["items"]) / "train.parquet"))
    start = f"{context.out}/start"
    num_weights = write_nano(start, config.shape, tokenizer_texts(items[:TOKENIZER_ITEMS], config.judge), context.seed)
    context.log(f"nano student with {num_weights / 1e6:.2f} M weights, pretraining on {config.num_texts} texts")
    tokenizer = AutoTokenizer.from_pretrained(start)
    texts = pretraining_texts(items, config.judge, config.num_texts, context.seed)
    write_examples(f"{context.out}/examples.arrow", (Example(tokenizer.encode(text)[:MAX_TOKENS], 1) for text in texts))
    run_ranks(train_loop, (context, config, resources), resources, context)
    return {"weights": num_weights}


def train_loop(context: StepContext, config: NanoStudentConfig, resources: TrainResources) -> None:
    """On every rank: next-token loss on the whole text."""
    from spct_ray.learn.examples import DataOrder, ExampleFile
    from spct_ray.learn.fit import fit
    from spct_ray.learn.sft import sft_loss
    from spct_ray.learn.trainer import Trainer

    examples = ExampleFile(f"{context.out}/examples.arrow")
    order = DataOrder(len(examples), len(examples), config.batch_size, context.seed)
    trainer = Trainer(
        f"{context.out}/start",
        head="lm",
        optim=config.optim,
        resources=resources,
        total_steps=order.num_steps,
        seed=context.seed,
    )
    fit(
        trainer,
        examples,
        order,
        partial(sft_loss, trainer),
        out=context.out,
        micro_tokens=resources.micro_tokens,
        checkpoint_every=100,
        progress=context.progress,
    )
    trainer.export(f"{context.out}/model")


def tokenizer_texts(items: Sequence[Item], judge: JudgeConfig) -> Iterator[str]:
    """Prompts, and for built-in items a judgement, so that its words are whole tokens."""
    program = ProgramJudge(ProgramConfig(verdict_error=0, format_error=0), judge)
    for item in items:
        order = tuple(range(len(item.responses)))
        yield judge_messages(item, order, judge)[0].content
        if item.source == SOURCE:
            yield program.judge([JudgeTask(item, order, 0, 1.0, 0)])[0].text


def pretraining_texts(items: Sequence[Item], judge: JudgeConfig, num: int, seed: int) -> Iterator[str]:
    """`num` texts, by turns a prompt and a line of random words of prompts that is said twice."""
    rng = random.Random(derive_seed(seed, "pretraining"))
    words: list[str] = []
    for number in range(num):
        if number % 2 == 0:
            item = items[number // 2 % len(items)]
            text = judge_messages(item, rng.sample(range(len(item.responses)), len(item.responses)), judge)[0].content
            words = (words + text.split())[-5000:]
            yield text
        else:
            line = " ".join(rng.choice(words) for _ in range(rng.randint(*REPEATED_WORDS)))
            yield f"{line}\n{line}\n"
