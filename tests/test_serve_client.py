"""Clients and reward functions against a live HTTP server (uvicorn, an engine that writes given scores)."""

import asyncio
import inspect
import math
import re
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from spct_ray.errors import TooLongError
from spct_ray.records import Message
from spct_ray.serve import client as client_module
from spct_ray.serve.client import AsyncJudgeClient, JudgeClient, ServerError, request
from spct_ray.serve.rewards import MAX_UNDER_WAY, cohort_rewards, trl_reward, verl_reward
from spct_ray.serve.schema import JudgeAnswer
from tests.scripted_engine import ScriptedEngine as engine
from tests.test_serve import Script, app_of, refuse
from tests.test_serve_routes import by_length

QUERY = [Message("user", "Which word?")]


@contextmanager
def served(app):
    """The app's address while it is served from a thread."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Log:
    """A judge that likes length; remembers what it was shown, and fails where `bad` is shown."""

    def __init__(self, bad="never shown"):
        self.prompts, self.bad = [], bad

    def __call__(self, asked):
        self.prompts.append(asked.messages[0].content)
        return ["no box"] if self.bad in self.prompts[-1] else by_length(asked)


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(client_module, "_LONGEST_WAIT_S", 1e-9)


def test_both_clients_give_the_same_verdicts_and_streams():
    async def ask_async(url):
        async with AsyncJudgeClient(url) as client:
            one = await client.judge(QUERY, ["alpha", "beta"], k=3, seed=1)
            many = await client.judge_batch([request(QUERY, ["alpha", "beta"], k=3, seed=1)])
            stream = [event async for event in client.stream(QUERY, ["alpha", "beta"], k=3, seed=1)]
        return one, many, stream

    def plain(answer):
        return answer.model_copy(update={"milliseconds": 0.0})

    with served(app_of(engine(Script((8, 8), (5, 9), (7, 10))))) as url:
        with JudgeClient(url) as client:
            one = client.judge(QUERY, ["alpha", "beta"], k=3, seed=1)
            (many,) = client.judge_batch([request(QUERY, ["alpha", "beta"], k=3, seed=1)])
            stream = list(client.stream(QUERY, ["alpha", "beta"], k=3, seed=1))
            with pytest.raises(ServerError) as refused:
                client.judge(QUERY, ["alpha"], k=99)
            with pytest.raises(ServerError) as refused_stream:
                list(client.stream(QUERY, [], k=1))
        other = asyncio.run(ask_async(url))
    assert one.scores == [20, 27]
    assert plain(one) == plain(many.answer) == plain(stream[-1]) == plain(other[0]) == plain(other[1][0].answer)
    assert len(stream) == len(other[2]) == 4
    assert isinstance(other[2][-1], JudgeAnswer)
    assert (refused.value.status, refused.value.kind) == (422, "invalid_request")
    assert refused_stream.value.status == 422


def test_a_stream_that_fails_raises_what_went_wrong():
    with (
        served(app_of(engine(refuse))) as url,
        JudgeClient(url) as client,
        pytest.raises(ServerError, match=r"200 \(too_long\): a prompt of 5000 tokens"),
    ):
        list(client.stream(QUERY, ["alpha", "beta"], k=1))


def test_line_ends_of_unicode_do_not_break_a_stream():
    """Readers of lines take more for a line's end than the format of events does."""
    text = "a\u2028b\u2029c\x85d\x1ce\x0bf\rg \\boxed{1, 2}"

    async def ask_async(url):
        async with AsyncJudgeClient(url) as client:
            return [event async for event in client.stream(QUERY, ["alpha", "beta"], k=2)]

    with served(app_of(engine(lambda asked: [text]))) as url, JudgeClient(url) as client:
        for *tallies, answer in (list(client.stream(QUERY, ["alpha", "beta"], k=2)), asyncio.run(ask_async(url))):
            assert [tally.sample.text for tally in tallies] == [sample.text for sample in answer.samples] == [text] * 2


@pytest.mark.parametrize("body", ['{"detail": "gone"}', '["odd"]', "no JSON"])
def test_what_stands_between_may_answer_in_its_own_shape(body):
    app = FastAPI()
    app.post("/v1/judge")(lambda: Response(body, status_code=418, media_type="application/json"))
    with served(app) as url, JudgeClient(url) as client, pytest.raises(ServerError) as raised:
        client.judge(QUERY, ["alpha", "beta"])
    assert (raised.value.status, raised.value.kind) == (418, "http")
    assert body in str(raised.value)


def flaky(statuses):
    """Answers with each status in turn, then with a verdict; counts its requests."""
    app, left = FastAPI(), list(statuses)
    inner = app_of(engine(Script((1, 2))))

    @app.middleware("http")
    async def fail(asked, call_next):
        if not left:
            return await call_next(asked)
        body = {"error": {"type": "unavailable", "message": "busy", "details": []}}
        return JSONResponse(body, status_code=left.pop(0), headers={"Retry-After": "0"})

    app.mount("/", inner)
    return app


