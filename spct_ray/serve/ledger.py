"""What all gateways count together: requests, samples, tokens and votes for Prometheus, and each client's rate limit.

`ray.serve.metrics` was tried: it reaches only the port of each node's agent, up to ten seconds later.
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

MAX_CLIENTS = 10_000  # remembered; the client that asked least recently is forgotten, and may ask at once
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_METRICS = {  # by the name in events: what Prometheus is told, with its labels
    "requests": ("spct_requests", "Requests by route and HTTP status.", ("route", "status")),
    "samples": ("spct_samples", "Judgements by outcome: ok, or the name of the failure.", ("outcome",)),
    "tokens": ("spct_tokens", "Tokens read and written.", ("kind",)),
    "votes": ("spct_votes", "Verdicts by voting and why sampling stopped.", ("voting", "stopped")),
    "principles": ("spct_principles", "Verdicts by where their principles came from.", ("source",)),
    "seconds": ("spct_request_seconds", "Time to the answer; of a stream, to its beginning.", ("route",)),
    "in_flight": ("spct_requests_in_flight", "Requests being answered; of streams, those not begun.", ()),
}

Event = tuple[str, tuple[str, ...], float]  # name of a metric, values of its labels, by how much


class RateLimited(SpctError):
    """A client asks too fast. After `retry_after_s` whole seconds it may ask again."""

    def __init__(self, judgements_per_minute: int, retry_after_s: int) -> None:
        super().__init__(
            f"you ask for more than {judgements_per_minute} judgements a minute (k for each prompt); "
            f"wait {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


class Ledger(Protocol):
    """Kept in the gateway's process (`LocalLedger`), or in one replica of its own where there are several gateways."""

    def record(self, events: Sequence[Event]) -> None:
        """Count events."""

    async def take(self, client: str, judgements: int) -> int:
        """Charge a client for judgements. Returns 0, or for how many seconds it has to wait, and then charges none."""

    async def exposition(self) -> bytes:
        """All counts in Prometheus' text format."""


class LocalLedger:
    """Counts since it was made; a client may ask for `judgements_per_minute` judgements (0: any number).

    A minute's worth may come at once, then as many as a minute gives back: a token bucket. A request passes when one
    judgement is left and then takes all it asks for, on credit if need be, so that none is too large to pass and what
    follows waits the longer. (The windows of the library `limits` refuse for ever what costs more than one window.)
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
        for name, labels, amount in events:
            metric = self._metrics[name]
            child = metric.labels(*labels) if labels else metric
            child.observe(amount) if isinstance(child, Histogram) else child.inc(amount)

    async def take(self, client: str, judgements: int) -> int:
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
