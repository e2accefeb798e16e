"""Clients of `POST /v1/judge`, synchronous and asynchronous. Busy servers and lost connections are tried again.

Reward functions for trainers, which stand on these, are in rewards.py.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack

import httpx
from pydantic import ValidationError

from spct_ray.errors import SpctError
from spct_ray.records import Message
from spct_ray.serve.schema import BatchAnswer, BatchResult, ErrorAnswer, Fault, JudgeAnswer, Tally

_WORTH_ANOTHER_TRY = {429, 502, 503, 504}
_LONGEST_WAIT_S = 30.0


class Options(TypedDict, total=False):
    """What a request may set beside the query and the responses; see `schema.JudgeRequest`."""

    k: int | Literal["auto"]
    k_meta: int
    temperature: float
    seed: int
    reference: str
    principles: str
    budget: dict[str, int]


class ServerError(SpctError):
    """The server refused or failed: HTTP status, the error's type and the message that it sent."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(f"HTTP {status} ({kind}): {message}")
        self.status = status
        self.kind = kind


class JudgeClient:
    """`with JudgeClient("http://127.0.0.1:8000") as client: client.judge(messages, responses, k=8).winner`.

    Calls raise ServerError for any status but 200, httpx.TransportError when no server answers, both after
    `max_attempts` where another try may help.
    """

    def __init__(self, base_url: str, api_key: str = "", timeout_s: float = 150.0, max_attempts: int = 4) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s, headers=_headers(api_key))
        self._max_attempts = max_attempts

    def judge(self, messages: Sequence[Message], responses: Sequence[str], **options: Unpack[Options]) -> JudgeAnswer:
        """The verdict on one query's responses."""
        return JudgeAnswer.model_validate_json(self._post("/v1/judge", request(messages, responses, **options)))

    def judge_batch(self, requests: Sequence[dict[str, Any]]) -> list[BatchResult]:
        """Verdicts (or errors) on many queries, in order; `request(...)` makes each."""
        reply = self._post("/v1/judge/batch", {"requests": list(requests)})
        return BatchAnswer.model_validate_json(reply).results

    def stream(
        self, messages: Sequence[Message], responses: Sequence[str], **options: Unpack[Options]
    ) -> Iterator[Tally | JudgeAnswer]:
        """Each judgement as it comes, and the verdict as the last. It is not tried again."""
        body = request(messages, responses, **options) | {"stream": True}
        with self._http.stream("POST", "/v1/judge", json=body) as reply:
            if reply.status_code != 200:
                reply.read()
                raise _error(reply)
            yield from _Events().feed_all(reply.iter_lines())

    def close(self) -> None:
        self._http.close()

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        for wait_s in (*_waits(self._max_attempts), None):
            try:
                reply = self._http.post(path, json=body)
            except httpx.TransportError:
                if wait_s is None:
                    raise
            else:
                if reply.status_code == 200:
                    return reply.content
                if wait_s is None or reply.status_code not in _WORTH_ANOTHER_TRY:
                    raise _error(reply)
                wait_s = _told(reply, wait_s)
            time.sleep(wait_s)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class AsyncJudgeClient:
    """As JudgeClient, for `async with`; one client may have any number of calls under way in one event loop."""

    def __init__(self, base_url: str, api_key: str = "", timeout_s: float = 150.0, max_attempts: int = 4) -> None:
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=base_url, timeout=timeout_s, headers=_headers(api_key), limits=limits)
        self._max_attempts = max_attempts

    async def judge(
        self, messages: Sequence[Message], responses: Sequence[str], **options: Unpack[Options]
    ) -> JudgeAnswer:
        """The verdict on one query's responses."""
        return JudgeAnswer.model_validate_json(await self._post("/v1/judge", request(messages, responses, **options)))

    async def judge_batch(self, requests: Sequence[dict[str, Any]]) -> list[BatchResult]:
        """Verdicts (or errors) on many queries, in order; `request(...)` makes each."""
        reply = await self._post("/v1/judge/batch", {"requests": list(requests)})
        return BatchAnswer.model_validate_json(reply).results

    async def stream(
        self, messages: Sequence[Message], responses: Sequence[str], **options: Unpack[Options]
    ) -> AsyncIterator[Tally | JudgeAnswer]:
        """Each judgement as it comes, and the verdict as the last. It is not tried again."""
        body = request(messages, responses, **options) | {"stream": True}
        async with self._http.stream("POST", "/v1/judge", json=body) as reply:
            if reply.status_code != 200:
                await reply.aread()
                raise _error(reply)
            events = _Events()
            async for line in reply.aiter_lines():
                if (event := events.feed(line)) is not None:
                    yield event

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _post(self, path: str, body: dict[str, Any]) -> bytes:
        for wait_s in (*_waits(self._max_attempts), None):
            try:
                reply = await self._http.post(path, json=body)
            except httpx.TransportError:
                if wait_s is None:
                    raise
            else:
                if reply.status_code == 200:
                    return reply.content
                if wait_s is None or reply.status_code not in _WORTH_ANOTHER_TRY:
                    raise _error(reply)
                wait_s = _told(reply, wait_s)
            await asyncio.sleep(wait_s)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()


def request(messages: Sequence[Message], responses: Sequence[str], **options: Unpack[Options]) -> dict[str, Any]:
    """The body of a request, as for `POST /v1/judge`."""
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return {"messages": turns, "responses": list(responses), **options}


class _Events:
    """Puts the lines of a stream of server-sent events together."""

    def __init__(self) -> None:
        self._kind = ""

    def feed(self, line: str) -> Tally | JudgeAnswer | None:
        """What the line completes, if anything. Raises ServerError for an `error` event."""
        name, _, value = line.partition(": ")
        if name == "event":
            self._kind = value
        if name != "data":
            return None
        if self._kind == "sample":
            return Tally.model_validate_json(value)
        if self._kind == "verdict":
            return JudgeAnswer.model_validate_json(value)
        fault = Fault.model_validate_json(value)
        raise ServerError(200, fault.type, fault.message)

    def feed_all(self, lines: Iterator[str]) -> Iterator[Tally | JudgeAnswer]:
        for line in lines:
            if (event := self.feed(line)) is not None:
                yield event


def _headers(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _error(reply: httpx.Response) -> ServerError:
    try:
        fault = ErrorAnswer.model_validate_json(reply.content).error
    except ValidationError:  # from what stands before our gateway: Serve's proxy, another proxy
        return ServerError(reply.status_code, "http", reply.text)
    return ServerError(reply.status_code, fault.type, fault.message)


def _waits(max_attempts: int) -> list[float]:
    """Seconds to wait before each attempt but the first: doubling, with jitter so that clients do not come at once."""
    return [min(2.0**attempt, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0) for attempt in range(max_attempts - 1)]


def _told(reply: httpx.Response, default_s: float) -> float:
    """Seconds that the server asks to wait (Retry-After, with jitter), else the default."""
    value = reply.headers.get("retry-after", "")
    return min(float(value), _LONGEST_WAIT_S) * random.uniform(1.0, 1.5) if value.isdecimal() else default_s
