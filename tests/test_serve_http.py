"""The other routes, streams, limits and faults of the gateway over HTTP (ASGI, no Ray)."""

import asyncio
import contextlib
import gc
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spct_ray.engines.scripted import ScriptedEngine
from spct_ray.errors import ConfigError, EngineError
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Item, Message, Trajectory
from spct_ray.serve.backends import LocalJudge
from spct_ray.serve.config import ServeConfig
from spct_ray.serve.gateway import Gateway, _Scorer
from spct_ray.serve.routes import build_app
from spct_ray.serve.schema import JudgeAnswer, JudgeRequest, SampleOut
from tests.test_serve import OK, TABLE_17, Meta, Script, SilentEngine, ask, client, refuse

HTTP = client(Script((1, 2)))


def by_length(request):
    """A judge to whom the longer response is better: 1 + its length, so that every chunk shows one scale."""
    shown = re.findall(r"\[Response \d+\]\n(.*?)\n\[End \d+\]", request.messages[0].content, re.DOTALL)
    return [f"Scores: \\boxed{{{', '.join(str(1 + len(text)) for text in shown)}}}"]


def events(reply):
    """(event, data) pairs of a stream."""
    blocks = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in blocks]


# --- what an answer says


def test_principles_and_reference_reach_the_judge():
    seen = []
    engine = ScriptedEngine(lambda r: [seen.append(r.messages[0].content) or "\\boxed{1, 2}"])
    reply = client(None, engine=engine).post(
        "/v1/judge", json={**OK, "k": 1, "principles": "Brevity (100%)", "reference": "beta"}
    )
    assert reply.status_code == 200
    assert "\nPrinciples: Brevity (100%)\nReference: beta\n[Response 1]" in seen[0]


def test_confidence_tokens_and_versions():
    answer = ask(Script(*TABLE_17), k=3, seed=1)
    assert 0.9 < answer["confidence"] <= 1  # only a resample of three (8, 8) ties
    assert answer["completion_tokens"] == sum(s["completion_tokens"] for s in answer["samples"])
    assert [s["weight_version"] for s in answer["samples"]] == [0, 0, 0]
    assert answer["stopped"] == "k"
    assert ask(Script((1, 2)), k=1)["confidence"] is None
    assert ask(Script("\\boxed{1}"), k=3, responses=["alpha"])["confidence"] is None


# --- adaptive k and budgets


def test_adaptive_k_stops_when_the_winner_is_settled():
    script = Script((1, 9), (2, 9), (1, 10), (2, 10))
    answer = ask(script, k="auto", seed=3)
    assert (answer["stopped"], answer["num_samples"], answer["winner"]) == ("settled", 4, 1)
    assert len(script.params) == 4
    undecided = Script((5, 6), (6, 5))
    answer = ask(undecided, k="auto", seed=3)
    assert (answer["stopped"], answer["num_samples"]) == ("k", ServeConfig.k_auto_max)


def test_adaptive_k_looks_at_the_samples_that_the_meta_rm_keeps():
    """The two best of each four say 9 : 1, the others 1 : 9."""

    class ByScore:
        async def score(self, conversations):
            return [1.0 if "boxed{9, 1}" in c[1].content else 0.0 for c in conversations]

    texts = ("Scores: \\boxed{9, 1}", "Scores: \\boxed{1, 9}")
    answer = ask(Script(*texts), ByScore(), k="auto", seed=3)
    assert answer["voting"] == "meta"
    assert answer["stopped"] in ("settled", "k")
    assert answer["num_samples"] >= 8  # of four it keeps two, too few to look at
    assert all(s["text"] == texts[0] for s in answer["samples"] if s["kept"])


def test_a_budget_of_tokens_begins_no_further_round():
    answer = ask(Script((1, 2)), k=64, budget={"tokens": 1})
    assert (answer["stopped"], answer["num_samples"]) == ("budget", 4)
    answer = ask(Script((1, 2)), k=64, budget={"tokens": 10**6})
    assert (answer["stopped"], answer["num_samples"]) == ("k", 64)


class HalfSilentEngine(SilentEngine):
    """Answers every second request."""

    def submit(self, request):
        self.count = getattr(self, "count", 0) + 1
        return ScriptedEngine.submit(self, request) if self.count % 2 else SilentEngine.submit(self, request)


