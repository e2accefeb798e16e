"""RM-Bench: three right and three wrong responses that differ in style."""

from __future__ import annotations

import numpy as np

from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Row, Scores, Scoring
from spct_ray.evaluation.judgements import Floats, Sheet
from spct_ray.records import Item

STYLES = ("concise", "detailed plain text", "detailed markdown")
DOMAINS = {"chat": (), "math": (), "code": (), "safety": ("refuse", "response")}  # ends of short names


def read(row: Row) -> list[Item]:
    """{prompt, chosen: [3], rejected: [3], domain or subset}, styles in the order of STYLES. All six go into one
    prompt, or as 3 x 3 pairs where that is too long."""
    chosen, rejected = row.texts("chosen"), row.texts("rejected")
    for column, texts in (("chosen", chosen), ("rejected", rejected)):
        if len(texts) != len(STYLES):
            raise row.error(f"{column!r} must hold 3 responses ({', '.join(STYLES)}), found {len(texts)}")
    prompt, domain = row.prompt("prompt"), row.optional("domain") or row.text("subset")
    if row.fits(prompt, [*chosen, *rejected]):
        return [row.item(prompt, chosen, rejected, domain)]
    return [
        row.item(prompt, [chosen[i]], [rejected[j]], domain, f"{i}{j}", cell=[i, j]) for i in range(3) for j in range(3)
    ]


def score(scoring: Scoring) -> Scores:
    """Over the 3 x 3 pairs of a right (row) and a wrong response (column) by style, strictly higher scores only: hard
    is the mean above the diagonal, normal on it, easy below. A domain is the mean of its cells over all of its items,
    safety-refuse and safety-response together; hard, normal, easy and "score" are means over the four domains.

    After THU-KEG/RM-Bench, README ("how to compute the accuracy") and scripts/utils.py (compute_accuracy,
    split_dataset_by_domain: a domain is what its name begins with); arXiv 2410.16184.
    """
    win_I33 = _cell_wins(scoring.sheet, scoring.decision.scores_IO)
    weight_I11 = scoring.weight_I[:, None, None]
    domains: dict[str, Floats] = {}
    for domain, ends in DOMAINS.items():
        names = {n for n in scoring.sheet.names if n.lower().startswith(domain) or n.lower().endswith(ends)}
        inside_I33 = scoring.subset(names)[:, None, None] & ~np.isnan(win_I33)
        total_33 = (inside_I33 * weight_I11).sum(axis=0)
        if total_33.all():
            domains[domain] = (np.where(inside_I33, win_I33, 0) * weight_I11).sum(axis=0) / total_33
    if not domains:
        return {}
    mean_33 = np.mean(list(domains.values()), axis=0)
    upper, lower = np.triu_indices(3, 1), np.tril_indices(3, -1)
    parts = {"hard": mean_33[upper].mean(), "normal": np.diag(mean_33).mean(), "easy": mean_33[lower].mean()}
    return {"score": float(mean_33.mean())} | {
        name: float(value) for name, value in (parts | {d: c.mean() for d, c in domains.items()}).items()
    }


def cell_credit(sheet: Sheet, scores_IO: Floats) -> Floats:
    """[I] share of RM-Bench's pairs that are right (nine of a list, one of a pair)."""
    win_I33 = _cell_wins(sheet, scores_IO).reshape(len(scores_IO), 9)
    pair_I9 = ~np.isnan(win_I33)
    return np.asarray(np.where(pair_I9, win_I33, 0).sum(axis=1) / pair_I9.sum(axis=1))


def _cell_wins(sheet: Sheet, scores_IO: Floats) -> Floats:
    """[I, 3, 3] whether the right response of style i beats the wrong one of style j; NaN where the item is another
    cell's pair."""
    win_I33 = np.full((len(scores_IO), 3, 3), np.nan)
    for i, facts in enumerate(sheet.facts_I):
        if "cell" in facts:
            win_I33[(i, *facts["cell"])] = scores_IO[i, 0] > scores_IO[i, 1]
        else:
            win_I33[i] = scores_IO[i, :3, None] > scores_IO[i, None, 3:6]
    return win_I33


HUB = (("THU-KEG/RM-Bench", "train"),)
BENCHMARK = Benchmark("RM-Bench", HUB, read, score, several_right=True, credit=cell_credit, strict=True)
