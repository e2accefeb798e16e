"""Rate limits: the bucket alone, with a clock of its own, and over HTTP (ASGI, no Ray)."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spct_ray.errors import ConfigError
from spct_ray.serve import ledger
from spct_ray.serve.deployment import ServeConfig
from spct_ray.serve.ledger import LocalLedger
from tests.test_serve import OK, Script, client


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def limiter_of(per_minute, clock=None):
    return LocalLedger("m", per_minute, clock or Clock())


def waits(limiter, who, judgements):
    """Seconds to wait, 0 when it passes."""
    return asyncio.run(limiter.take(who, judgements))


def test_a_minutes_worth_at_once_then_as_fast_as_it_fills():
    clock = Clock()
    limiter = limiter_of(30, clock)
    assert [waits(limiter, "a", 10) for _ in range(4)] == [0, 0, 0, 2]  # one judgement takes 2 s
    assert waits(limiter, "b", 10) == 0
    clock.now += 1.9
    assert waits(limiter, "a", 1) == 1
    clock.now += 0.1
    assert [waits(limiter, "a", 1) for _ in range(2)] == [0, 2]
    clock.now += 1000
    assert [waits(limiter, "a", 15) for _ in range(3)] == [0, 0, 2]  # a bucket holds no more than a minute's worth


def test_a_large_request_passes_and_what_follows_pays_for_it():
    clock = Clock()
    limiter = limiter_of(60, clock)
    assert waits(limiter, "a", 256 * 64) == 0
    assert waits(limiter, "a", 1) == 256 * 64 - 60 + 1
    clock.now += 256 * 64 - 60 + 1
    assert waits(limiter, "a", 1) == 0


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 40)), max_size=40), st.integers(1, 100))
def test_no_client_gets_more_than_its_rate_and_who_waits_as_told_passes(asked, per_minute):
    clock = Clock()
    limiter = limiter_of(per_minute, clock)
    start, total = clock.now, 0
    for pause, judgements in asked:
        clock.now += pause
        wait = waits(limiter, "a", judgements)
        if wait:
            clock.now += wait
            assert waits(limiter, "a", judgements) == 0
        total += judgements
        assert total - judgements <= per_minute * (1 + (clock.now - start) / 60) + 1e-6


def test_no_limit_and_a_bounded_number_of_clients(monkeypatch):
    assert not any(waits(limiter_of(0), "a", 10**9) for _ in range(3))
    monkeypatch.setattr(ledger, "MAX_CLIENTS", 3)
    limiter = limiter_of(1)
    assert [waits(limiter, who, 1) for who in "abcda"] == [0] * 5  # "a" was forgotten for "d"
    assert waits(limiter, "a", 1) == 60


def test_gateways_with_one_ledger_add_up():
    shared = LocalLedger("m", 12)
    first, second = (client(Script((1, 2)), ledger=shared, judgements_per_minute=12) for _ in range(2))
    assert first.post("/v1/judge", json={**OK, "k": 6}).status_code == 200
    assert second.post("/v1/judge", json={**OK, "k": 6}).status_code == 200
    assert first.post("/v1/judge", json={**OK, "k": 1}).status_code == 429
    for http in (first, second):
        text = http.get("/metrics").text
        assert 'spct_requests_total{route="/v1/judge",status="200"} 2.0' in text
        assert 'spct_samples_total{outcome="ok"} 12.0' in text


def test_who_asks_too_fast_is_told_so_and_others_are_served(monkeypatch):
    monkeypatch.setenv("JUDGE_KEYS", "first second")
    http = client(Script((1, 2)), api_key_env="JUDGE_KEYS", judgements_per_minute=12)
    first, second = ({"Authorization": f"Bearer {key}"} for key in ("first", "second"))
    assert http.post("/v1/judge", json={**OK, "k": 12}, headers=first).status_code == 200
    reply = http.post("/v1/judge", json={**OK, "k": 1}, headers=first)
    assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limited")
    assert "12 judgements per minute" in reply.json()["error"]["message"]
    assert 1 <= int(reply.headers["retry-after"]) <= 5
    assert http.post("/v1/judge", json={**OK, "k": 0}, headers=first).status_code == 422  # costs nothing
    assert http.post("/v1/judge", json={**OK, "k": 1, "stream": True}, headers=first).status_code == 429
    assert http.post("/v1/judge", json={**OK, "k": 1}, headers=second).status_code == 200
    assert 'status="429"} 2.0' in http.get("/metrics", headers=first).text


@pytest.mark.parametrize(
    ("route", "body", "judgements"),
    [
        ("/v1/judge", {**OK, "k": "auto"}, 32),
        ("/v1/judge/batch", {"requests": [{**OK, "k": 2}, {**OK, "k": 3}]}, 5),
        ("/v1/rerank", {"query": "q", "documents": list("abcdefghij"), "k": 2}, 4),  # two chunks
        ("/v1/reward", {"query": ["pa", "qb", "pc"], "prompts": ["p", "q", "p"], "k": 3}, 6),  # two prompts
    ],
)
def test_every_route_counts_its_judgements(route, body, judgements):
    script = Script("\\boxed{1, 9}")
    for allowed, status in ((judgements, 429), (judgements + 1, 200)):
        http = client(script, judgements_per_minute=allowed)
        assert http.post(route, json=body).status_code in (200, 503)  # the script scores pairs alone
        assert http.post("/v1/judge", json={**OK, "k": 1}).status_code == status


@pytest.mark.parametrize("name", ["judgements_per_minute", "principles_cache"])
def test_a_number_below_none_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is -1; it must be 0 or more"):
        ServeConfig("m", **{name: -1})
