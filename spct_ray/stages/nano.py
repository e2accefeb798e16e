"""The nano student, made from nothing: a tokenizer of the built-in set's phrases, and random weights.

It knows no language, no format and no task; the cold start teaches it all of them. Leaves out training.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spct_ray.data.kinds import KINDS, NAMES
from spct_ray.graph.step import StepContext
from spct_ray.learn.nano import NanoConfig, write_nano

VERSION = 3
_MOST = 6  # responses and principles whose frame is whole tokens


@dataclass(frozen=True)
class NanoStudentConfig:
    """Shape of the model."""

    shape: NanoConfig = field(default_factory=NanoConfig)


@dataclass(frozen=True)
class NanoStudentResources:
    """One process makes the model."""


def run(context: StepContext, config: NanoStudentConfig, _: NanoStudentResources) -> dict[str, Any]:
    """Write model/; started again after a kill, it makes the same model again."""
    model = Path(context.out) / "model"
    shutil.rmtree(model, ignore_errors=True)  # of an attempt that was killed
    num_weights = write_nano(str(model), config.shape, phrases(), context.seed)
    context.log(f"nano student with {num_weights / 1e6:.2f} M random weights")
    return {"weights": num_weights}


def phrases() -> list[str]:
    """The frame of the compact prompt, of the meta RM's and of a judgement, and the words of the built-in set.

    Single characters are tokens anyway.
    """
    places = range(1, _MOST + 1)
    found = ["Score 1-10.\nQuery:", "Score 0-1.\nQuery:", "Please score the responses.\nQuery:", "\nPrinciples:"]
    found += [f"\n[Response {p}]\n{start}" for p in places for start in ("", "The")]
    found += [f"\n[End {p}]" for p in places]
    found += ["Specific Criteria:", "\nAnalysis:", "\nScores: \\boxed{"]
    found += [f" ({100 // p}%);" for p in places]
    found += [f" total {score}." for score in range(11)] + ["10", *(f" {score}" for score in range(1, 11))]
    found += [" Write for", *(f" {name}" for split in NAMES.values() for name in split)]
    for kind in KINDS.values():
        found += [f" {kind.name}", *(f" ({kind.name}: {answer})" for answer in ("yes", "no"))]
        found += [f" {word}" for word in kind.words]
    return list(dict.fromkeys(found))
