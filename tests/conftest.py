"""Settings of all tests: no network, no deadlines (a busy machine is not a failure), files of slow tests first."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it does
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("spct", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("spct")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With two workers, a long file that starts last would run alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
