"""RewardBench 2: best of four, and Ties from single ratings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Row, Scores, Scoring, mean_of
from spct_ray.records import Item


def read(row: Row) -> list[Item]:
    """{id, prompt, chosen: [...], rejected: [...], subset}: best of n, or for Ties every response rated by itself, as
    the authors rate them with generative judges. Ties ids are "ref:<n>" and "tied:<n>"."""
    chosen, rejected, prompt = row.texts("chosen"), row.texts("rejected"), row.prompt("prompt")
    if row.text("subset").lower() != "ties":
        return [row.item(prompt, chosen, rejected)]
    kind, colon, number = str(row.get("id")).partition(":")
    if kind not in ("ref", "tied") or not colon:
        raise row.error(f"'id' of a Ties row must be ref:<number> or tied:<number>, found {row.get('id')!r}")
    texts = [(text, True) for text in chosen] + [(text, False) for text in rejected]
    facts: dict[str, Any] = {"kind": kind, "prompt": number}
    return [
        row.item(prompt, [text] * right, [text] * (not right), part=str(i), single=True, **facts)
        for i, (text, right) in enumerate(texts)
    ]


SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")


def score(scoring: Scoring) -> Scores:
    """Unweighted mean of six subsets: best of 4 (1 / m where the right response is among m best), and Ties by `ties`.

    After allenai/reward-bench, rewardbench/utils.py (reroll_and_score_dataset) and the data set's card ("averages over
    these six subsets"); arXiv 2506.01937. An unreadable verdict counts 0.25 there (scripts/run_generative_v2.py)
    and nothing here.
    """
    credit_I = scoring.credit_I
    parts = {name: scoring.mean(credit_I, scoring.subset([name])) for name in SUBSETS[:-1]}
    return mean_of(parts | {"Ties": ties(scoring)})


def ties(scoring: Scoring) -> float | None:
    """RewardBench 2 Ties, from ratings of single responses.

    A prompt is accurate when its worst right response outscores its best wrong one; c is that gap, d the spread of the
    right ones. score = 0.3 accuracy of tied prompts + 0.3 of their references (one right answer)
    + 0.2 share of c_tied > d + 0.2 share of min(c_tied, c_ref) > d + 0.01 mean tanh(min(c_tied, c_ref) / d - 1),
    the last three over prompts with both, where 0 / 0 counts 0 in the last. After rewardbench/utils.py
    (_compute_prompt_stats, process_single_model). A prompt with an unrated response is inaccurate and has no gap; the
    authors let -1 stand for the missing rating, so that an unrated wrong response helps there.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for i, facts in enumerate(scoring.sheet.facts_I):
        if facts.get("kind") in ("ref", "tied"):
            groups.setdefault((facts["prompt"], facts["kind"]), []).append(i)
    stats = {key: (*_gaps(scoring, members), scoring.weight_I[members[0]]) for key, members in groups.items()}
    if not sum(weight for *_, weight in stats.values()):
        return None

    def share(rows: Sequence[tuple[float, float]]) -> float:  # (value, weight)
        total = sum(weight for _, weight in rows)
        return sum(value * weight for value, weight in rows) / total if total else 0.0

    accurate = {
        kind: share([(float(gap > 0), w) for (_, k), (gap, _, w) in stats.items() if k == kind])
        for kind in ("tied", "ref")
    }
    # The bootstrap draws questions; a prompt and its reference count together as often as the tied prompt was drawn.
    both = [(stats[p, "tied"], stats[p, "ref"]) for p, kind in stats if kind == "tied" and (p, "ref") in stats]
    rows = [(c, min(c, ref[0]), d, w) for (c, d, w), ref in both]
    preferred = share([(float(c > d), w) for c, _, d, w in rows])
    hard = share([(float(low > d), w) for _, low, d, w in rows])
    margin = share([(_tanh_ratio(low, d), w) for _, low, d, w in rows])
    return 0.3 * accurate["tied"] + 0.3 * accurate["ref"] + 0.2 * preferred + 0.2 * hard + 0.01 * margin


def _gaps(scoring: Scoring, members: Sequence[int]) -> tuple[float, float]:
    """(worst right - best wrong, best right - worst right) of one prompt's ratings; -inf and 0 with one missing."""
    rating, right = scoring.decision.scores_IO[members, 1], scoring.sheet.right_IO[members, 1]
    if np.isnan(rating).any() or right.all() or not right.any():
        return -np.inf, 0.0
    return float(rating[right].min() - rating[~right].max()), float(rating[right].max() - rating[right].min())


def _tanh_ratio(gap: float, spread: float) -> float:
    if spread == 0:
        return float(np.sign(gap))  # gap / 0 is infinite, its tanh 1 or -1; 0 / 0 counts 0
    return float(np.tanh(gap / spread - 1))


HUB = (("allenai/reward-bench-2", "test"),)
BENCHMARK = Benchmark("RewardBench 2", HUB, read, score, subsets=SUBSETS, strict=True)
