"""Settings of all tests: no network, no deadlines (a busy machine is not a failure)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from hypothesis import HealthCheck, settings

settings.register_profile("spct", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("spct")
