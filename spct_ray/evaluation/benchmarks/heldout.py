"""The held-out items of a run, scored by accuracy."""

from __future__ import annotations

from spct_ray.evaluation.benchmarks.benchmark import Benchmark
from spct_ray.evaluation.benchmarks.own import accuracy, read

BENCHMARK = Benchmark("held-out items", (), read, accuracy)
