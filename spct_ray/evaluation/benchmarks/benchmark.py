"""A benchmark: where it is published, how its rows become Items, and how its authors score a judge.

Each module of this package defines one, as `BENCHMARK`; what several of them need is here. A reader maps a `Row` to
Items, a scorer a `Scoring` to {name: value in 0..1} with the headline under "score". An item without a usable judgement
is wrong, except where the score is an area under a curve; such items are then excluded, and "rated" is the share that
is included. Parts without items are excluded from the means, never counted as 0.

One row may give several items: single ratings (RewardBench 2 Ties), pairs (PPE correctness), or pairs in place of a
list that is too long for one prompt. `Item.facts` (JSON) then says what belongs together: "question" is the row; other
keys are read by the benchmark's scorer alone. Rewards are 1 for right and 0 for wrong responses, the right ones first.
Axes: I items, O options (responses; for n = 1 "wrong" and "right", see `spct_ray.evaluation.judgements`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spct_ray.data.shapes import Cells, UnusableRow
from spct_ray.data.validate import Limits, Problem
from spct_ray.evaluation.judgements import Bools, Decision, Floats, Sheet, best_credit
from spct_ray.records import Item, Message

Scores = dict[str, float]
Prompt = tuple[Message, ...]


class Row(Cells):
    """One row of a benchmark, the id of the Item that it becomes, and the limits of an item.

    Readers raise DataError (`error`) for a malformed row and UnusableRow for one that makes no item.
    """

    def __init__(self, cells: Cells, item_id: str, limits: Limits) -> None:
        super().__init__(cells.row, cells.shape, cells.where)
        self.item_id, self.limits = item_id, limits

    @property
    def subset(self) -> str:
        """The column "subset", else the folder of the file."""
        if "subset" in self.row:
            return self.optional("subset")
        path = Path(self.where.rpartition(":")[0])
        return path.parent.name if path.suffix else ""

    def item(
        self,
        prompt: Prompt,
        right: Sequence[str],
        wrong: Sequence[str],
        /,
        subset: str | None = None,
        part: str = "",
        single: bool = False,
        **facts: Any,
    ) -> Item:
        """The Item of right and wrong responses, or of a `single` one; `part` tells several Items of a row apart."""
        if not single and not (right and wrong):
            raise UnusableRow(Problem.NO_RESPONSES)
        if part:
            facts = {"question": self.item_id, **facts}
        return Item(
            id=f"{self.item_id}#{part}" if part else self.item_id,
            messages=prompt,
            responses=(*right, *wrong),
            rewards=(*[1.0] * len(right), *[0.0] * len(wrong)),
            subset=self.subset if subset is None else subset,
            facts=json.dumps(facts) if facts else "",
        )

    def fits(self, prompt: Prompt, responses: Sequence[str], distinct: bool = True) -> bool:
        """Whether the responses can be judged in one prompt: they are not too many, too long or, `distinct`, equal."""
        total = sum(len(m.content) for m in prompt) + sum(map(len, responses))
        alike = distinct and len(set(map(str.strip, responses))) < len(responses)
        return len(responses) <= self.limits.max_responses and total <= self.limits.max_item_chars and not alike


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a scorer is given: the items, what was decided, and how often each item counts (ones, or the multiplicities
    of a bootstrap over questions)."""

    sheet: Sheet
    decision: Decision
    weight_I: Floats

    @property
    def credit_I(self) -> Floats:
        """[I] probability that a right response is chosen when ties are broken at random."""
        return best_credit(self.sheet, self.decision.scores_IO)

    def mean(self, values_I: Floats, where_I: Bools | None = None) -> float | None:
        """The weighted mean over the items `where_I`; None where they weigh nothing."""
        inside_I = self.weight_I > 0 if where_I is None else where_I
        total = float(self.weight_I[inside_I].sum())
        return float((values_I * self.weight_I)[inside_I].sum() / total) if total else None

    def subset(self, names: Collection[str]) -> Bools:
        """[I] whether the item is of one of these subsets."""
        return np.array([name in names for name in self.sheet.names], dtype=bool)[self.sheet.subset_I]

    def fact(self, name: str) -> np.ndarray[Any, Any]:
        """[I] one fact of each item, "" where it has none."""
        return np.array([facts.get(name, "") for facts in self.sheet.facts_I])


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark. `hub` is (id, split) pairs, empty where its authors publish files only.

    `several_right` allows more than one right response in an item; `subsets`, if given, are the only ones there are.
    """

    title: str
    hub: tuple[tuple[str, str], ...]
    read: Callable[[Row], list[Item]]
    score: Callable[[Scoring], Scores]
    several_right: bool = False
    credit: Callable[[Sheet, Floats], Floats] = best_credit  # of one item, for paired tests and subset tables
    both_orders: bool = False  # the score needs a judgement of each order
    subsets: tuple[str, ...] = ()
    strict: bool = False  # a tie is wrong, so a judge who guesses is not one who gives equal scores


def pair_reader(
    prompt: str,
    responses: tuple[str, str],
    label: str,
    right: Mapping[Any, int | None],
    subset: str = "",
    fact: str = "",
) -> Callable[[Row], list[Item]]:
    """Reads one pair per row from columns: its prompt, its two responses, the label that says which of them is `right`
    (None: neither), its subset if that has another name, and a fact."""

    def read(row: Row) -> list[Item]:
        value = row.get(label)
        if value not in right:
            raise row.error(f"{label!r} must be one of {', '.join(map(repr, right))}, found {value!r}")
        place = right[value]
        if place is None:
            raise UnusableRow(Problem.NO_UNIQUE_BEST)
        answers = [row.text(column) for column in responses]
        facts: dict[str, Any] = {fact.replace("_", " "): row.optional(fact)} if fact and row.optional(fact) else {}
        of = row.optional(subset) if subset else None
        return [row.item(row.prompt(prompt), [answers[place]], [answers[1 - place]], of, **facts)]

    return read


def accuracy(scoring: Scoring) -> Scores:
    """Share of items whose best response is chosen, ties broken at random."""
    return without_none({"score": scoring.mean(scoring.credit_I)})


def mean_of(parts: Mapping[str, float | None], **others: float | None) -> Scores:
    """ "score" as the mean of the parts that have items, the parts, and `others`."""
    return without_none({"score": average(parts), **parts, **others})


def average(parts: Mapping[str, float | None]) -> float | None:
    """The mean of the parts that have a value."""
    values = list(without_none(parts).values())
    return sum(values) / len(values) if values else None


def without_none(parts: Mapping[str, float | None]) -> Scores:
    """The parts that have a value."""
    return {name: value for name, value in parts.items() if value is not None}
