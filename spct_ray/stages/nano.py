"""The nano student, made from nothing: a tokenizer trained on the run's own prompts, and random weights.

It knows no language, no format and no task; the cold start teaches it all of them. Leaves out training.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spct_ray.data.builtin import SOURCE
from spct_ray.data.program import ProgramConfig, ProgramJudge
from spct_ray.data.store import read_items
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.prompt import JudgeConfig, judge_messages
from spct_ray.learn.nano import NanoConfig, write_nano
from spct_ray.records import Item

VERSION = 2
TOKENIZER_ITEMS = 2000  # items whose prompts and judgements the tokenizer is trained on
# The frame of the compact prompt, of the meta RM's, and of a judgement; a token each.
FRAME = (
    "Score 1-10.\nQuery:",
    "Score 0-1.\nQuery:",
    "Please score the responses.\nQuery:",
    *(piece.format(place) for place in range(1, 9) for piece in ("\n[Response {}]\n", "\n[End {}]", "\nResponse {}:")),
    "Specific Criteria:",
    " (100%)",
    " (50%)",
    "\nAnalysis:",
    "\nScores: \\boxed{",
)


@dataclass(frozen=True)
class NanoStudentConfig:
    """Shape of the model, and the prompt that its tokenizer learns."""

    shape: NanoConfig = field(default_factory=NanoConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(frozen=True)
class NanoStudentResources:
    """One process makes the model."""


def run(context: StepContext, config: NanoStudentConfig, _: NanoStudentResources) -> dict[str, Any]:
    """Write model/ from input "items"; started again after a kill, it makes the same model again."""
    items = read_items(str(Path(context.inputs["items"]) / "train.parquet"))
    model = Path(context.out) / "model"
    shutil.rmtree(model, ignore_errors=True)  # of an attempt that was killed
    texts = tokenizer_texts(items[:TOKENIZER_ITEMS], config.judge)
    num_weights = write_nano(str(model), config.shape, texts, FRAME, context.seed)
    context.log(f"nano student with {num_weights / 1e6:.2f} M random weights")
    return {"weights": num_weights}


def tokenizer_texts(items: Sequence[Item], judge: JudgeConfig) -> Iterator[str]:
    """Prompts, and for built-in items a judgement, so that its words are whole tokens."""
    program = ProgramJudge(ProgramConfig(finding_error=0, format_error=0), judge)
    for item in items:
        order = tuple(range(len(item.responses)))
        yield judge_messages(item, order, judge)[0].content
        if item.source == SOURCE:
            yield program.judge([JudgeTask(item, order, 0, 1.0, 0)])[0].text