def test_a_budget_of_time_votes_over_what_is_there():
    engine = HalfSilentEngine(lambda r: ["\\boxed{3, 3}"])
    reply = client(None, engine=engine).post("/v1/judge", json={**OK, "k": 4, "budget": {"milliseconds": 50}})
    answer = reply.json()
    assert (answer["stopped"], answer["scores"], answer["used"]) == ("budget", [6, 6], [0, 1])
    assert [s["sample"] for s in answer["samples"]] == [0, 2]
    nothing = client(None, engine=SilentEngine(refuse))
    reply = nothing.post("/v1/judge", json={**OK, "budget": {"milliseconds": 20}})
    assert (reply.status_code, reply.json()["error"]["type"]) == (504, "timeout")


class SlowMeta:
    """Scores after `seconds`, or once `go` is set."""

    def __init__(self, seconds=60.0):
        self.seconds, self.go = seconds, asyncio.Event()

    async def score(self, conversations):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.go.wait(), self.seconds)
        return [1.0] * len(conversations)


@pytest.mark.parametrize(("k", "stopped"), [(4, "k"), ("auto", "budget")])
def test_meta_scores_are_waited_for_no_longer_than_a_budget_of_time(k, stopped):
    reply = client(Script((1, 9)), SlowMeta()).post("/v1/judge", json={**OK, "k": k, "budget": {"milliseconds": 100}})
    answer = reply.json()
    assert (reply.status_code, answer["winner"], answer["num_samples"]) == (200, 1, 4)
    assert (answer["voting"], answer["voting_reason"]) == ("plain", "the meta RM did not answer within 0.1 s")
    reply = client(Script((1, 9)), SlowMeta(0.01)).post(
        "/v1/judge", json={**OK, "k": 4, "budget": {"milliseconds": 9999}}
    )
    assert (reply.json()["voting"], reply.json()["stopped"]) == ("meta", "k")


def test_a_budget_that_ends_while_samples_are_scored_loses_no_score():
    async def scenario():
        meta = SlowMeta()
        scorer = _Scorer(meta, Item("i", (Message("user", "q"),), ("a", "b")), 60)
        made = [Trajectory("i", k, (0, 1), "t", (1, 9), "", False, False, 0.5, k, "m", 0, 1, 1, "stop") for k in (0, 1)]
        scorer.add(made)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await scorer.logits(made)
        meta.go.set()
        return await scorer.logits(made)

    assert asyncio.run(scenario()) == ([1.0, 1.0], "")


# --- streams


