"""LLMBar: instruction following, natural and adversarial pairs."""

from __future__ import annotations

import re

from spct_ray.data.shapes import Cells
from spct_ray.data.validate import Limits
from spct_ray.evaluation.benchmarks.benchmark import (
    Benchmark,
    Scores,
    average,
    in_subsets,
    make_item,
    mean_of,
    weighted_mean,
)
from spct_ray.evaluation.judgements import Decision, Floats, Sheet, best_credit
from spct_ray.records import Item


def read(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{input, output_1, output_2, label: 1 | 2}; the subset is the file's folder where there is no column."""
    label = cells.get("label")
    if label not in (1, 2):
        raise cells.error(f"'label' must be 1 or 2, found {label!r}")
    answers = [cells.text("output_1"), cells.text("output_2")]
    return [make_item(cells, item_id, cells.prompt("input"), [answers[label - 1]], [answers[2 - label]])]


LLMBAR_ADVERSARIAL = ("Neighbor", "GPTInst", "GPTOut", "Manual")


def score(sheet: Sheet, decision: Decision, weight_I: Floats) -> Scores:
    """Mean of Natural and the four adversarial subsets, "adversarial" of these four; ties broken at random. The case
    studies that come with the data are measured apart and are in neither mean.

    After princeton-nlp/LLMBar, LLMEvaluator/evaluate.py: an item is the mean over both orders, so that equal ratings
    count half, and a missing verdict is wrong. arXiv 2310.07641.
    """
    credit_I = best_credit(sheet, decision.scores_IO)
    ends = {name: re.split(r"[/-]", name)[-1].lower() for name in sheet.names if not name.startswith("CaseStudy")}
    study = in_subsets(sheet, lambda name: name not in ends)
    parts: dict[str, float | None] = {}
    for part in ("Natural", *LLMBAR_ADVERSARIAL):
        chosen = {name for name, end in ends.items() if end == part.lower()}
        parts[part] = weighted_mean(credit_I, weight_I, in_subsets(sheet, chosen.__contains__))
    hard = average({name: parts[name] for name in LLMBAR_ADVERSARIAL})
    return mean_of(parts, adversarial=hard, CaseStudy=weighted_mean(credit_I, weight_I, study))


BENCHMARK = Benchmark("LLMBar", (), read, score)
