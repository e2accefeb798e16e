"""RemoteEngine against a real HTTP server on this machine."""

import json
import threading
from concurrent.futures import wait
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from spct_ray.engines.base import Request, SamplingParams
from spct_ray.engines.remote import RemoteConfig, RemoteEngine
from spct_ray.errors import ConfigError, EngineError, RequestError, TooLongError
from spct_ray.judge.parse import Failure, Scale, parse_scores
from spct_ray.records import Message

KEY = "sk-very-secret"


class Endpoint:
    """Answers chat completions; `script` holds answers (status, headers, body) to give first, in order."""

    def __init__(self):
        self.bodies, self.keys, self.script = [], [], []
        self.most_at_once = self._now = 0
        self.gate = threading.Barrier(1)
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, headers, answer = endpoint.answer(self.path, body, self.headers.get("authorization"))
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path, body, key):
        with self._lock:
            self.bodies.append(body)
            self.keys.append(key)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            scripted = self.script.pop(0) if self.script else None
        self.gate.wait()
        with self._lock:
            self._now -= 1
        if scripted:
            return scripted
        text = f"{body['messages'][-1]['content']} #0"
        choices = [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]
        return 200, {}, {"choices": choices, "usage": {"prompt_tokens": 11, "completion_tokens": 7}}


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def engine_on(endpoint, **changes):
    return RemoteEngine(RemoteConfig(endpoint.url, "grm", **{"first_wait_s": 0.001, "max_attempts": 3, **changes}))


def ask(text, **params):
    return Request((Message("system", "Be strict."), Message("user", text)), SamplingParams(max_tokens=50, **params))


def test_request_and_answer(endpoint, monkeypatch):
    monkeypatch.setenv("GRM_KEY", KEY)
    engine = engine_on(endpoint, api_key_env="GRM_KEY")
    (completions,) = engine.generate([ask("judge", temperature=0.5, seed=3)])
    engine.close()
    assert [(c.text, c.stop_reason, c.prompt_tokens, c.completion_tokens, c.token_ids) for c in completions] == [
        ("judge #0", "stop", 11, 7, ())
    ]
    assert endpoint.keys == [f"Bearer {KEY}"]
    assert endpoint.bodies == [
        {
            "model": "grm",
            "messages": [{"role": "system", "content": "Be strict."}, {"role": "user", "content": "judge"}],
            "max_tokens": 50,
            "temperature": 0.5,
            "seed": 3,
        }
    ]


