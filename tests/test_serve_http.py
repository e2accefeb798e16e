"""Keys, limits, metrics, the documentation, hostile bodies and disconnects, over HTTP (ASGI, no Ray)."""

import asyncio
import gc
import json
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from spct_ray.errors import ConfigError, EngineError
from spct_ray.serve.deployment import ServeConfig
from spct_ray.serve.schema import JudgeAnswer, JudgeRequest, SampleOut
from tests.scripted_engine import ScriptedEngine
from tests.test_serve import OK, Script, SilentEngine, app_of, client, refuse

HTTP = client(Script((1, 2)))


def test_the_api_key(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesam\u00e9")
    http = client(Script((1, 2)), api_key_env="JUDGE_KEY")
    bearer = {"Authorization": "Bearer sesam\u00e9".encode()}
    for headers in ({}, {"Authorization": "Bearer sesam"}, {"Authorization": "sesam\u00e9".encode()}):
        reply = http.post("/v1/judge", json=OK, headers=headers)
        assert (reply.status_code, reply.json()["error"]["type"]) == (401, "unauthorized")
        assert http.get("/metrics", headers=headers).status_code == 401
        assert http.get("/v1/models", headers=headers).status_code == 401
    assert http.post("/v1/judge", json=OK, headers=bearer).status_code == 200
    assert http.get("/metrics", headers=bearer).status_code == 200
    assert http.get("/readyz").status_code == http.get("/healthz").status_code == 200
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="JUDGE_KEY"):
        client(Script((1, 2)), api_key_env="JUDGE_KEY")


def test_metrics_count_requests_samples_and_tokens():
    http = client(Script((4, 6), "no box"))
    http.post("/v1/judge", json={**OK, "k": 4})
    http.post("/v1/judge", json={**OK, "k": 0})
    text = http.get("/metrics").text
    for line in (
        'spct_requests_total{route="/v1/judge",status="200"} 1.0',
        'spct_requests_total{route="/v1/judge",status="422"} 1.0',
        'spct_samples_total{outcome="ok"} 2.0',
        'spct_samples_total{outcome="no_box"} 2.0',
        'spct_votes_total{stopped="k",voting="plain"} 1.0',
        "spct_requests_in_flight 0.0",
    ):
        assert line in text.splitlines()
    http.post("/v1/rerank", json={"query": "q", "documents": ["alpha", "beta"], "k": 2})
    http.post("/v1/judge", json={**OK, "k": 2, "stream": True})
    assert 'spct_votes_total{stopped="k",voting="plain"} 3.0' in http.get("/metrics").text


def test_the_openapi_document_names_bodies_and_answers():
    document = client(Script((1, 2))).get("/openapi.json").json()
    for route, name in (
        ("/v1/judge", "JudgeRequest"),
        ("/v1/rerank", "RerankRequest"),
        ("/v1/reward", "RewardRequest"),
    ):
        body = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        answers = document["paths"][route]["post"]["responses"]
        assert {"200", "401", "413", "422", "429", "503", "504"} <= answers.keys()
        fault = answers["422"]["content"]["application/json"]["schema"]["$ref"]
        assert fault == "#/components/schemas/ErrorAnswer"
    schemas = document["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert references <= set(schemas)
    assert "auto" in json.dumps(schemas["JudgeRequest"]["properties"]["k"])


def test_the_page_names_every_field_of_a_request():
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) >= set(JudgeRequest.model_fields)
    example = json.loads(re.search(r'```json\n(\{"scores".*?)\n```', page, re.DOTALL)[1])
    assert set(example) == set(JudgeAnswer.model_fields)
    assert set(example["samples"][0]) == set(SampleOut.model_fields)
    routes = {route.path for route in HTTP.app.routes} - {"/docs/oauth2-redirect", "/redoc"}
    assert all(f"{route}`" in page for route in routes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
NAMES = [
    "messages",
    "responses",
    "k",
    "seed",
    "budget",
    "reference",
    "stream",
    "query",
    "documents",
    "prompts",
    "labels",
]
FIELDS = st.dictionaries(st.sampled_from([*NAMES, "requests"]), JSON, max_size=3)


@settings(max_examples=40)
@given(st.sampled_from(["/v1/judge", "/v1/judge/batch", "/v1/rerank", "/v1/reward"]), FIELDS, st.booleans())
def test_no_body_makes_the_server_fail(route, fields, is_over_a_good_one):
    good = OK if is_over_a_good_one else {}
    reply = HTTP.post(route, content=json.dumps(good | fields))
    assert reply.status_code in (200, 422, 503)
    if reply.status_code == 422:
        assert all(detail["path"] for detail in reply.json()["error"]["details"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 422),
        (b"[" * 1_000_000, 422),
        (json.dumps({**OK, "k": 10**400}).encode(), 422),
        (json.dumps({**OK, "seed": float("inf")}).encode(), 422),
        (json.dumps({**OK, "responses": ["a", "\udfff\ud800"]}).encode(), 422),
        (b'{"responses": ["\xed\xa0\x80"]}', 422),
        (b'{"k": 1}' * 2, 422),
        (json.dumps({**OK, "k" * 10_000: 1}).encode(), 422),
        (json.dumps({**OK, **{f"k{i}": 1 for i in range(10_000)}}).encode(), 422),
        (b" " * 10_000_000, 413),
        (json.dumps({**OK, "responses": ["\0", "\u2028\x7f\ufeff\u202e\U0001f600"]}).encode(), 200),
    ],
)
def test_hostile_bodies_are_refused_cleanly(body, status):
    reply = client(lambda r: ["\\boxed{1, 2}"]).post("/v1/judge", content=body)
    assert reply.status_code == status
    if status == 422:
        details = reply.json()["error"]["details"]
        assert len(reply.content) < 10_000
        assert all(detail["path"] for detail in details)
    if status == 413:
        message = reply.json()["error"]["message"]
        assert str(len(body)) in message
        assert str(ServeConfig.max_body_bytes) in message


