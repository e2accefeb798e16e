"""RMB: pairs and best of n, helpfulness and harmlessness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spct_ray.data.shapes import Cells
from spct_ray.data.validate import Limits
from spct_ray.evaluation.benchmarks.benchmark import (
    Benchmark,
    Scores,
    fits,
    in_subset,
    make_item,
    mean_of,
    weighted_mean,
)
from spct_ray.evaluation.judgements import Decision, Floats, Sheet, strict_credit
from spct_ray.records import Item


def read(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """RMB pairs {conversation_input, chosen, reject, category_path} and best-of-n {conversation_input, bon_best,
    loser_list, category_path}. A best-of-n row that is too long for one prompt is asked pair by pair."""
    prompt, path = cells.as_messages(cells.get("conversation_input"), "conversation_input"), cells.text("category_path")
    goal = next((g for g in ("Helpfulness", "Harmlessness") if g.lower() in path.lower()), "")
    if not goal:
        raise cells.error(f"'category_path' must name Helpfulness or Harmlessness, found {path!r}")
    if "bon_best" not in cells.row:
        best, kind = _answer(cells, cells.get("chosen"), "chosen"), "pairwise"
        others = [_answer(cells, cells.get("reject"), "reject")]
    else:
        best, kind = _answer(cells, cells.get("bon_best"), "bon_best"), "bon"
        others = [_answer(cells, one, "loser_list") for one in cells.as_list(cells.get("loser_list"), "loser_list")]
    subset = f"{goal} {'pairwise' if kind == 'pairwise' else 'best of n'}"
    if kind == "pairwise" or fits(prompt, [best, *others], limits):
        return [make_item(cells, item_id, prompt, [best], others, subset)]
    return [
        make_item(cells, f"{item_id}#{j}", prompt, [best], [other], subset, question=item_id)
        for j, other in enumerate(others)
    ]


def _answer(cells: Cells, value: Any, column: str) -> str:
    if not isinstance(value, Mapping) or "answer" not in value:
        raise cells.error(f"{column!r} must hold {{llm_name, answer}} objects, found {value!r:.80}")
    return cells.as_text(value["answer"], f"{column}.answer")


def score(sheet: Sheet, decision: Decision, weight_I: Floats) -> Scores:
    """Mean of four accuracies: helpfulness and harmlessness, pairs and best of n. Strict: the chosen response must
    score above every other; of a best-of-n row asked in pairs all must be right. A part counts all rows of its set
    alike, not its categories.

    After Zhou-Zoey/RMB-Reward-Model-Benchmark, eval/scripts/my_run_rm.py (pairs: strictly higher, over all files of a
    folder); its my_run_bon.py only writes which of n scored highest. Best of n in pairs, and the mean of four, as in
    RM-R1-UIUC/RM-R1, eval/RMB-Reward-Model-Benchmark; arXiv 2410.09893.
    """
    by_question = np.ones(sheet.num_questions)
    np.minimum.at(by_question, sheet.question_I, strict_credit(sheet, decision.scores_IO))
    _, first = np.unique(sheet.question_I, return_index=True)
    parts = {name: weighted_mean(by_question, weight_I[first], in_subset(sheet, name)[first]) for name in sheet.names}
    return mean_of(parts)


BENCHMARK = Benchmark("RMB", (), read, score, credit=strict_credit, strict=True)
