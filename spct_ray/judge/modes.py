"""The ways to judge, by name (`JudgeConfig.mode`): what a prompt asks, how the reply is parsed into scores.

In every mode a judgement gives one integer score per response, so that votes, rewards and reports do not depend on the
mode. Modes that compare responses rate a single one in the prompt of "list".
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spct_ray.judge.parse import Reader, read_best, read_scores, read_verdict

ModeName = Literal["list", "single", "pairwise", "best", "reference", "principles", "query_principles", "no_principles"]


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to judge n >= 2 responses.

    Every `per_prompt` responses share a prompt (0: all do); a response's score is the sum over its prompts. `needs` is
    the field of an item that must not be empty. With `writes_principles` the judge first writes them from the query
    alone; with empty `criteria` it neither states nor is shown any. `task`, `how` and `answer` replace parts of the
    full prompt (None: as in "list"), `short` the first line of the compact one.
    """

    per_prompt: int = 0
    read: Reader = read_scores
    needs: Literal["", "reference", "principles"] = ""
    writes_principles: bool = False
    criteria: str = "further criteria that matter for this query, each with its weight"
    by: str = "by further criteria that are specific to the query and that you state first with their weights"
    task: str = "give {each} an overall score."
    how: str | None = None
    answer: str | None = None
    short: str | None = None

    def parts(self, order: Sequence[int]) -> list[tuple[int, ...]]:
        """The responses of each prompt, in the order in which they are shown."""
        return list(itertools.combinations(order, self.per_prompt or len(order)))

    @property
    def compares(self) -> bool:
        """Whether it needs at least two responses."""
        return self.read is not read_scores

    @property
    def rates_together(self) -> bool:
        """Whether all responses are in one prompt and each gets a score, so that many may be judged in chunks."""
        return not self.per_prompt and not self.compares

    @property
    def is_trainable(self) -> bool:
        """Whether a judgement is one prompt and one reply with scores, as RFT and GRPO require."""
        return self.rates_together and not self.writes_principles


_BY_GIVEN = "by the principles that are given for the query"
_GIVEN = "those of the given principles that matter here, each with its weight"

MODES: dict[ModeName, Mode] = {
    "list": Mode(),
    "single": Mode(per_prompt=1),
    "pairwise": Mode(
        per_prompt=2,
        read=read_verdict,
        task="say which of the two responses is better.",
        how="Before you decide, analyse step by step, as strictly as you can; their order does not count."
        "\nAnswer with v = 1 or v = 2 for the better response, or v = tie when neither is better.",
        answer="Verdict: \\boxed{v}",
        short="Name the better: 1, 2 or tie.",
    ),
    "best": Mode(
        read=read_best,
        task="find the best of the {num} responses.",
        how="Before you decide, analyse step by step, as strictly as you can.\nAnswer with the number j of a response.",
        answer="Best response: \\boxed{j}",
        short="Name the best: 1-{num}.",
    ),
    "reference": Mode(
        needs="reference",
        task="give {each} an overall score. The reference answer is correct: a response that contradicts it is wrong.",
    ),
    "principles": Mode(needs="principles", by=_BY_GIVEN, criteria=_GIVEN),
    "query_principles": Mode(writes_principles=True, by=_BY_GIVEN, criteria=_GIVEN),
    "no_principles": Mode(by="", criteria=""),
}
