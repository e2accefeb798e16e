"""The checker program as a judge of the built-in set: the stronger sampler of the cold start, where none is at hand.

It names each constraint, quotes from each response what decides it, says whether it is met, and scores. It errs on
purpose, at configured rates, in verdict and in format, so that rejection has work to do. Leaves out other data: an
item without `facts` has no checkers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from spct_ray.data.builtin import constraints_of
from spct_ray.data.constraints import Constraint
from spct_ray.judge.judge import JudgeTask, to_trajectory
from spct_ray.judge.prompt import JudgeConfig, scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Trajectory


@dataclass(frozen=True)
class ProgramConfig:
    """Error rates of one judgement. A hint takes the verdict errors away, as it would for a model."""

    verdict_error: float = 0.3
    format_error: float = 0.05


@dataclass(frozen=True, slots=True)
class ProgramJudge:
    """Judges items of the built-in set by their own constraints."""

    config: ProgramConfig
    judge_config: JudgeConfig
    name: str = "program"

    def judge(self, tasks: Sequence[JudgeTask]) -> list[Trajectory]:
        """One trajectory a task, in order; a task's seed decides its errors."""
        return [
            to_trajectory(task, self.judge_config, text=self._write(task), stop_reason="stop", model=self.name)
            for task in tasks
        ]

    def _write(self, task: JudgeTask) -> str:
        rng = random.Random(derive_seed(task.seed, "program"))
        constraints = constraints_of(task.item)
        shown = [task.item.responses[i] for i in task.order]
        met = [[c.check(text) for c in constraints] for text in shown]  # [N][constraints]
        if not task.hinted and rng.random() < self.config.verdict_error:
            _misjudge(met, rng)
        scale = scale_of(len(shown), self.judge_config)
        text = judgement(constraints, shown, met, 1 if scale.high == 1 else 9, scale.low)
        return _break_format(text, rng) if rng.random() < self.config.format_error else text


def judgement(
    constraints: Sequence[Constraint], shown: Sequence[str], met: Sequence[Sequence[bool]], high: int, low: int
) -> str:
    """The three parts: weighted criteria, evidence and finding for each response, scores.

    A response that meets all constraints gets `high`; one that does not gets `low` plus one for each constraint that
    it does meet (on the 0/1 scale just `low`).
    """
    share = 100 // len(constraints)
    criteria = "; ".join(f"{c.criterion} ({share}%)" for c in constraints)
    lines = []
    for place, (text, row) in enumerate(zip(shown, met, strict=True), 1):
        findings = "; ".join(
            f"{c.evidence(text)} {'yes' if ok else 'no'}" for c, ok in zip(constraints, row, strict=True)
        )
        lines.append(f"Response {place}: {findings}")
    scores = [high if all(row) else low + (sum(row) if high > 1 else 0) for row in met]
    box = ", ".join(map(str, scores))
    return f"Specific Criteria: {criteria}\nAnalysis:\n" + "\n".join(lines) + f"\nScores: \\boxed{{{box}}}"


def _misjudge(met: list[list[bool]], rng: random.Random) -> None:
    """Turn findings over so that the verdict is wrong: the best looks worse, another looks flawless, or both."""
    best = next((i for i, row in enumerate(met) if all(row)), None)
    if len(met) == 1:
        met[0][:] = [True] * len(met[0]) if best is None else _spoil(met[0], rng)
        return
    assert best is not None, "an item with n >= 2 has one response that meets all constraints"
    other = rng.choice([i for i in range(len(met)) if i != best])
    case = rng.randrange(3)
    if case != 0:
        met[other] = [True] * len(met[other])
    if case != 1:
        met[best] = _spoil(met[best], rng)


def _spoil(row: Sequence[bool], rng: random.Random) -> list[bool]:
    worse = list(row)
    worse[rng.randrange(len(worse))] = False
    return worse


def _break_format(text: str, rng: random.Random) -> str:
    """One way in which models miss the format: no box, a word for a score, one score too many, one out of range."""
    head, _, scores = text.rpartition("\\boxed{")
    numbers = scores.rstrip("}").split(", ")
    return rng.choice(
        [
            f"{head}{', '.join(numbers)}",
            f"{head}\\boxed{{good}}",
            f"{head}\\boxed{{{', '.join([*numbers, '5'])}}}",
            f"{head}\\boxed{{{', '.join(['11', *numbers[1:]])}}}",
        ]
    )
