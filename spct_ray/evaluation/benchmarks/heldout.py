"""The held-out items of a run, scored by accuracy."""

from __future__ import annotations

from spct_ray.evaluation.benchmarks.benchmark import Benchmark, accuracy
from spct_ray.evaluation.benchmarks.own import read

BENCHMARK = Benchmark("held-out items", (), read, accuracy)
