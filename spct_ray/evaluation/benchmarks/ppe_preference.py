"""PPE human preference: pairs of the arena, whose ties have no unique best and are dropped by that name."""

from __future__ import annotations

from spct_ray.evaluation.benchmarks.benchmark import Benchmark, accuracy, pair_reader

WINNERS = {"model_a": 0, "model_b": 1, "response_1": 0, "response_2": 1, "tie": None, "tie (bothbad)": None}
read = pair_reader("prompt", ("response_1", "response_2"), "winner", WINNERS)
BENCHMARK = Benchmark("PPE preference", (("lmarena-ai/PPE-Human-Preference-V1", "test"),), read, accuracy)