def test_texts_that_cannot_fit_are_refused_before_any_is_encoded():
    script = Script((1, 2))
    reply = client(script).post("/v1/judge", json={**OK, "principles": "[ " * 100_000})
    assert (reply.status_code, reply.json()["error"]["type"]) == (413, "too_long")
    assert "texts of 200020 characters" in reply.json()["error"]["message"]
    assert "4096 tokens" in reply.json()["error"]["message"]
    assert not script.params


def test_a_body_without_a_declared_length_is_cut_off():
    reply = client(refuse).post("/v1/judge", content=iter([b" " * 2**20] * 5))
    assert (reply.status_code, reply.json()["error"]["type"]) == (413, "too_long")


def test_no_text_of_a_request_and_no_stray_error_is_logged(caplog):
    caplog.set_level("DEBUG")
    secret = {**OK, "responses": ["sesame", "beta"], "reference": "sesame", "seed": 1}
    for script in (refuse, Script((1, 2)), Script("sesame")):
        http = client(script)
        for body in (secret, {**secret, "k": "auto"}, {**secret, "sesame": 1}, {**secret, "stream": True}):
            http.post("/v1/judge", json=body)
            http.post("/v1/judge/batch", json={"requests": [body]})
    gc.collect()  # asyncio reports an error that nobody looked at once it is forgotten
    logged = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert not [record for record in logged if "sesame" in record.getMessage() or record.levelname == "ERROR"]


# --- disconnects


class CountingEngine(SilentEngine):
    """Silent, and remembers the futures it gave."""

    def submit(self, request):
        self.given = [*getattr(self, "given", []), super().submit(request)]
        return self.given[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_the_engines_work(stream):
    """A stream sees the client disconnect; any other request is cancelled by the server, as Ray Serve does."""
    engine = CountingEngine(refuse)
    body = json.dumps({**OK, "k": 3, "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    app = app_of(engine)

    async def until_asked():
        while not getattr(engine, "given", []):
            await asyncio.sleep(0)

    async def receive():
        if messages:
            return messages.pop()
        await until_asked()
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {"type": "http", "asgi": {"version": "3.0"}, "method": "POST", "path": "/v1/judge", "headers": [],
             "query_string": b"", "http_version": "1.1", "scheme": "http", "raw_path": b"/v1/judge"}  # fmt: skip

    async def scenario():
        work = asyncio.create_task(app(scope, receive, send))
        await until_asked()
        if not stream:
            work.cancel()
        await asyncio.wait({work})

    asyncio.run(scenario())
    assert len(engine.given) == 3
    assert all(future.cancelled() for future in engine.given)
    status = 200 if stream else 499
    assert f'status="{status}"}} 1.0' in TestClient(app).get("/metrics").text


def test_a_judge_that_is_too_slow_is_no_longer_worked_for():
    engine = CountingEngine(refuse)
    assert client(None, engine=engine, judge_timeout_s=0.01).post("/v1/judge", json=OK).status_code == 504
    assert len(engine.given) == 8
    assert all(future.cancelled() for future in engine.given)


def test_a_full_queue_is_503_with_retry_after():
    class Full(ScriptedEngine):
        def submit(self, request):
            raise EngineError("the judge's queue is full")

    reply = client(None, engine=Full(refuse)).post("/v1/judge", json=OK)
    assert (reply.status_code, int(reply.headers["retry-after"]) > 0) == (503, True)
    assert "queue is full" in reply.json()["error"]["message"]
