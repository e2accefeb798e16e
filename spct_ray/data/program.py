"""The checker program as a judge of the built-in set: the stronger sampler of the cold start, where none is at hand.

It names each constraint, quotes from each response what decides it, says whether it is met, and scores. It errs on
purpose, at configured rates, in its findings and in format, so that rejection has work to do; and told the answer by a
hint it may take a short cut, as the paper saw models do: a critique that asserts the verdict without looking. Eq. 10
cannot reject those, so the cold start teaches them too, and only RL without hints can unlearn them. Leaves out other
data: an item without `facts` has no checkers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from spct_ray.data.builtin import constraints_of
from spct_ray.data.constraints import Constraint
from spct_ray.judge.judge import JudgeTask, to_trajectory
from spct_ray.judge.modes import MODES
from spct_ray.judge.prompt import JudgeConfig, scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Trajectory


@dataclass(frozen=True)
class ProgramConfig:
    """`finding_error` is the chance to misjudge one response, so judging many goes wrong more often; a hint takes these
    errors away. `format_error` is of a whole judgement, `hint_shortcut` of a hinted one."""

    finding_error: float = 0.2
    format_error: float = 0.05
    hint_shortcut: float = 0.5


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
        if not task.hinted:
            met = [_misjudge(row, rng) if rng.random() < self.config.finding_error else row for row in met]
        scale = scale_of(len(shown), self.judge_config)
        shortcut = task.hinted and rng.random() < self.config.hint_shortcut
        text = judgement(constraints, shown, met, 1 if scale.high == 1 else 9, scale.low, shortcut)
        if not MODES[self.judge_config.mode].criteria:
            text = text[text.index("Analysis:") :]
        return _break_format(text, rng) if rng.random() < self.config.format_error else text


def judgement(
    constraints: Sequence[Constraint],
    shown: Sequence[str],
    met: Sequence[Sequence[bool]],
    high: int,
    low: int,
    shortcut: bool = False,
) -> str:
    """The three parts: weighted criteria, evidence and finding for each response (with `shortcut`, the bare verdict),
    scores.

    A response that meets all constraints gets `high`; one that does not gets `low` plus one for each constraint that
    it does meet (on the 0/1 scale just `low`).
    """
    share = 100 // len(constraints)
    criteria = "; ".join(f"{c.criterion} ({share}%)" for c in constraints)
    lines = [_bare_verdict(met)] if shortcut else []
    for place, (text, row) in enumerate(() if shortcut else zip(shown, met, strict=True), 1):
        findings = "; ".join(
            f"{c.evidence(text)} {'yes' if ok else 'no'}" for c, ok in zip(constraints, row, strict=True)
        )
        lines.append(f"Response {place}: {findings}")
    scores = [high if all(row) else low + (sum(row) if high > 1 else 0) for row in met]
    box = ", ".join(map(str, scores))
    return f"Specific Criteria: {criteria}\nAnalysis:\n" + "\n".join(lines) + f"\nScores: \\boxed{{{box}}}"


def _bare_verdict(met: Sequence[Sequence[bool]]) -> str:
    if len(met) == 1:
        return f"Overall: {'right' if all(met[0]) else 'wrong'}"
    return f"Overall: Response {next(i for i, row in enumerate(met, 1) if all(row))} is best"


def _misjudge(row: Sequence[bool], rng: random.Random) -> list[bool]:
    """Findings that turn the verdict on one response over: a right one fails somewhere, a wrong one passes."""
    if not all(row):
        return [True] * len(row)
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
