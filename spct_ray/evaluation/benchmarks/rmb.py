"""RMB: pairs and best of n, helpfulness and harmlessness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Row, Scores, Scoring, mean_of
from spct_ray.evaluation.judgements import strict_credit
from spct_ray.records import Item


def read(row: Row) -> list[Item]:
    """RMB pairs {conversation_input, chosen, reject, category_path} and best-of-n {conversation_input, bon_best,
    loser_list, category_path}. A best-of-n row that is too long for one prompt is asked pair by pair."""
    prompt, path = row.as_messages(row.get("conversation_input"), "conversation_input"), row.text("category_path")
    goal = next((g for g in ("Helpfulness", "Harmlessness") if g.lower() in path.lower()), "")
    if not goal:
        raise row.error(f"'category_path' must name Helpfulness or Harmlessness, found {path!r}")
    if "bon_best" not in row.row:
        right, wrong = ([_answer(row, row.get(column), column)] for column in ("chosen", "reject"))
        return [row.item(prompt, right, wrong, f"{goal} pairwise")]
    right, losers = [_answer(row, row.get("bon_best"), "bon_best")], row.as_list(row.get("loser_list"), "loser_list")
    wrong, subset = [_answer(row, one, "loser_list") for one in losers], f"{goal} best of n"
    if row.fits(prompt, [*right, *wrong], distinct=False):
        return [row.item(prompt, right, wrong, subset)]
    return [row.item(prompt, right, [other], subset, str(j)) for j, other in enumerate(wrong)]


def _answer(row: Row, value: Any, column: str) -> str:
    if not isinstance(value, Mapping) or "answer" not in value:
        raise row.error(f"{column!r} must hold {{llm_name, answer}} objects, found {value!r:.80}")
    return row.as_text(value["answer"], f"{column}.answer")


def score(scoring: Scoring) -> Scores:
    """Mean of four accuracies: helpfulness and harmlessness, pairs and best of n. Strict: the chosen response must
    score above every other; of a best-of-n row asked in pairs all must be right. A part counts all rows of its set
    alike, not its categories.

    After Zhou-Zoey/RMB-Reward-Model-Benchmark, eval/scripts/my_run_rm.py (pairs: strictly higher, over all files of a
    folder); its my_run_bon.py only writes which of n scored highest. Best of n in pairs, and the mean of four, as in
    RM-R1-UIUC/RM-R1, eval/RMB-Reward-Model-Benchmark; arXiv 2410.09893.
    """
    question_I, first_I = scoring.sheet.question_I, np.zeros(len(scoring.weight_I), dtype=bool)
    first_I[np.unique(question_I, return_index=True)[1]] = True  # a row counts once
    right_Q = np.ones(scoring.sheet.num_questions)
    np.minimum.at(right_Q, question_I, strict_credit(scoring.sheet, scoring.decision.scores_IO))
    names = scoring.sheet.names
    return mean_of({name: scoring.mean(right_Q[question_I], scoring.subset([name]) & first_I) for name in names})


BENCHMARK = Benchmark("RMB", (), read, score, credit=strict_credit, strict=True)
