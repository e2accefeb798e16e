"""JudgeBench: pairs judged in both orders."""

from __future__ import annotations

import numpy as np

from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Scores, Scoring, pair_reader, without_none
from spct_ray.evaluation.judgements import decided, verdicts

GROUPS = {  # by the beginning of the source
    "knowledge": "mmlu-pro",
    "reasoning": "livebench-reasoning",
    "math": "livebench-math",
    "coding": "livecodebench",
}


def score(scoring: Scoring) -> Scores:
    """Accuracy over pairs judged in both orders: a right verdict counts +1, a wrong one -1, a tie or none 0, and the
    pair is right when the sum is positive. "both_right" asks for two right verdicts, "inconsistent" is the share of
    pairs whose two verdicts differ, a tie and none being two. The verdict of an order is the vote of the judgements
    that saw it. Published tables are of the pairs of one response model: these stand under the model's name.

    After ScalerLab/JudgeBench, utils/metrics.py (compute_final_metrics) and run_judge.py (groups by the beginning of
    the source); arXiv 2410.12784.
    """
    sheet, decision = scoring.sheet, scoring.decision
    forward_I, backward_I = verdicts(sheet, decision.forward_IO), verdicts(sheet, decision.backward_IO)
    right_I = np.asarray(forward_I + backward_I > 0, dtype=np.float64)
    both_I = np.asarray((forward_I > 0) & (backward_I > 0), dtype=np.float64)
    answered_I = decided(decision.forward_IO) == decided(decision.backward_IO)
    differ_I = np.asarray((forward_I != backward_I) | ~answered_I, dtype=np.float64)
    groups = {group: {name for name in sheet.names if name.startswith(start)} for group, start in GROUPS.items()}
    model_I = scoring.fact("response model")
    return without_none({
        "score": scoring.mean(right_I),
        **{group: scoring.mean(right_I, scoring.subset(names)) for group, names in groups.items()},
        "both_right": scoring.mean(both_I),
        "inconsistent": scoring.mean(differ_I),
        **{str(name): scoring.mean(right_I, model_I == name) for name in sorted(set(model_I)) if name},
    })  # fmt: skip


HUB = (("ScalerLab/JudgeBench", "gpt"), ("ScalerLab/JudgeBench", "claude"))
LABELS = {"A>B": 0, "B>A": 1}
read = pair_reader("question", ("response_A", "response_B"), "label", LABELS, "source", "response_model")
BENCHMARK = Benchmark("JudgeBench", HUB, read, score, both_orders=True, strict=True)
