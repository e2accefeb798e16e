"""Counts over all gateways: requests, samples, tokens and votes for Prometheus, and each client's rate limit.

Not by `ray.serve.metrics`, which is exported only on the port of each node's agent, and up to ten seconds late.
"""

from __future__ import annotations

import math
import time
from collections import Counter as Tallies
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from spct_ray.errors import SpctError
from spct_ray.serve.schema import JudgeAnswer

MAX_CLIENTS = 10_000  # with a bucket; the least recent one is dropped, and starts with a full bucket again
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_METRICS = {  # by the name in events: Prometheus name, description, labels
    "requests": ("spct_requests", "Requests by route and HTTP status.", ("route", "status")),
    "samples": ("spct_samples", "Judgements by outcome: ok, or the name of the failure.", ("outcome",)),
    "tokens": ("spct_tokens", "Tokens read and written.", ("kind",)),
    "votes": ("spct_votes", "Verdicts by voting and why sampling stopped.", ("voting", "stopped")),
    "principles": ("spct_principles", "Verdicts by where their principles came from.", ("source",)),
    "seconds": ("spct_request_seconds", "Time to the answer; of a stream, to its beginning.", ("route",)),
    "in_flight": ("spct_requests_in_flight", "Requests being answered; of streams, those not begun.", ()),
}

Event = tuple[str, tuple[str, ...], float]  # name of a metric, values of its labels, increment


class RateLimited(SpctError):
    """A client exceeds its rate limit, and may try again after `retry_after_s` whole seconds."""

    def __init__(self, judgements_per_minute: int, retry_after_s: int) -> None:
        super().__init__(
            f"more than {judgements_per_minute} judgements per minute (k for each prompt); wait {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


class Ledger(Protocol):
    """A LocalLedger, in the gateway's process or in a replica of its own where there are several gateways."""

    def record(self, events: Sequence[Event]) -> None: ...
    async def take(self, client: str, judgements: int) -> int: ...
    async def exposition(self) -> bytes: ...


class LocalLedger:
    """Counts in this process, and a token bucket per client: `judgements_per_minute` judgements (0: no limit).

    A minute's worth may come at once, then the bucket refills at the rate. A request passes if one judgement is left,
    and takes all that it asks for, on credit if need be: no request is too large to pass, the next ones wait longer.
    Not by the library `limits`, whose windows refuse a request that costs more than one window for ever.
    """

    def __init__(self, model: str, judgements_per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = judgements_per_minute, clock
        self._empty_at: OrderedDict[str, float] = OrderedDict()  # when each bucket was or will be empty; last used last
        self._registry = CollectorRegistry()
        Info("spct_service", "What is served.", registry=self._registry).info({"model": model})
        self._metrics: dict[str, Counter | Gauge | Histogram] = {
            name: Histogram(*words, buckets=_SECONDS, registry=self._registry)
            if name == "seconds"
            else (Gauge if name == "in_flight" else Counter)(*words, registry=self._registry)
            for name, words in _METRICS.items()
        }

    def record(self, events: Sequence[Event]) -> None:
        """Count events."""
        for name, labels, amount in events:
            metric = self._metrics[name]
            child = metric.labels(*labels) if labels else metric
            child.observe(amount) if isinstance(child, Histogram) else child.inc(amount)

    async def take(self, client: str, judgements: int) -> int:
        """Charge a client for judgements and return 0, or return the seconds it has to wait and charge nothing."""
        if not self._per_minute:
            return 0
        now, seconds_each = self._clock(), 60 / self._per_minute
        empty_at = max(self._empty_at.pop(client, 0.0), now - 60)
        wait_s = empty_at + seconds_each - now
        self._empty_at[client] = empty_at + (0.0 if wait_s > 1e-6 else judgements * seconds_each)
        if len(self._empty_at) > MAX_CLIENTS:
            self._empty_at.popitem(last=False)
        return math.ceil(wait_s) if wait_s > 1e-6 else 0  # who waits as told must not fail by rounding

    async def exposition(self) -> bytes:
        """All counts in Prometheus' text format."""
        return generate_latest(self._registry)


def verdict_events(answer: JudgeAnswer) -> list[Event]:
    """What a verdict counts for."""
    outcomes = Tallies(sample.failure or "ok" for sample in answer.samples)
    return [
        ("votes", (answer.voting, answer.stopped), 1),
        ("principles", (answer.principles_source,), 1),
        ("tokens", ("prompt",), answer.prompt_tokens),
        ("tokens", ("completion",), answer.completion_tokens),
        *(("samples", (outcome,), num) for outcome, num in outcomes.items()),
    ]
