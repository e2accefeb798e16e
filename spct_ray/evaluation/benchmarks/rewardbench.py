"""RewardBench: pairs in four sections."""

from __future__ import annotations

from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Row, Scores, Scoring, mean_of
from spct_ray.records import Item


def read(row: Row) -> list[Item]:
    """{prompt, chosen, rejected, subset}; one pair."""
    return [row.item(row.prompt("prompt"), [row.text("chosen")], [row.text("rejected")])]


COUNTS = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip


def score(scoring: Scoring) -> Scores:
    """Mean of four sections; a section is the mean of its subsets weighted by their published sizes, with math-prm's
    447 items counted as 984, as much as the code subsets together. A tie counts half.

    After allenai/reward-bench, rewardbench/constants.py (EXAMPLE_COUNTS, SUBSET_MAPPING; commit 6552e93) and
    rewardbench/utils.py (calculate_scores_per_section); arXiv 2403.13787. Three differences: the authors give an
    unreadable verdict half a point (scripts/run_generative.py), we none; a section without items is left out, there
    it is 0; and the prior sets, a fifth column that the first leaderboard counted half
    (analysis/get_benchmark_results.py), are other data sets that the published four-section scores do not hold.
    """
    credit_I = scoring.credit_I
    sections: dict[str, float | None] = {}
    for section, counts in COUNTS.items():
        means = {name: scoring.mean(credit_I, scoring.subset([name])) for name in counts}
        present = {name: value for name, value in means.items() if value is not None}
        size = sum(counts[name] for name in present)
        sections[section] = sum(counts[name] * value for name, value in present.items()) / size if size else None
    return mean_of(sections)


SUBSETS = tuple(name for counts in COUNTS.values() for name in counts)
BENCHMARK = Benchmark("RewardBench", (("allenai/reward-bench", "filtered"),), read, score, subsets=SUBSETS)
