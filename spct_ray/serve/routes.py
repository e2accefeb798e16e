"""The HTTP routes of a Gateway, for any ASGI server. Judging is in gateway.py, Ray in app.py.

Every error is JSON of one shape: {"error": {"type": ..., "message": ..., "details": [{"path": ..., "message": ...}]}}.
Work on a request ends when the server cancels it, as Ray Serve does when the client disconnects. Texts of requests are
never logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from spct_ray.errors import ConfigError, EngineError, RequestError, SpctError, TooLongError
from spct_ray.judge.cohort import chunks, gather_or_cancel, score_groups
from spct_ray.serve import schema
from spct_ray.serve.gateway import Gateway
from spct_ray.serve.ledger import CONTENT_TYPE, Ledger, RateLimited, verdict_events
from spct_ray.serve.schema import Fault, InvalidRequest

RETRY_AFTER_S = 5
CLIENT_GONE = 499  # nobody receives it, but the metrics count it

Work = Callable[[Request], Coroutine[Any, Any, Response]]


class Unauthorized(SpctError):
    """A request without a valid API key."""


_FAULTS: dict[type[Exception], tuple[int, str, str]] = {  # the first that fits: status, type, what it means
    Unauthorized: (401, "unauthorized", "Wrong or missing API key."),
    TooLongError: (413, "too_long", "Too long; the message has the numbers."),
    InvalidRequest: (422, "invalid_request", "Malformed; `details` has the path of each fault."),
    RequestError: (422, "refused", "Malformed, or refused by the model's tokenizer; `details` has the paths."),
    RateLimited: (429, "rate_limited", "Rate limit of this client; see Retry-After."),
    EngineError: (503, "unavailable", "The service is overloaded or damaged; see Retry-After."),
    TimeoutError: (504, "timeout", "No verdict in time."),
}


def build_app(gateway: Gateway, ledger: Ledger, judge_is_ready: Callable[[], Awaitable[bool]]) -> FastAPI:
    """The routes. Raises ConfigError when the API key's environment variable is not set."""
    config, service = gateway.config, _Service(gateway, ledger)
    app = FastAPI(title="spct-ray", description=f"Verdicts of the judge {config.name!r}.")

    class Guarded(APIRoute):
        """Checks key and size before FastAPI reads the body, and counts."""

        def get_route_handler(self) -> Work:
            return partial(service.guard, self.path, super().get_route_handler())

    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": schema.ErrorAnswer, "description": meaning} for status, _, meaning in _FAULTS.values()
    }
    router = APIRouter(route_class=Guarded, responses=errors)
    router.post("/v1/judge", response_model=schema.JudgeAnswer)(service.judge)
    router.post("/v1/judge/batch")(service.judge_batch)
    router.post("/v1/rerank", response_model_exclude_none=True)(service.rerank)
    router.post("/v1/reward")(service.reward)
    app.include_router(router)

    @app.get("/v1/models", dependencies=[Depends(service.check_key)])
    async def models() -> Any:
        served = [(config.name, "judge"), *([("meta", "meta")] if gateway.meta else [])]
        model = {"object": "model", "created": 0, "owned_by": "spct-ray"}
        return {"object": "list", "data": [{"id": name, **model, "role": role} for name, role in served]}

    @app.get("/healthz")
    async def healthz() -> Any:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Any:
        if not await judge_is_ready():
            raise EngineError("no judge replica is running")
        return {"status": "ok"}

    @app.get("/metrics", dependencies=[Depends(service.check_key)])
    async def metrics() -> Response:
        return Response(await ledger.exposition(), media_type=CONTENT_TYPE)

    @app.exception_handler(HTTPException)
    @app.exception_handler(SpctError)
    async def refused(_: Request, error: Exception) -> Response:
        return service.refusal(error)

    return app