def test_busy_servers_are_tried_again_and_refusals_are_not(no_wait):
    async def ask_async(url):
        async with AsyncJudgeClient(url) as client:
            return await client.judge(QUERY, ["alpha", "beta"], k=1)

    with served(flaky([503, 429, 504])) as url, JudgeClient(url) as client:
        assert client.judge(QUERY, ["alpha", "beta"], k=1).scores == [1, 2]
    with served(flaky([502, 503])) as url:
        assert asyncio.run(ask_async(url)).scores == [1, 2]
    with (
        served(flaky([503] * 5)) as url,
        JudgeClient(url, max_attempts=2) as client,
        pytest.raises(ServerError, match=r"503 \(unavailable\): busy"),
    ):
        client.judge(QUERY, ["alpha", "beta"], k=1)
    with served(flaky([413])) as url, JudgeClient(url) as client:
        with pytest.raises(ServerError, match="413"):
            client.judge(QUERY, ["alpha", "beta"], k=1)
        with pytest.raises(httpx.TransportError):
            JudgeClient("http://127.0.0.1:1", max_attempts=2).judge(QUERY, ["alpha"])


def test_the_environments_proxy_is_used(monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with served(app_of(engine(Script((1, 2))))) as url:
        monkeypatch.setenv("HTTP_PROXY", url)  # the service itself, which reads the path of what it is sent
        with JudgeClient("http://judge.invalid") as client:
            assert client.judge(QUERY, ["alpha", "beta"], k=1).scores == [1, 2]


def test_trl_gets_one_reward_a_completion_from_prompts_judged_together():
    log = Log(bad="sad")
    prompts = ["one", [{"role": "user", "content": "two"}], "one", "sad", "one"]
    completions = ["a", [{"role": "assistant", "content": "abc"}], "abcd", "abc", ""]
    with served(app_of(engine(log), name="j")) as url:
        reward = trl_reward(url, k=2, seed=1, reference_column="answer")
        assert inspect.iscoroutinefunction(reward)
        rewards = asyncio.run(reward(prompts=prompts, completions=completions, answer=["ref"] * 5, completion_ids=[]))
    # a single response is scored 0 or 1 by this judge's template, and a length of 3 is out of that range
    assert rewards == [2.0, None, 5.0, None, 1.0 + len("(no text)")]
    groups = [p for p in log.prompts if "Query: one" in p]
    assert len(groups) == 2
    assert all("[Response 3]" in p and "Reference: ref" in p for p in groups)


def test_many_completions_are_judged_in_chunks_on_one_scale():
    log = Log()
    completions = ["x" * (i % 9) + "y" for i in range(20)]

    async def run(url):
        async with AsyncJudgeClient(url) as client:
            return await cohort_rewards(client, [((QUERY[0],), "")] * 20, completions, max_cohort=6, k=1)

    with served(app_of(engine(log))) as url:
        rewards = asyncio.run(run(url))
    assert rewards == pytest.approx([1 + len(c) for c in completions])
    assert max(int(p) for text in log.prompts for p in re.findall(r"\[Response (\d+)\]", text)) == 6


def test_a_large_batch_asks_for_no_more_than_a_server_holds():
    app, counts = FastAPI(), {"now": 0, "most": 0}

    @app.middleware("http")
    async def count(asked, call_next):
        counts["now"] += 1
        counts["most"] = max(counts.values())
        await asyncio.sleep(0.01)
        reply = await call_next(asked)
        counts["now"] -= 1
        return reply

    app.mount("/", app_of(engine(Log())))
    with served(app) as url:
        prompts = [f"q{i // 2}" for i in range(160)]
        rewards = asyncio.run(trl_reward(url, k=1)(prompts=prompts, completions=["a", "aa"] * 80))
    assert rewards == [2.0, 3.0] * 80
    assert 1 < counts["most"] <= MAX_UNDER_WAY


def test_completions_that_are_too_long_together_are_judged_in_smaller_chunks():
    def judge(asked):
        if len(asked.messages[0].content) > 150:
            raise TooLongError("a prompt of 99 tokens")
        return by_length(asked)

    with served(app_of(engine(judge))) as url:
        completions = ["a", "aaaa", "a" * 500, "aa", "aaa", "aaaaaa"]
        rewards = asyncio.run(trl_reward(url, k=1)(prompts=["q"] * 6, completions=completions))
        assert rewards == [2.0, 5.0, None, 3.0, 4.0, 7.0]
        assert asyncio.run(trl_reward(url, k=1)(prompts=["q"], completions=["a" * 500])) == [None]


def test_verl_gets_scores_and_nan():
    infos = [{"question": "one"}, {"question": "sad"}, {"question": [{"role": "user", "content": "one"}]}]
    with served(app_of(engine(Log(bad="sad")))) as url:
        rows = verl_reward(
            data_sources=["d"] * 3, solution_strs=["a", "ab", "abc"], ground_truths=["", "", ""], extra_infos=infos,
            base_url=url, k=1,
        )  # fmt: skip
    assert [(row["score"], row["judge_failed"]) for row in rows[::2]] == [(2.0, 0.0), (4.0, 0.0)]
    assert math.isnan(rows[1]["score"])
    assert rows[1]["judge_failed"] == 1.0
    with pytest.raises(KeyError, match="question"):
        verl_reward(["d"], ["a"], [None], [{}])


def test_a_mistake_of_the_set_up_is_raised_and_a_lost_server_is_masked(no_wait):
    with served(app_of(engine(Log()))) as url, pytest.raises(ServerError, match="k: must be"):
        asyncio.run(trl_reward(url, k=0)(prompts=["q"], completions=["a"]))
    assert asyncio.run(trl_reward("http://127.0.0.1:1", k=1)(prompts=["q"], completions=["a"])) == [None]
