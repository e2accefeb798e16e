"""Files in the shape of this project, scored by accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spct_ray.data.shapes import Cells, to_item
from spct_ray.data.validate import Limits
from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Scores, weighted_mean, without_none
from spct_ray.evaluation.judgements import Decision, Floats, Sheet, best_credit
from spct_ray.records import Item


def read(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{messages, responses, rewards, subset}: the shape of this project's own files, of any benchmark."""
    return [to_item(cells.row, "own", item_id, "", cells.where)]


def is_own(row: Mapping[str, Any]) -> bool:
    """Whether a row has this project's own shape, which every benchmark may be kept in."""
    return {"messages", "responses", "rewards"} <= set(row)


def accuracy(sheet: Sheet, decision: Decision, weight_I: Floats) -> Scores:
    """Share of items whose best response is chosen, ties broken at random."""
    return without_none({"score": weighted_mean(best_credit(sheet, decision.scores_IO), weight_I, weight_I > 0)})


BENCHMARK = Benchmark("own items", (), read, accuracy)
