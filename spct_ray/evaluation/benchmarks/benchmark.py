"""A benchmark: where it is published, how its rows become Items, and how its authors score a judge.

Each module of this package defines one, as `BENCHMARK`; what several of them need is here. A scorer is a pure function
of arrays, `(sheet, decision, weight_I) -> {name: value in 0..1}`, with the headline under "score". `weight_I` counts
each item (ones, or the multiplicities of a bootstrap over questions). An item without a usable judgement is wrong,
except where the score is an area under a curve; such items are then excluded, and "rated" is the share that is
included. Parts without items are excluded from the means, never counted as 0.

One row may give several items: single ratings (RewardBench 2 Ties), pairs (PPE correctness), or pairs in place of a
list that is too long for one prompt. `Item.facts` (JSON) then says what belongs together: "question" is the row; other
keys are read by the benchmark's scorer alone. Rewards are 1 for right and 0 for wrong responses, the right ones first.
Axes: I items, O options (responses; for n = 1 "wrong" and "right", see `spct_ray.evaluation.judgements`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spct_ray.data.shapes import Cells, UnusableRow
from spct_ray.data.validate import Limits, Problem
from spct_ray.evaluation.judgements import Bools, Decision, Floats, Sheet, best_credit
from spct_ray.records import Item, Message

Reader = Callable[[Cells, str, Limits], list[Item]]  # (row, item id, limits) -> items; raises DataError, UnusableRow
Scores = dict[str, float]
Scorer = Callable[[Sheet, Decision, Floats], Scores]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark. `hub` is (id, split) pairs, empty where its authors publish files only.

    `several_right` allows more than one right response in an item; `subsets`, if given, are the only ones there are.
    """

    title: str
    hub: tuple[tuple[str, str], ...]
    read: Reader
    score: Scorer
    several_right: bool = False
    credit: Callable[[Sheet, Floats], Floats] = best_credit  # of one item, for paired tests and subset tables
    both_orders: bool = False  # the score needs a judgement of each order
    subsets: tuple[str, ...] = ()
    strict: bool = False  # a tie is wrong, so a judge who guesses is not one who gives equal scores


def make_item(
    cells: Cells,
    item_id: str,
    prompt: tuple[Message, ...],
    right: Sequence[str],
    wrong: Sequence[str],
    subset: str | None = None,
    **facts: Any,
) -> Item:
    if not right or not wrong:
        raise UnusableRow(Problem.NO_RESPONSES)
    return Item(
        id=item_id,
        messages=prompt,
        responses=(*right, *wrong),
        rewards=(*[1.0] * len(right), *[0.0] * len(wrong)),
        subset=subset_of(cells) if subset is None else subset,
        facts=json.dumps(facts) if facts else "",
    )


def subset_of(cells: Cells) -> str:
    """The subset of the row, else the folder of its file (LLMBar keeps its subsets so)."""
    if "subset" in cells.row:
        return cells.optional("subset")
    path = Path(cells.where.rpartition(":")[0])
    return path.parent.name if path.suffix else ""


def fits(prompt: Sequence[Message], responses: Sequence[str], limits: Limits) -> bool:
    lengths = [len(text) for text in responses]
    total = sum(len(m.content) for m in prompt) + sum(lengths)
    return len(responses) <= limits.max_responses and total <= limits.max_item_chars


def layout(items: Sequence[Item]) -> dict[str, int]:
    """How many items have n responses, e.g. {"n = 2": 500}."""
    return dict(sorted(Counter(f"n = {len(item.responses)}" for item in items).items()))


def weighted_mean(values_I: Floats, weight_I: Floats, where_I: Bools) -> float | None:
    total = float(weight_I[where_I].sum())
    return float((values_I * weight_I)[where_I].sum() / total) if total else None


def without_none(parts: dict[str, float | None]) -> Scores:
    return {name: value for name, value in parts.items() if value is not None}


def mean_of(parts: dict[str, float | None], **others: float | None) -> Scores:
    """ "score" as the mean of the parts that have items, the parts, and `others`."""
    return without_none({"score": average(parts), **parts, **others})


def average(parts: dict[str, float | None]) -> float | None:
    values = [value for value in parts.values() if value is not None]
    return sum(values) / len(values) if values else None


def in_subsets(sheet: Sheet, wanted: Callable[[str], bool]) -> Bools:
    """[I] whether the name of the item's subset is wanted."""
    return np.array([wanted(name) for name in sheet.names], dtype=bool)[sheet.subset_I]


def in_subset(sheet: Sheet, subset: str) -> Bools:
    return in_subsets(sheet, subset.__eq__)
