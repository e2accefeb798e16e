"""PPE human preference: pairs of the arena."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spct_ray.data.shapes import Cells, UnusableRow
from spct_ray.data.validate import Limits, Problem
from spct_ray.evaluation.benchmarks.benchmark import Benchmark, make_item
from spct_ray.evaluation.benchmarks.own import accuracy
from spct_ray.records import Item

_PPE_WINNERS: Mapping[Any, int] = {"model_a": 0, "model_b": 1, "response_1": 0, "response_2": 1}


def read(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{prompt, response_1, response_2, winner}; ties have no unique best and are dropped by that name."""
    winner = cells.get("winner")
    if isinstance(winner, str) and winner.startswith("tie"):
        raise UnusableRow(Problem.NO_UNIQUE_BEST)
    if winner not in _PPE_WINNERS:
        raise cells.error(f"'winner' must be model_a, model_b or a tie, found {winner!r}")
    answers = [cells.text("response_1"), cells.text("response_2")]
    right = _PPE_WINNERS[winner]
    return [make_item(cells, item_id, cells.prompt("prompt"), [answers[right]], [answers[1 - right]])]


BENCHMARK = Benchmark("PPE preference", (("lmarena-ai/PPE-Human-Preference-V1", "test"),), read, accuracy)
