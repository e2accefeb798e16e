"""Synchronous and asynchronous clients of the service; rewards.py builds reward functions for trainers on them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Literal, TypedDict, TypeVar, Unpack
from urllib.request import getproxies, proxy_bypass

import httpx
from httpx_retries import Retry, RetryTransport
from httpx_sse import ServerSentEvent, aconnect_sse, connect_sse
from pydantic import BaseModel, ValidationError

from spct_ray.errors import SpctError
from spct_ray.records import Message
from spct_ray.serve.schema import BatchAnswer, BatchResult, ErrorAnswer, Fault, JudgeAnswer, Tally

_LONGEST_WAIT_S = 30.0

Answer = TypeVar("Answer", bound=BaseModel)


class Options(TypedDict, total=False):
    """Optional fields of a request, see `schema.JudgeRequest`."""

    k: int | Literal["auto"]
    k_meta: int
    temperature: float
    seed: int
    reference: str
    principles: str
    budget: dict[str, int]


class ServerError(SpctError):
    """The server refused or failed: HTTP status, type of the error and the server's message."""

    def __init__(self, status: int, fault: Fault) -> None:
        super().__init__(f"HTTP {status} ({fault.type}): {fault.message}")
        self.status, self.kind = status, fault.type


class JudgeClient(AbstractContextManager["JudgeClient"]):
    """`with JudgeClient("http://127.0.0.1:8000") as client: client.judge(messages, responses, k=8).winner`.

    Calls retry when the server is busy (429, 502, 503, 504; waiting as `Retry-After` says) or the connection is lost,
    up to `max_attempts` in all. They raise ServerError for any status but 200, and httpx.TransportError when no server
    answers. A stream is retried only until it begins.
    """

    def __init__(self, base_url: str, api_key: str = "", timeout_s: float = 150.0, max_attempts: int = 4) -> None:
        transport = RetryTransport(httpx.HTTPTransport(proxy=_proxy(base_url)), _retry(max_attempts))
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s, headers=_key(api_key), transport=transport)

    def judge(self, messages: Sequence[Message], responses: Sequence[str], **options: Unpack[Options]) -> JudgeAnswer:
        """The verdict on one query's responses."""
        return _read(self._http.post("/v1/judge", json=request(messages, responses, **options)), JudgeAnswer)

    def judge_batch(self, requests: Sequence[dict[str, Any]]) -> list[BatchResult]:
        """Verdicts (or errors) on many queries, in order; `request(...)` makes each."""
        return _read(self._http.post("/v1/judge/batch", json={"requests": list(requests)}), BatchAnswer).results

    def stream(
        self, messages: Sequence[Message], responses: Sequence[str], **options: Unpack[Options]
    ) -> Iterator[Tally | JudgeAnswer]:
        """Each judgement as it arrives, and finally the verdict."""
        body = request(messages, responses, **options) | {"stream": True}
        with connect_sse(self._http, "POST", "/v1/judge", json=body) as source:
            if source.response.status_code != 200:
                source.response.read()
                _read(source.response, ErrorAnswer)
            yield from map(_event, source.iter_sse())

    def close(self) -> None:
        self._http.close()

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncJudgeClient(AbstractAsyncContextManager["AsyncJudgeClient"]):
    """Like JudgeClient, for `async with`; one client may have any number of concurrent calls in one event loop."""

    def __init__(self, base_url: str, api_key: str = "", timeout_s: float = 150.0, max_attempts: int = 4) -> None:
        limits = httpx.Limits(max_connections=None)
        unlimited = httpx.AsyncHTTPTransport(limits=limits, proxy=_proxy(base_url))
        transport = RetryTransport(unlimited, _retry(max_attempts))
        self._http = httpx.AsyncClient(base_url=base_url, timeout=timeout_s, headers=_key(api_key), transport=transport)

    async def judge(
        self, messages: Sequence[Message], responses: Sequence[str], **options: Unpack[Options]
    ) -> JudgeAnswer:
        """The verdict on one query's responses."""
        return _read(await self._http.post("/v1/judge", json=request(messages, responses, **options)), JudgeAnswer)

    async def judge_batch(self, requests: Sequence[dict[str, Any]]) -> list[BatchResult]:
        """Verdicts (or errors) on many queries, in order; `request(...)` makes each."""
        return _read(await self._http.post("/v1/judge/batch", json={"requests": list(requests)}), BatchAnswer).results

    async def stream(
        self, messages: Sequence[Message], responses: Sequence[str], **options: Unpack[Options]
    ) -> AsyncIterator[Tally | JudgeAnswer]:
        """Each judgement as it arrives, and finally the verdict."""
        body = request(messages, responses, **options) | {"stream": True}
        async with aconnect_sse(self._http, "POST", "/v1/judge", json=body) as source:
            if source.response.status_code != 200:
                await source.response.aread()
                _read(source.response, ErrorAnswer)
            async for event in source.aiter_sse():
                yield _event(event)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


def request(messages: Sequence[Message], responses: Sequence[str], **options: Unpack[Options]) -> dict[str, Any]:
    """The body of a request, as for `POST /v1/judge`."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return {"messages": turns, "responses": list(responses), **options}


class _Jittered(Retry):
    """Spreads out clients that the server told to retry at the same time."""

    def parse_retry_after(self, retry_after: str) -> float:
        return super().parse_retry_after(retry_after) * random.uniform(1.0, 1.5)


def _retry(max_attempts: int) -> Retry:
    return _Jittered(
        total=max_attempts - 1,
        allowed_methods=["POST"],
        retry_on_exceptions=[httpx.TransportError],
        backoff_factor=0.5,
        backoff_jitter=0.5,
        max_backoff_wait=_LONGEST_WAIT_S,
    )


def _proxy(base_url: str) -> str | None:
    """The environment's proxy for the server, which httpx ignores when it is given a transport."""
    url = httpx.URL(base_url)
    return None if proxy_bypass(url.host) else getproxies().get(url.scheme)


def _key(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _read(reply: httpx.Response, answer: type[Answer]) -> Answer:
    """The body of a reply. Raises ServerError for any status but 200."""
    if reply.status_code == 200:
        return answer.model_validate_json(reply.content)
    try:
        fault = ErrorAnswer.model_validate_json(reply.content).error
    except ValidationError:  # from a proxy in front of the gateway
        fault = Fault(type="http", message=reply.text)
    raise ServerError(reply.status_code, fault)


def _event(event: ServerSentEvent) -> Tally | JudgeAnswer:
    """The content of a server-sent event. Raises ServerError for an `error` event."""
    if event.event == "error":
        raise ServerError(200, Fault.model_validate_json(event.data))
    return (Tally if event.event == "sample" else JudgeAnswer).model_validate_json(event.data)
