"""What a gateway counts for Prometheus: requests, samples, tokens, votes. Leaves out the routes that count."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from spct_ray.serve.schema import JudgeAnswer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of one gateway process; with several gateways, `spct_gateway_info` tells whose these are."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "spct_requests", "Requests by route and HTTP status.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "spct_request_seconds",
            "Time to the answer; of a stream, to its beginning.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "spct_requests_in_flight", "Requests being answered; of streams, those not begun.", registry=self._registry
        )
        self._samples = Counter(
            "spct_samples",
            "Judgements by outcome: ok, or the name of the failure.",
            ["outcome"],
            registry=self._registry,
        )
        self._tokens = Counter("spct_tokens", "Tokens read and written.", ["kind"], registry=self._registry)
        self._votes = Counter("spct_votes", "Verdicts by voting and why sampling stopped.", ["voting", "stopped"],
                              registry=self._registry)  # fmt: skip
        self._principles = Counter("spct_principles", "Verdicts by where their principles came from.", ["source"],
                                   registry=self._registry)  # fmt: skip
        info = Info("spct_gateway", "This gateway.", registry=self._registry)
        info.info({"model": model, "host": socket.gethostname(), "pid": str(os.getpid())})

    @contextmanager
    def request(self, route: str) -> Iterator[list[int]]:
        """Time a request; the body of the `with` puts its HTTP status into the list. Without one it counts as 500."""
        started, status = time.perf_counter(), list[int]()
        self._in_flight.inc()
        try:
            yield status
        finally:
            self._in_flight.dec()
            self._requests.labels(route, str(status[0] if status else 500)).inc()
            self._seconds.labels(route).observe(time.perf_counter() - started)

    def verdict(self, answer: JudgeAnswer) -> None:
        """Count a verdict with its samples and tokens."""
        self._votes.labels(answer.voting, answer.stopped).inc()
        self._principles.labels(answer.principles_source).inc()
        for sample in answer.samples:
            self._samples.labels(sample.failure or "ok").inc()
        self._tokens.labels("prompt").inc(answer.prompt_tokens)
        self._tokens.labels("completion").inc(answer.completion_tokens)

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
