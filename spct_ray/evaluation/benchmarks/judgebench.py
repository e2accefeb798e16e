"""JudgeBench: pairs judged in both orders."""

from __future__ import annotations

import numpy as np

from spct_ray.data.shapes import Cells
from spct_ray.data.validate import Limits
from spct_ray.evaluation.benchmarks.benchmark import (
    Benchmark,
    Scores,
    in_subsets,
    make_item,
    weighted_mean,
    without_none,
)
from spct_ray.evaluation.judgements import Decision, Floats, Sheet, decided, verdicts
from spct_ray.records import Item


def read(cells: Cells, item_id: str, limits: Limits) -> list[Item]:
    """{question, response_A, response_B, label: "A>B" | "B>A", source, response_model}; one pair."""
    answers, label = [cells.text("response_A"), cells.text("response_B")], cells.text("label")
    if label not in ("A>B", "B>A"):
        raise cells.error(f"'label' must be 'A>B' or 'B>A', found {label!r}")
    right = int(label == "B>A")
    facts = {"response model": name} if (name := cells.optional("response_model")) else {}
    prompt, source = cells.prompt("question"), cells.optional("source")
    return [make_item(cells, item_id, prompt, [answers[right]], [answers[1 - right]], source, **facts)]


JUDGE_BENCH_GROUPS = {
    "knowledge": "mmlu-pro", "reasoning": "livebench-reasoning", "math": "livebench-math", "coding": "livecodebench",
}  # fmt: skip


def score(sheet: Sheet, decision: Decision, weight_I: Floats) -> Scores:
    """Accuracy over pairs judged in both orders: a right verdict counts +1, a wrong one -1, a tie or none 0, and the
    pair is right when the sum is positive. "both_right" asks for two right verdicts, "inconsistent" is the share of
    pairs whose two verdicts differ, a tie and none being two. The verdict of an order is the vote of the judgements
    that saw it. Published tables are of the pairs of one response model: these stand under the model's name.

    After ScalerLab/JudgeBench, utils/metrics.py (compute_final_metrics) and run_judge.py (groups by the beginning of
    the source); arXiv 2410.12784.
    """
    forward_I, backward_I = verdicts(sheet, decision.forward_IO), verdicts(sheet, decision.backward_IO)
    right_I = np.asarray(forward_I + backward_I > 0, dtype=np.float64)
    everything = weight_I > 0
    parts = {
        name: weighted_mean(right_I, weight_I, in_subsets(sheet, lambda s, prefix=prefix: s.startswith(prefix)))  # type: ignore[misc]
        for name, prefix in JUDGE_BENCH_GROUPS.items()
    }
    both = np.asarray((forward_I > 0) & (backward_I > 0), dtype=np.float64)
    answered = decided(decision.forward_IO) == decided(decision.backward_IO)
    differ = np.asarray((forward_I != backward_I) | ~answered, dtype=np.float64)
    overall = {
        "both_right": weighted_mean(both, weight_I, everything),
        "inconsistent": weighted_mean(differ, weight_I, everything),
    }
    model_I = np.array([facts.get("response model", "") for facts in sheet.facts_I])
    models = {str(name): weighted_mean(right_I, weight_I, model_I == name) for name in sorted(set(model_I)) if name}
    return without_none({"score": weighted_mean(right_I, weight_I, everything), **parts, **overall, **models})


_HUB = (("ScalerLab/JudgeBench", "gpt"), ("ScalerLab/JudgeBench", "claude"))
BENCHMARK = Benchmark("JudgeBench", _HUB, read, score, both_orders=True, strict=True)