def test_a_stream_tells_each_sample_and_ends_with_the_verdict():
    reply = client(Script(*TABLE_17)).post("/v1/judge", json={**OK, "k": 3, "seed": 1, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *samples, (last, verdict) = events(reply)
    assert [kind for kind, _ in samples] == ["sample"] * 3
    assert [data["num_samples"] for _, data in samples] == [1, 2, 3]
    assert samples[-1][1]["scores"] == verdict["scores"] == [20, 27]
    plain = ask(Script(*TABLE_17), k=3, seed=1)
    assert (last, verdict | {"milliseconds": 0}) == ("verdict", plain | {"milliseconds": 0})


def test_a_stream_that_fails_says_so_in_its_last_event():
    ((kind, fault),) = events(client(refuse).post("/v1/judge", json={**OK, "stream": True}))
    assert (kind, fault["type"]) == ("error", "too_long")
    assert client(refuse).post("/v1/judge", json={**OK, "k": 0, "stream": True}).status_code == 422


# --- batches, rerankers, rewards


def test_a_batch_answers_each_request_by_itself():
    requests = [{**OK, "k": 2, "seed": 5}, {**OK, "responses": ["alpha"], "k": 1}]
    reply = client(Script((3, 7))).post("/v1/judge/batch", json={"requests": requests})
    first, second = reply.json()["results"]
    assert (first["answer"]["scores"], first["error"]) == ([6, 14], None)
    assert second["answer"]["failures"] or second["answer"]["scores"]
    results = client(refuse).post("/v1/judge/batch", json={"requests": requests}).json()["results"]
    assert [(r["answer"], r["error"]["type"]) for r in results] == [(None, "too_long")] * 2
    reply = client(refuse).post("/v1/judge/batch", json={"requests": [OK, {**OK, "k": 0}]})
    assert (reply.status_code, reply.json()["error"]["details"][0]["path"]) == (422, "requests.1.k")
    reply = client(refuse).post("/v1/judge/batch", json={"requests": [OK, {**OK, "stream": True}]})
    assert (reply.status_code, reply.json()["error"]["details"][0]["path"]) == (422, "requests.1.stream")


def test_rerank_as_jina_and_cohere_ask():
    documents = ["a", "abcd", {"text": "abc"}, "", "ab"]
    request = {"model": "any", "query": "q", "documents": [d for d in documents if d], "truncate": True, "k": 2}
    answer = client(by_length).post("/v1/rerank", json={**request, "top_n": 3, "return_documents": True}).json()
    assert [r["index"] for r in answer["results"]] == [1, 2, 3]
    assert [r["relevance_score"] for r in answer["results"]] == [4 / 9, 3 / 9, 2 / 9]
    assert [r["document"]["text"] for r in answer["results"]] == ["abcd", "abc", "ab"]
    assert answer["usage"]["total_tokens"] > 0
    plain = client(by_length).post("/v1/rerank", json=request).json()
    assert [sorted(r) for r in plain["results"]] == [["index", "relevance_score"]] * 4
    many = ["x" * (i % 9) + "y" for i in range(40)]
    answer = client(by_length).post("/v1/rerank", json={"query": "q", "documents": many, "k": 1}).json()
    order = [len(many[r["index"]]) for r in answer["results"]]
    assert order == sorted(order, reverse=True)
    reply = client(lambda r: ["no box"]).post("/v1/rerank", json=request)
    assert (reply.status_code, "retry-after" in reply.headers) == (503, True)
    reply = client(by_length).post("/v1/rerank", json={**request, "documents": ["a", 1]})
    assert (reply.status_code, reply.json()["error"]["details"][0]["path"][:11]) == (422, "documents.1")


def test_rewards_as_openrlhf_asks():
    """Completions of one prompt are judged in one prompt; what is not usable is NaN."""
    prompts = ["<|user|>one<|assistant|>", "<|user|>two<|assistant|>", "<|user|>one<|assistant|>"]
    queries = [prompts[0] + "abc", prompts[1] + "a", prompts[2] + "a"]
    asked = []

    def judge(request):
        asked.append(request.messages[0].content)
        return ["no box"] if "two" in asked[-1] else by_length(request)

    reply = client(judge).post(
        "/v1/reward", json={"query": queries, "prompts": prompts, "labels": ["", None, ""], "k": 2}
    )
    answer = json.loads(reply.text)  # as `requests` and `aiohttp` read it
    assert (answer["rewards"][0], answer["rewards"][2]) == (4.0, 2.0)
    assert math.isnan(answer["rewards"][1])
    assert answer["extra_logs"]["judge_failed"] == [0.0, 1.0, 0.0]
    assert answer["scores"][0] == pytest.approx(3 / 9)
    assert len(asked) == 4
    reply = client(judge).post("/v1/reward", json={"query": queries, "prompts": prompts[:1], "labels": None})
    assert (reply.status_code, reply.json()["error"]["details"][0]["path"]) == (422, "prompts")


# --- limits, keys, metrics, documentation


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


# --- disconnects and meta scores that come in parts


def app_of(engine, meta=None, **config):
    settings = ServeConfig("unused", judge=JudgeConfig(template="compact"), **config)

    async def ready():
        return True

    return build_app(Gateway(settings, LocalJudge(engine, settings), meta), ready)


class CountingEngine(SilentEngine):
    """Silent, and remembers the futures it gave."""

    def submit(self, request):
        self.given = [*getattr(self, "given", []), super().submit(request)]
        return self.given[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_the_engines_work(stream):
    engine = CountingEngine(refuse)
    body = json.dumps({**OK, "k": 3, "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        while not getattr(engine, "given", []):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {"type": "http", "asgi": {"version": "3.0"}, "method": "POST", "path": "/v1/judge", "headers": [],
             "query_string": b"", "http_version": "1.1", "scheme": "http", "raw_path": b"/v1/judge"}  # fmt: skip
    asyncio.run(app_of(engine)(scope, receive, send))
    assert len(engine.given) == 3
    assert all(future.cancelled() for future in engine.given)


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


def test_meta_scores_of_samples_that_came_apart_go_to_their_own_samples():
    class ByText:
        calls = 0

        async def score(self, conversations):
            ByText.calls += 1
            return [float(re.findall(r"\d+", c[1].content)[-1]) for c in conversations]

    answer = ask(Script((1, 2)), ByText(), k="auto", seed=1)
    assert ByText.calls > 1
    assert all(s["meta_logit"] == float(re.findall(r"\d+", s["text"])[-1]) for s in answer["samples"])
    broken = Meta(error=EngineError("gone"))
    answer = ask(Script((1, 9)), broken, k="auto", seed=1)
    assert (answer["voting"], answer["voting_reason"]) == ("plain", "the meta RM failed: gone")
    assert (answer["stopped"], answer["winner"]) == ("settled", 1)
