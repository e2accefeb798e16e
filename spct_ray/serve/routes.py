"""The HTTP routes around a Gateway, for any ASGI server. Leaves out judging (gateway.py) and Ray (app.py).

Every error is JSON of one shape: {"error": {"type": ..., "message": ..., "details": [{"path": ..., "message": ...}]}}.
A client that goes away ends the work on its request. Texts of requests are never logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from spct_ray.errors import ConfigError, EngineError, RequestError, TooLongError
from spct_ray.judge.cohort import chunks
from spct_ray.records import Item, Message
from spct_ray.serve.gateway import Gateway, Plan
from spct_ray.serve.limits import RateLimited, RateLimiter
from spct_ray.serve.metrics import CONTENT_TYPE, Metrics
from spct_ray.serve.schema import (
    BatchAnswer,
    BatchRequest,
    BatchResult,
    ErrorAnswer,
    Fault,
    InvalidRequest,
    JudgeAnswer,
    JudgeRequest,
    Tally,
    parse,
)
from spct_ray.serve.wire import RerankAnswer, RerankRequest, RerankResult, RewardAnswer, RewardRequest

RETRY_AFTER_S = 5
CLIENT_GONE = 499  # nobody reads it; the metrics count it
_BODIES: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
    "/v1/judge": (JudgeRequest, JudgeAnswer),
    "/v1/judge/batch": (BatchRequest, BatchAnswer),
    "/v1/rerank": (RerankRequest, RerankAnswer),
    "/v1/reward": (RewardRequest, RewardAnswer),
}
_FAULTS = {
    str(status): {
        "description": words,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}},
    }
    for status, words in (
        (401, "Another API key, or none."),
        (413, "Too long; the message has the numbers."),
        (422, "Not a request that can be judged; `details` has the path of each fault."),
        (429, "You ask too fast; see Retry-After."),
        (503, "The service is full or hurt; see Retry-After."),
        (504, "No verdict in time."),
    )
}

Handler = Callable[[Request, bytes], Coroutine[Any, Any, Response]]


def build_app(gateway: Gateway, judge_is_ready: Callable[[], Awaitable[bool]]) -> FastAPI:
    """The routes. Raises ConfigError when the API key's environment variable is not set."""
    config = gateway.config
    app = FastAPI(title="spct-ray", description=f"Verdicts of the judge {config.name!r}.")
    metrics = Metrics(config.name)
    gateway.on_verdict = metrics.verdict
    is_allowed = _key_check(config.api_key_env)
    limiter = RateLimiter(config.judgements_per_minute)

    def charge(request: Request, *asked: tuple[int | Literal["auto"], int]) -> None:
        """Raises RateLimited. `asked`: the k of each prompt or cohort, with its number of responses."""
        address = request.client.host if request.client else ""
        limiter.take(
            request.headers["authorization"] if config.api_key_env else address,
            sum((config.k_auto_max if k == "auto" else k) * len(chunks(n, config.max_cohort)) for k, n in asked),
        )

    async def judge(request: Request, body: bytes) -> Response:
        asked = parse(JudgeRequest, body)
        charge(request, (asked.k, 1))
        if asked.stream:
            return StreamingResponse(_events(gateway, asked), media_type="text/event-stream")
        return _json(await gateway.answer(asked))

    async def judge_batch(request: Request, body: bytes) -> Response:
        async def one(asked: JudgeRequest) -> BatchResult:
            try:
                return BatchResult(answer=await gateway.part(lambda: gateway.answer(asked)))
            except Exception as error:  # each request of a batch has its own outcome
                return BatchResult(error=_fault(error, gateway)[1])

        batch = parse(BatchRequest, body).requests
        charge(request, *((asked.k, 1) for asked in batch))
        results = await asyncio.gather(*map(one, batch))
        return _json(BatchAnswer(results=results))

    async def rerank(request: Request, body: bytes) -> Response:
        asked = parse(RerankRequest, body)
        texts = asked.texts
        charge(request, (asked.k, len(texts)))
        item = Item("rerank", (Message("user", asked.query),), tuple(texts))
        cohort = await gateway.cohort(item, Plan(k=asked.k, seed=asked.seed))
        ranked = sorted(
            (i for i, score in enumerate(cohort.scores) if not math.isnan(score)), key=lambda i: -cohort.scores[i]
        )
        if not ranked:
            raise EngineError("the judge gave no usable judgement; try again")
        results = [
            RerankResult(
                index=i,
                relevance_score=cohort.shares[i],
                document={"text": texts[i]} if asked.return_documents else None,
            )
            for i in ranked[: asked.top_n]
        ]
        failed = [i for i, score in enumerate(cohort.scores) if math.isnan(score)]
        answer = RerankAnswer(
            id=str(uuid.uuid4()),
            model=config.name,
            results=results,
            usage={"total_tokens": cohort.tokens},
            meta={"failed": failed},
        )
        return JSONResponse(answer.model_dump(mode="json", exclude_none=True))

    async def reward(request: Request, body: bytes) -> Response:
        asked = parse(RewardRequest, body)
        groups: dict[tuple[str, str], list[int]] = {}
        for i, prompt in enumerate(asked.prompts):
            label = asked.labels[i] if asked.labels else None
            groups.setdefault((prompt, label if isinstance(label, str) else ""), []).append(i)
        charge(request, *((asked.k, len(members)) for members in groups.values()))
        rewards, scores = [math.nan] * len(asked.query), [math.nan] * len(asked.query)

        async def one(prompt: str, label: str, members: list[int]) -> None:
            item = Item(
                "reward",
                (Message("user", prompt),),
                tuple(_response(asked.query[i], prompt) for i in members),
                reference=label,
            )
            cohort = await gateway.cohort(item, Plan(k=asked.k, seed=asked.seed))
            for i, value, share in zip(members, cohort.scores, cohort.shares, strict=True):
                rewards[i], scores[i] = value, share

        await asyncio.gather(*(one(prompt, label, members) for (prompt, label), members in groups.items()))
        failed = [float(math.isnan(r)) for r in rewards]
        answer = RewardAnswer(rewards=rewards, scores=scores, extra_logs={"judge_failed": failed})
        # NaN is no JSON, but it is what the Python clients of this route read as "no reward".
        return Response(json.dumps(answer.model_dump()), media_type="application/json")

    def add(route: str, handler: Handler) -> None:
        async def respond(request: Request) -> Response:
            with metrics.request(route) as status:
                try:
                    if not is_allowed(request):
                        return _denied(status)
                    body = await _body(request, config.max_body_bytes)
                    response = await _while_connected(request, handler(request, body))
                except Exception as error:
                    code, fault = _fault(error, gateway)
                    response = _error(code, fault, error.retry_after_s if isinstance(error, RateLimited) else None)
                status.append(response.status_code)
                return response

        asked, answered = (model.__name__ for model in _BODIES[route])
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{asked}"}}}
        answers = {"application/json": {"schema": {"$ref": f"#/components/schemas/{answered}"}}}
        app.add_api_route(
            route,
            respond,
            methods=["POST"],
            name=route,
            description=_BODIES[route][0].__doc__,
            openapi_extra={
                "requestBody": {"content": content, "required": True},
                "responses": {"200": {"description": _BODIES[route][1].__doc__, "content": answers}, **_FAULTS},
            },
        )

    handlers = {"/v1/judge": judge, "/v1/judge/batch": judge_batch, "/v1/rerank": rerank, "/v1/reward": reward}
    for route, handler in handlers.items():
        add(route, handler)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if not is_allowed(request):
            return _denied([])
        served = [(config.name, "judge"), *([("meta", "meta")] if gateway.meta else [])]
        return JSONResponse(
            {
                "object": "list",
                "data": [
                    {"id": name, "object": "model", "created": 0, "owned_by": "spct-ray", "role": role}
                    for name, role in served
                ],
            }
        )

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> Response:
        if await judge_is_ready():
            return JSONResponse({"status": "ok"})
        return _error(503, Fault(type="unavailable", message="no judge replica is running"))

    @app.get("/metrics")
    async def exposition(request: Request) -> Response:
        return Response(metrics.exposition(), media_type=CONTENT_TYPE) if is_allowed(request) else _denied([])

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return _error(error.status_code, Fault(type="http", message=str(error.detail)))

    _describe(app)
    return app


