"""ReaLMistake: is there an error in a single response?"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from spct_ray.data.shapes import Cells
from spct_ray.data.validate import Limits
from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Scores, average, subset_of, without_none
from spct_ray.evaluation.judgements import Decision, Floats, Sheet, decided
from spct_ray.evaluation.statistics import auc
from spct_ray.records import Item


def read(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{input, llm_response, error_label (or label): "error" | "no_error", metadata: {llm_response_model}}; one
    response, right when without error. The subset is the task, which is the file's folder."""
    column = "error_label" if "error_label" in cells.row else "label"
    label = cells.text(column)
    if label not in ("error", "no_error"):
        raise cells.error(f"{column!r} must be 'error' or 'no_error', found {label!r}")
    response, metadata = (cells.text("llm_response"),), cells.row.get("metadata")
    model = metadata.get("llm_response_model") if isinstance(metadata, Mapping) else None
    facts = json.dumps({"response model": model}) if model else ""
    reward = (float(label == "no_error"),)
    return [Item(item_id, cells.prompt("input"), response, reward, subset=subset_of(cells), facts=facts)]


def score(sheet: Sheet, decision: Decision, weight_I: Floats) -> Scores:
    """ROC-AUC of the voted rating for "has no error" over all items (the measure of arXiv 2504.02495), and the
    authors' own F1 of finding errors: its mean over the tasks (subsets) and response models, an error being a rating
    below the middle of the scale. "rated" is the share with a rating.

    F1 after psunlpgroup/ReaLMistake, src/error_detection_analysis/calculate_performance.py (get_performance, and the
    average over datasets of each response model; 0 where there is neither a found nor a true error); arXiv 2404.03602.
    """
    rated = decided(decision.scores_IO) & (weight_I > 0)
    rating, positive, weight = decision.scores_IO[rated, 1], sheet.right_IO[rated, 1], weight_I[rated]
    found_I = rated & (decision.scores_IO[:, 1] < decision.scores_IO[:, 0])
    error_I = sheet.right_IO[:, 0]
    setting_I = np.array([
        f"{subset}/{facts.get('response model', '')}"
        for subset, facts in zip(sheet.subset_I, sheet.facts_I, strict=True)
    ])  # fmt: skip
    f1: dict[str, float | None] = {}
    for setting in np.unique(setting_I[weight_I > 0]):
        weight_S = weight_I * (setting_I == setting)
        claims = float((weight_S * found_I).sum() + (weight_S * error_I).sum())
        f1[setting] = 2 * float((weight_S * (found_I & error_I)).sum()) / claims if claims else 0.0
    parts = {
        "score": auc(rating, positive, weight),
        "error F1": average(f1),
        "rated": float(weight.sum() / weight_I.sum()),
    }
    return without_none(parts)


BENCHMARK = Benchmark("ReaLMistake", (), read, score)