def test_a_thought_under_its_own_name_is_told_apart(endpoint):
    told = {"content": "\\boxed{9, 1}", "reasoning_content": "hm"}
    for message in (told, {"content": None, "reasoning": "hm, \\boxed{1, 9}"}):
        choices = [{"index": 0, "message": message, "finish_reason": "length"}]
        endpoint.script.append((200, {}, {"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}))
    engine = engine_on(endpoint, concurrency=1)
    texts = [c.text for (c,) in engine.generate([ask("x"), ask("y")])]
    engine.close()
    assert texts == ["<think>hm</think>\n\\boxed{9, 1}", "<think>hm, \\boxed{1, 9}"]
    assert parse_scores(texts[0], 2, Scale(1, 10), "length") == (9, 1)
    assert parse_scores(texts[1], 2, Scale(1, 10), "length") is Failure.TRUNCATED_THINKING


def test_order_is_kept_and_concurrency_bounded(endpoint):
    endpoint.gate = threading.Barrier(4)  # each answer waits until four are asked: fewer in flight would hang
    engine = engine_on(endpoint, concurrency=4)
    results = engine.generate([ask(str(i)) for i in range(24)])
    engine.close()
    assert [c.text for (c,) in results] == [f"{i} #0" for i in range(24)]
    assert endpoint.most_at_once == 4


@pytest.mark.parametrize(
    "first_answers",
    [
        [(429, {"retry-after": "0"}, {}), (503, {}, b"busy")],
        [(500, {"retry-after": format_datetime(datetime.now(UTC) - timedelta(seconds=9), usegmt=True)}, {})],
    ],
)
def test_busy_answers_are_tried_again(endpoint, first_answers):
    endpoint.script = list(first_answers)
    engine = engine_on(endpoint)
    assert engine.generate([ask("x")])[0][0].text == "x #0"
    engine.close()
    assert len(endpoint.bodies) == len(first_answers) + 1
    assert all(body == endpoint.bodies[0] for body in endpoint.bodies)


@pytest.mark.parametrize(
    ("answer", "error", "message", "num_asked"),
    [
        ((429, {"retry-after": "0"}, {"error": "slow down"}), EngineError, "after 3 attempts.*429.*slow down", 3),
        ((400, {}, {"error": "prompt has 9000 tokens"}), RequestError, "refuses.*400.*9000 tokens", 1),
        ((400, {}, {"error": "maximum context length is 99"}), TooLongError, "refuses.*context length is 99", 1),
        ((401, {}, {"error": "who are you"}), EngineError, "401.*api_key_env", 1),
        ((401, {}, {"error": f"bad key {KEY}"}), EngineError, r"bad key \*\*\*", 1),
        ((200, {}, f"your {KEY}?".encode()), EngineError, r"not JSON: your \*\*\*", 1),
        ((404, {}, {"error": "no such model"}), EngineError, "404.*check base_url, model", 1),
        ((200, {}, b"<html>"), EngineError, "not JSON: <html>", 1),
        ((200, {}, {"choices": []}), EngineError, "usage", 1),
        (
            (200, {}, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}),
            EngineError,
            "not an answer.*not enough values",
            1,
        ),
    ],
)
def test_failures_say_what_happened_and_never_the_key(endpoint, monkeypatch, caplog, answer, error, message, num_asked):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("GRM_KEY", KEY)
    endpoint.script = [answer] * num_asked
    engine = engine_on(endpoint, api_key_env="GRM_KEY")
    with pytest.raises(error, match=message) as caught:
        engine.generate([ask("x")])
    engine.close()
    assert len(endpoint.bodies) == num_asked
    assert KEY not in str(caught.value) + caplog.text


def test_no_server(endpoint):
    engine = RemoteEngine(RemoteConfig("http://127.0.0.1:9/v1", "grm", max_attempts=2, first_wait_s=0.001))
    with pytest.raises(EngineError, match=r"127.0.0.1:9.* after 2 attempts, the last: ConnectError"):
        engine.generate([ask("x")])
    engine.close()


def test_close_ends_waiting_requests(endpoint):
    endpoint.script = [(503, {"retry-after": "60"}, {})] * 4
    asked = threading.Semaphore(0)
    endpoint.gate = threading.Barrier(2, action=asked.release)
    engine = engine_on(endpoint, concurrency=2)
    futures = [engine.submit(ask(str(i))) for i in range(6)]
    asked.acquire()  # two are about to wait a minute, the others wait for them
    engine.close()
    wait(futures)
    for future in futures:
        with pytest.raises(EngineError, match="closed"):
            future.result()
    with pytest.raises(EngineError, match="closed"):
        engine.submit(ask("late"))


def test_what_an_endpoint_cannot_do(endpoint):
    engine = engine_on(endpoint)
    with pytest.raises(RequestError, match="not supported by a remote endpoint"):
        engine.reload("weights", 1)
    with pytest.raises(RequestError, match="not supported by a remote endpoint"):
        engine.prompt_logprobs([[1]])
    for params in ({"guide": "a+"}, {"logprobs": True}, {"n": 2}):
        with pytest.raises(RequestError, match="not supported by a remote endpoint"):
            engine.generate([ask("x", **params)])
    engine.close()
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        engine_on(endpoint, api_key_env="NO_SUCH_KEY")
