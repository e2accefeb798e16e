"""PPE correctness: best of k on verifiable tasks."""

from __future__ import annotations

from pathlib import Path

from spct_ray.data.shapes import UnusableRow
from spct_ray.data.validate import Problem
from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Row, Scores, Scoring, mean_of
from spct_ray.records import Item

_MAX_PAIRS = 5  # of right and wrong answers of one prompt, where the file names none (as many as PPE samples)
HUB = tuple(
    (f"lmarena-ai/PPE-{name}-Best-of-K", "train") for name in ("MMLU-Pro", "MATH", "GPQA", "IFEval", "MBPP-Plus")
)


def read(row: Row) -> list[Item]:
    """{prompt, response_1 .. response_k, scores: [right?, ...], sampled_conflict_pairs}: a pair for each conflict, and
    for best of k all responses in one prompt where they fit. Prompts that are always or never answered right have no
    conflict and are dropped."""
    right = [bool(value) for value in row.as_list(row.get("scores"), "scores")]
    answers = [row.text(f"response_{i + 1}") for i in range(len(right))]
    prompt, file = row.prompt("prompt"), row.where.rpartition(":")[0].partition("[")[0]
    subset = row.optional("subset") or Path(file).name.partition(".")[0]
    if not any(right) or all(right):
        raise UnusableRow(Problem.NO_UNIQUE_BEST)
    conflicts = row.row.get("sampled_conflict_pairs")
    if conflicts is None:
        conflicts = [(i, j) for i, r in enumerate(right) for j, s in enumerate(right) if r and not s][:_MAX_PAIRS]
    items = []
    for number, pair in enumerate(row.as_list(conflicts, "sampled_conflict_pairs")):
        if len(pair) != 2 or not all(0 <= i < len(right) for i in pair) or right[pair[0]] == right[pair[1]]:
            raise row.error(f"'sampled_conflict_pairs' must pair a right and a wrong response, found {pair!r}")
        good, bad = sorted(pair, key=lambda i: not right[i])
        items.append(row.item(prompt, [answers[good]], [answers[bad]], subset, str(number), kind="pair"))
    if row.fits(prompt, answers):
        rights, wrongs = ([a for a, r in zip(answers, right, strict=True) if r == flag] for flag in (True, False))
        items.append(row.item(prompt, rights, wrongs, subset, "all", kind="best of k"))
    return items


def score(scoring: Scoring) -> Scores:
    """Mean over the benchmarks of accuracy on pairs of a right and a wrong answer; "best of k" is the share of prompts
    whose top-scored answer is right, over the prompts whose answers fitted into one prompt.

    Data: lmarena-ai/PPE-*-Best-of-K on the hub, whose rows name the conflicts to compare; arXiv 2410.14872.
    """
    credit_I, whole_I = scoring.credit_I, scoring.fact("kind") == "best of k"
    parts = {n or "pairs": scoring.mean(credit_I, scoring.subset([n]) & ~whole_I) for n in scoring.sheet.names}
    return mean_of(parts, **{"best of k": scoring.mean(credit_I, whole_I)})


BENCHMARK = Benchmark("PPE correctness", HUB, read, score, several_right=True)