def _describe(app: FastAPI) -> None:
    """Put the schemas of the bodies, which the routes parse themselves, into the OpenAPI document."""
    models: list[type[BaseModel]] = [ErrorAnswer, *(model for pair in _BODIES.values() for model in pair)]
    _, schemas = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
    )
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def _events(gateway: Gateway, asked: JudgeRequest) -> AsyncIterator[str]:
    """Server-sent events: `sample` for each judgement with the tally so far, then `verdict` or `error`."""
    queue: asyncio.Queue[Tally | None] = asyncio.Queue()
    work = asyncio.create_task(gateway.answer(asked, queue.put_nowait))
    work.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (tally := await queue.get()) is not None:
            yield _event("sample", tally)
        yield _event("verdict", await work)
    except Exception as error:  # the status is sent already; the last event tells what happened
        yield _event("error", _fault(error, gateway)[1])
    finally:
        work.cancel()


def _event(kind: str, data: BaseModel) -> str:
    """In ASCII: readers of lines (httpx's too) take U+2028 and others for the end of one."""
    return f"event: {kind}\ndata: {data.model_dump_json(ensure_ascii=True)}\n\n"


def _fault(error: Exception, gateway: Gateway) -> tuple[int, Fault]:
    """HTTP status and body of what went wrong; what we did not expect is raised again."""
    if isinstance(error, InvalidRequest):
        return 422, Fault(type="invalid_request", message=str(error), details=error.details)
    if isinstance(error, TooLongError):
        return 413, Fault(type="too_long", message=str(error))
    if isinstance(error, RequestError):
        return 422, Fault(type="refused", message=str(error), details=[{"path": "body", "message": str(error)}])
    if isinstance(error, RateLimited):
        return 429, Fault(type="rate_limited", message=str(error))
    if isinstance(error, EngineError):
        return 503, Fault(type="unavailable", message=str(error))
    if isinstance(error, TimeoutError):
        limit_s = gateway.config.judge_timeout_s
        return 504, Fault(type="timeout", message=f"no verdict within {limit_s:g} s or the budget; ask for a lower k")
    raise error


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response of `work`, which is cancelled when the client goes away."""
    answered, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answered, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answered.result() if answered.done() else Response(status_code=CLIENT_GONE)
    finally:
        answered.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise TooLongError(f"a body of {declared[:20]} bytes exceeds the limit of {limit}; send shorter texts")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLongError(f"a body of {len(body)} bytes or more exceeds the limit of {limit}; send shorter texts")
    return bytes(body)


def _response(query: str, prompt: str) -> str:
    _, found, response = query.partition(prompt)
    return response if found else query


def _key_check(variable: str) -> Callable[[Request], bool]:
    """Whether a request carries one of the API keys as `Authorization: Bearer KEY`; compared in constant time."""
    if not variable:
        return lambda request: True
    if not (keys := os.environ.get(variable, "").split()):
        raise ConfigError(f"the environment variable {variable} (api_key_env) is not set")
    expected = [hashlib.sha256(f"Bearer {key}".encode()).digest() for key in keys]

    def is_allowed(request: Request) -> bool:
        given = request.headers.get("authorization", "").encode("latin-1")  # the bytes as they came
        digest = hashlib.sha256(given).digest()
        return any(hmac.compare_digest(digest, key) for key in expected)

    return is_allowed


def _denied(status: list[int]) -> Response:
    status.append(401)
    response = _error(401, Fault(type="unauthorized", message="send the API key as `Authorization: Bearer KEY`"))
    response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


def _error(status: int, fault: Fault, retry_after_s: int | None = None) -> Response:
    wait_s = RETRY_AFTER_S if status == 503 else retry_after_s
    headers = None if wait_s is None else {"Retry-After": str(wait_s)}
    return JSONResponse(ErrorAnswer(error=fault).model_dump(), status_code=status, headers=headers)