class _Service:
    """The handlers of the POST routes, and the checks before them."""

    def __init__(self, gateway: Gateway, ledger: Ledger) -> None:
        self._gateway, self._ledger, self._config = gateway, ledger, gateway.config
        self._keys: list[str] = []
        if variable := self._config.api_key_env:
            self._keys = os.environ.get(variable, "").split()
            if not self._keys:
                raise ConfigError(f"the environment variable {variable} (api_key_env) is not set")
        gateway.on_verdict = lambda answer: ledger.record(verdict_events(answer))

    async def guard(self, path: str, work: Work, request: Request) -> Response:
        """The answer of `work` to a request that passes the checks, else the error's answer."""
        started, status = time.perf_counter(), 500
        self._ledger.record([("in_flight", (), 1)])
        try:
            try:
                self.check_key(request)
                response = await work(await _with_body(request, self._config.max_body_bytes))
            except Exception as error:
                response = self.refusal(error)
            status = response.status_code
            return response
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        finally:
            seconds = time.perf_counter() - started
            self._ledger.record(
                [("in_flight", (), -1), ("requests", (path, str(status)), 1), ("seconds", (path,), seconds)]
            )

    def check_key(self, request: Request) -> None:
        """Raises Unauthorized. Keys are compared in constant time."""
        given = request.headers.get("authorization", "").encode("latin-1")  # the bytes as they came
        if self._keys and not any(hmac.compare_digest(given, f"Bearer {key}".encode()) for key in self._keys):
            raise Unauthorized("send the API key as `Authorization: Bearer KEY`")

    async def judge(self, body: schema.JudgeRequest, request: Request) -> Any:
        """The verdict on one query's responses; with `stream`, server-sent events that end with it."""
        await self._charge(request, (body.k, 1))
        if body.stream:
            return StreamingResponse(self._events(body), media_type="text/event-stream")
        return await self._gateway.answer(body)

    async def judge_batch(self, body: schema.BatchRequest, request: Request) -> schema.BatchAnswer:
        """Verdicts on many queries, each with an outcome of its own."""

        async def one(single: schema.JudgeRequest) -> schema.BatchResult:
            try:
                async with self._gateway.parts:
                    return schema.BatchResult(answer=await self._gateway.answer(single))
            except Exception as error:
                return schema.BatchResult(error=self._fault(error)[1])

        await self._charge(request, *((single.k, 1) for single in body.requests))
        return schema.BatchAnswer(results=await gather_or_cancel(map(one, body.requests)))

    async def rerank(self, body: schema.RerankRequest, request: Request) -> schema.RerankAnswer:
        """Documents, best first, in the format of Jina's and Cohere's rerankers."""
        texts = body.documents
        await self._charge(request, (body.k, len(texts)))
        cohort = await self._gateway.cohort(body, body.query, texts)
        failed = [i for i, score in enumerate(cohort.scores) if math.isnan(score)]
        ranked = sorted(set(range(len(texts))) - set(failed), key=lambda i: (-cohort.scores[i], i))
        if not ranked:
            raise EngineError("the judge gave no usable judgement; try again")
        results = [
            schema.RerankResult(
                index=i,
                relevance_score=cohort.shares[i],
                document={"text": texts[i]} if body.return_documents else None,
            )
            for i in ranked[: body.top_n]
        ]
        return schema.RerankAnswer(
            id=str(uuid.uuid4()),
            model=self._config.name,
            results=results,
            usage={"total_tokens": cohort.tokens},
            meta={"failed": failed},
        )

    async def reward(self, body: schema.RewardRequest, request: Request) -> schema.RewardAnswer:
        """Rewards of completions, in the format of OpenRLHF's remote reward models."""
        labels = [label if isinstance(label, str) else "" for label in body.labels or [""] * len(body.prompts)]
        keys = list(zip(body.prompts, labels, strict=True))
        await self._charge(request, *((body.k, num) for num in Counter(keys).values()))
        shares = [math.nan] * len(keys)

        async def score(key: tuple[str, str], members: list[int]) -> list[float]:
            prompt, label = key
            completions = [
                body.query[i].partition(prompt)[2] if prompt in body.query[i] else body.query[i] for i in members
            ]
            cohort = await self._gateway.cohort(body, prompt, completions, reference=label)
            for i, share in zip(members, cohort.shares, strict=True):
                shares[i] = share
            return cohort.scores

        rewards = await score_groups(keys, score)
        failed = [float(math.isnan(r)) for r in rewards]
        return schema.RewardAnswer(rewards=rewards, scores=shares, extra_logs={"judge_failed": failed})

    def refusal(self, error: Exception) -> Response:
        """The answer to a request that failed; unexpected errors are raised again."""
        status, fault = self._fault(error)
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if status in (429, 503):
            headers["Retry-After"] = str(getattr(error, "retry_after_s", RETRY_AFTER_S))
        return JSONResponse(schema.ErrorAnswer(error=fault).model_dump(), status_code=status, headers=headers)

    def _fault(self, error: Exception) -> tuple[int, Fault]:
        if isinstance(error, RequestValidationError):
            error = InvalidRequest.of(error.errors())
        elif isinstance(error, HTTPException) and error.status_code == 400:  # FastAPI could not read the body
            error = InvalidRequest([{"path": "body", "message": "Invalid JSON: nested too deep, or not in Unicode"}])
        elif isinstance(error, HTTPException):  # no such route or method
            return error.status_code, Fault(type="http", message=str(error.detail))
        entry = next((entry for kind, entry in _FAULTS.items() if isinstance(error, kind)), None)
        if entry is None:
            raise error
        status, kind, _ = entry
        message, details = str(error), error.details if isinstance(error, InvalidRequest) else []
        if isinstance(error, TimeoutError):
            limit_s = self._config.judge_timeout_s
            message = f"no verdict within {limit_s:g} s or the budget; ask for a lower k"
        elif kind == "refused":
            details = [{"path": "body", "message": message}]
        return status, Fault(type=kind, message=message, details=details)

    async def _charge(self, request: Request, *costs: tuple[int | Literal["auto"], int]) -> None:
        """Raises RateLimited. `costs`: the k of each prompt or cohort, with its number of responses."""
        config = self._config
        key = request.headers["authorization"] if config.api_key_env else request.client.host if request.client else ""
        judgements = sum(
            (config.k_auto_max if k == "auto" else k) * len(chunks(n, config.max_cohort)) for k, n in costs
        )
        if wait_s := await self._ledger.take(hashlib.sha256(key.encode()).hexdigest(), judgements):
            raise RateLimited(config.judgements_per_minute, wait_s)

    async def _events(self, body: schema.JudgeRequest) -> AsyncIterator[bytes]:
        """Server-sent events: `sample` for each judgement with the tally so far, then `verdict` or `error`."""
        queue: asyncio.Queue[schema.Tally | None] = asyncio.Queue()
        work = asyncio.create_task(self._gateway.answer(body, queue.put_nowait))
        work.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (tally := await queue.get()) is not None:
                yield _event("sample", tally)
            yield _event("verdict", await work)
        except Exception as error:  # the status is already sent, so the last event has the error
            yield _event("error", self._fault(error)[1])
        finally:
            work.cancel()


def _event(kind: str, data: BaseModel) -> bytes:
    """In ASCII, because some clients treat U+2028 as the end of a line. FastAPI's own formatter, not sse-starlette's,
    which logs the text of every event at level DEBUG."""
    return format_sse_event(event=kind, data_str=data.model_dump_json(ensure_ascii=True))


async def _with_body(request: Request, limit: int) -> Request:
    """The request with its body read, which counts as JSON whatever its content type (curl's default is a form).
    Raises TooLongError."""
    declared, content = request.headers.get("content-length", "")[:20], bytearray()
    async for chunk in request.stream():
        content += chunk
        size = max(len(content), int(declared) if declared.isdecimal() else 0)
        if size > limit:
            raise TooLongError(f"a body of {size} bytes or more exceeds the limit of {limit}; send shorter texts")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(content)}

    headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
    return Request({**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}, receive)
