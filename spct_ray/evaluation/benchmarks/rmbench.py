"""RM-Bench: three right and three wrong responses that differ in style."""

from __future__ import annotations

import numpy as np

from spct_ray.data.shapes import Cells
from spct_ray.data.validate import Limits
from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Scores, fits, make_item
from spct_ray.evaluation.judgements import Decision, Floats, Sheet
from spct_ray.records import Item

RM_BENCH_STYLES = ("concise", "detailed plain text", "detailed markdown")


def read(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{prompt, chosen: [3], rejected: [3], domain or subset}, styles in the order of RM_BENCH_STYLES. All six go into
    one prompt, or as 3 x 3 pairs where that is too long."""
    chosen, rejected = cells.texts("chosen"), cells.texts("rejected")
    for column, texts in (("chosen", chosen), ("rejected", rejected)):
        if len(texts) != len(RM_BENCH_STYLES):
            raise cells.error(f"{column!r} must hold 3 responses ({', '.join(RM_BENCH_STYLES)}), found {len(texts)}")
    prompt = cells.prompt("prompt")
    domain = cells.optional("domain") or cells.text("subset")
    six = [*chosen, *rejected]
    if fits(prompt, six, limits) and len(set(map(str.strip, six))) == len(six):
        return [make_item(cells, item_id, prompt, chosen, rejected, subset=domain)]
    return [
        make_item(cells, f"{item_id}#{i}{j}", prompt, [chosen[i]], [rejected[j]], domain, question=item_id, cell=[i, j])
        for i in range(3)
        for j in range(3)
    ]


RM_BENCH_DOMAINS = {"chat": (), "math": (), "code": (), "safety": ("refuse", "response")}  # ends of short names


def score(sheet: Sheet, decision: Decision, weight_I: Floats) -> Scores:
    """Over the 3 x 3 pairs of a right (row) and a wrong response (column) by style, strictly higher scores only: hard
    is the mean above the diagonal, normal on it, easy below. A domain is the mean of its cells over all of its items,
    safety-refuse and safety-response together; hard, normal, easy and "score" are means over the four domains.

    After THU-KEG/RM-Bench, README ("how to compute the accuracy") and scripts/utils.py (compute_accuracy,
    split_dataset_by_domain: a domain is what its name begins with); arXiv 2410.16184.
    """
    win_I33 = _cell_wins(sheet, decision.scores_IO)
    domains: dict[str, Floats] = {}
    for domain, ends in RM_BENCH_DOMAINS.items():
        inside = np.array([n.lower().startswith(domain) or n.lower().endswith(ends) for n in sheet.names])[
            sheet.subset_I
        ]
        inside_I33 = inside[:, None, None] & ~np.isnan(win_I33)
        total_33 = (inside_I33 * weight_I[:, None, None]).sum(axis=0)
        if total_33.all():
            domains[domain] = (np.where(inside_I33, win_I33, 0) * weight_I[:, None, None]).sum(axis=0) / total_33
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


BENCHMARK = Benchmark(
    "RM-Bench", (("THU-KEG/RM-Bench", "train"),), read, score, several_right=True, credit=cell_credit, strict=True
)
