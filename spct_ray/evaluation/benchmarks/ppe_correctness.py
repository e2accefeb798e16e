"""PPE correctness: best of k on verifiable tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spct_ray.data.shapes import Cells, UnusableRow
from spct_ray.data.validate import Limits, Problem
from spct_ray.evaluation.benchmarks.benchmark import (
    Benchmark,
    Scores,
    fits,
    in_subset,
    make_item,
    mean_of,
    weighted_mean,
)
from spct_ray.evaluation.judgements import Decision, Floats, Sheet, best_credit
from spct_ray.records import Item

_MAX_PAIRS = 5  # of right and wrong answers of one prompt, where the file names none (as many as PPE samples)


def read(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{prompt, response_1 .. response_k, scores: [right?, ...], sampled_conflict_pairs}: a pair for each conflict, and
    for best of k all responses in one prompt where they fit. Prompts that are always or never answered right have no
    conflict and are dropped."""
    right = [bool(value) for value in cells.as_list(cells.get("scores"), "scores")]
    answers = [cells.text(f"response_{i + 1}") for i in range(len(right))]
    prompt, name = cells.prompt("prompt"), cells.where.rpartition(":")[0].partition("[")[0]
    subset = cells.optional("subset") or Path(name).name.partition(".")[0]
    if not any(right) or all(right):
        raise UnusableRow(Problem.NO_UNIQUE_BEST)
    conflicts = cells.row.get("sampled_conflict_pairs")
    if conflicts is None:
        conflicts = [(i, j) for i, r in enumerate(right) for j, s in enumerate(right) if r and not s][:_MAX_PAIRS]
    items = []
    for number, pair in enumerate(cells.as_list(conflicts, "sampled_conflict_pairs")):
        if len(pair) != 2 or not all(0 <= i < len(right) for i in pair) or right[pair[0]] == right[pair[1]]:
            raise cells.error(f"'sampled_conflict_pairs' must pair a right and a wrong response, found {pair!r}")
        good, bad = sorted(pair, key=lambda i: not right[i])
        facts = {"question": item_id, "kind": "pair"}
        items.append(make_item(cells, f"{item_id}#{number}", prompt, [answers[good]], [answers[bad]], subset, **facts))
    if fits(prompt, answers, limits) and len(set(map(str.strip, answers))) == len(answers):
        rights, wrongs = ([a for a, r in zip(answers, right, strict=True) if r == flag] for flag in (True, False))
        items.append(
            make_item(cells, f"{item_id}#all", prompt, rights, wrongs, subset, question=item_id, kind="best of k")
        )
    return items


def score(sheet: Sheet, decision: Decision, weight_I: Floats) -> Scores:
    """Mean over the benchmarks of accuracy on pairs of a right and a wrong answer; "best of k" is the share of prompts
    whose top-scored answer is right, over the prompts whose answers fitted into one prompt.

    Data: lmarena-ai/PPE-*-Best-of-K on the hub, whose rows name the conflicts to compare; arXiv 2410.14872.
    """
    credit_I = best_credit(sheet, decision.scores_IO)
    whole_I = np.array([facts.get("kind") == "best of k" for facts in sheet.facts_I])
    parts = {n or "pairs": weighted_mean(credit_I, weight_I, in_subset(sheet, n) & ~whole_I) for n in sheet.names}
    return mean_of(parts, **{"best of k": weighted_mean(credit_I, weight_I, whole_I)})


BENCHMARK = Benchmark(
    "PPE correctness",
    tuple(
        (f"lmarena-ai/PPE-{name}-Best-of-K", "train") for name in ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")
    ),
    read,
    score,
    several_right=True,
)
