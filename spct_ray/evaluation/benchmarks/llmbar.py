"""LLMBar: instruction following, natural and adversarial pairs; the subset is the folder of the file."""

from __future__ import annotations

import re

from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Scores, Scoring, average, mean_of, pair_reader

ADVERSARIAL = ("Neighbor", "GPTInst", "GPTOut", "Manual")


def score(scoring: Scoring) -> Scores:
    """Mean of Natural and the four adversarial subsets, "adversarial" of these four; ties broken at random. The case
    studies that come with the data are measured apart and are in neither mean.

    After princeton-nlp/LLMBar, LLMEvaluator/evaluate.py: an item is the mean over both orders, so that equal ratings
    count half, and a missing verdict is wrong. arXiv 2310.07641.
    """
    credit_I, names = scoring.credit_I, scoring.sheet.names
    studies = {name for name in names if name.startswith("CaseStudy")}
    ends = {name: re.split(r"[/-]", name)[-1].lower() for name in names if name not in studies}
    parts = {
        part: scoring.mean(credit_I, scoring.subset({name for name, end in ends.items() if end == part.lower()}))
        for part in ("Natural", *ADVERSARIAL)
    }
    hard = average({name: parts[name] for name in ADVERSARIAL})
    return mean_of(parts, adversarial=hard, CaseStudy=scoring.mean(credit_I, scoring.subset(studies)))


BENCHMARK = Benchmark("LLMBar", (), pair_reader("input", ("output_1", "output_2"), "label", {1: 0, 2: 1}), score)
