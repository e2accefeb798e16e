"""ReaLMistake: is there an error in a single response?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Row, Scores, Scoring, average, without_none
from spct_ray.evaluation.judgements import decided
from spct_ray.evaluation.statistics import auc
from spct_ray.records import Item


def read(row: Row) -> list[Item]:
    """{input, llm_response, error_label (or label): "error" | "no_error", metadata: {llm_response_model}}; one
    response, right when without error. The subset is the task, which is the file's folder."""
    column = "error_label" if "error_label" in row.row else "label"
    label, metadata = row.text(column), row.row.get("metadata")
    if label not in ("error", "no_error"):
        raise row.error(f"{column!r} must be 'error' or 'no_error', found {label!r}")
    model = metadata.get("llm_response_model") if isinstance(metadata, Mapping) else None
    right, response = label == "no_error", [row.text("llm_response")]
    facts = {"response model": model} if model else {}
    return [row.item(row.prompt("input"), response * right, response * (not right), single=True, **facts)]


def score(scoring: Scoring) -> Scores:
    """ROC-AUC of the voted rating for "has no error" over all items (the measure of arXiv 2504.02495), and the
    authors' own F1 of finding errors: its mean over the tasks (subsets) and response models, an error being a rating
    below the middle of the scale. "rated" is the share with a rating.

    F1 after psunlpgroup/ReaLMistake, src/error_detection_analysis/calculate_performance.py (get_performance, and the
    average over datasets of each response model; 0 where there is neither a found nor a true error); arXiv 2404.03602.
    """
    scores_IO, weight_I, error_I = scoring.decision.scores_IO, scoring.weight_I, scoring.sheet.right_IO[:, 0]
    rated_I = decided(scores_IO) & (weight_I > 0)
    claimed_I = rated_I & (scores_IO[:, 1] < scores_IO[:, 0])
    tasks_and_models = zip(scoring.sheet.subset_I, scoring.fact("response model"), strict=True)
    setting_I = np.array([f"{task}/{model}" for task, model in tasks_and_models])
    f1: dict[str, float | None] = {}
    for setting in np.unique(setting_I[weight_I > 0]):
        weight_S = weight_I * (setting_I == setting)
        claims = float((weight_S * claimed_I).sum() + (weight_S * error_I).sum())
        f1[setting] = 2 * float((weight_S * (claimed_I & error_I)).sum()) / claims if claims else 0.0
    area = auc(scores_IO[rated_I, 1], scoring.sheet.right_IO[rated_I, 1], weight_I[rated_I])
    rated = float(weight_I[rated_I].sum() / weight_I.sum())
    return without_none({"score": area, "error F1": average(f1), "rated": rated})


BENCHMARK = Benchmark("ReaLMistake", (), read, score)
