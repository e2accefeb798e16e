"""Streams, batches, rerankers and rewards over HTTP (ASGI, no Ray)."""

import json
import math
import re

import pytest

from tests.test_serve import OK, TABLE_17, Script, ask, client, refuse


def by_length(request):
    """A judge to whom the longer response is better: 1 + its length, so that every chunk shows one scale."""
    shown = re.findall(r"\[Response \d+\]\n(.*?)\n\[End \d+\]", request.messages[0].content, re.DOTALL)
    return [f"Scores: \\boxed{{{', '.join(str(1 + len(text)) for text in shown)}}}"]


def events(reply):
    """(event, data) pairs of a stream."""
    blocks = [block.split("\n") for block in reply.text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in blocks]


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
