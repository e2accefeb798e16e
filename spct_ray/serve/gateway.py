"""From a request to a verdict, and the HTTP routes around it. Plain classes on any ASGI server; Ray lives in app.py.

A sample that cannot be parsed is a named failure in the answer and never a score. Every error is JSON of one shape:
{"error": {"type": ..., "message": ..., "details": [{"path": ..., "message": ...}]}}.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from spct_ray.errors import EngineError, RequestError
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.prompt import meta_messages, scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.judge.vote import decide, vote
from spct_ray.records import Item, Message, Trajectory, Verdict
from spct_ray.serve.backends import JudgeBackend, MetaBackend
from spct_ray.serve.config import ServeConfig
from spct_ray.serve.schema import MAX_SEED, InvalidRequest, JudgeAnswer, JudgeRequest, SampleOut, parse_request

MAX_BODY_BYTES = 4 * 2**20
RETRY_AFTER_S = 5


@dataclass(frozen=True)
class Gateway:
    """Judges requests with `judge` and, where there is one, lets `meta` guide the vote."""

    config: ServeConfig
    judge: JudgeBackend
    meta: MetaBackend | None

    async def answer(self, request: JudgeRequest) -> JudgeAnswer:
        """Sample k judgements, vote, answer.

        Raises RequestError (prompt too long), EngineError (judge not available), TimeoutError (`judge_timeout_s`).
        """
        started = time.perf_counter()
        seed = secrets.randbelow(MAX_SEED) if request.seed is None else request.seed
        item = Item(
            "request",
            tuple(Message(m.role, m.content) for m in request.messages),
            request.responses,
            reference=request.reference,
        )
        orders = balanced_orders(len(item.responses), request.k, derive_seed(seed, "orders"))
        temperature = self.config.temperature if request.temperature is None else request.temperature
        tasks = [JudgeTask(item, o, k, temperature, derive_seed(seed, "sample", k)) for k, o in enumerate(orders)]
        async with asyncio.timeout(self.config.judge_timeout_s):
            trajectories = await self.judge.judge(tasks)
        logits, plain_because = await self._logits(item, trajectories)
        verdict = vote(item.id, len(item.responses), trajectories, logits, request.k_meta if logits else None)
        return self._answer(verdict, trajectories, plain_because, seed, started)

    async def _logits(self, item: Item, trajectories: Sequence[Trajectory]) -> tuple[list[float], str]:
        """A logit a sample (NaN for an unparsable one), or none and the reason why the vote is plain."""
        usable = [k for k, t in enumerate(trajectories) if not t.failure]
        if self.meta is None:
            return [], "no meta RM is served"
        if not usable:
            return [], "no usable sample to score"
        conversations = [meta_messages(item, trajectories[k].order, trajectories[k].text) for k in usable]
        try:
            async with asyncio.timeout(self.config.meta_timeout_s):
                scored = await self.meta.score(conversations)
        except TimeoutError:
            return [], f"the meta RM did not answer within {self.config.meta_timeout_s:g} s"
        except (EngineError, RequestError) as error:
            return [], f"the meta RM failed: {error}"
        if not all(map(math.isfinite, scored)):
            return [], "the meta RM gave a logit that is not finite"
        logits = [math.nan] * len(trajectories)
        for k, logit in zip(usable, scored, strict=True):
            logits[k] = logit
        return logits, ""

    def _answer(
        self, verdict: Verdict, trajectories: Sequence[Trajectory], plain_because: str, seed: int, started: float
    ) -> JudgeAnswer:
        num_responses = len(trajectories[0].order)
        winners = list(verdict.winners) if num_responses > 1 else []
        scale = scale_of(num_responses, self.config.judge)
        return JudgeAnswer(
            scores=list(verdict.scores) or None,
            mean_scores=[s / len(verdict.used) for s in verdict.scores] or None,
            scale=(scale.low, scale.high),
            winner=decide(verdict, derive_seed(seed, "tie")) if winners else None,
            winners=winners,
            tie=len(winners) > 1,
            num_samples=verdict.num_samples,
            used=list(verdict.used),
            failures=verdict.failures,
            voting="plain" if plain_because else "meta",
            voting_reason=plain_because,
            samples=[
                SampleOut(
                    order=list(t.order),
                    text=t.text,
                    scores=list(t.scores) or None,
                    failure=t.failure or None,
                    meta_logit=verdict.logits[k] if verdict.logits and not t.failure else None,
                    kept=k in verdict.used,
                    prompt_tokens=t.prompt_tokens,
                    completion_tokens=t.completion_tokens,
                    stop_reason=t.stop_reason,
                )
                for k, t in enumerate(trajectories)
            ],
            model=self.config.name,
            weight_version=trajectories[0].weight_version,
            seed=seed,
            milliseconds=round(1000 * (time.perf_counter() - started), 1),
        )


def build_app(gateway: Gateway, judge_is_ready: Callable[[], Awaitable[bool]]) -> FastAPI:
    """The HTTP routes: POST /v1/judge, GET /v1/models, GET /healthz."""
    app = FastAPI(title="spct-ray", openapi_url=None)

    @app.post("/v1/judge")
    async def judge(request: Request) -> JSONResponse:
        try:
            answer = await gateway.answer(parse_request(await _body(request)))
        except InvalidRequest as error:
            return _error(422, "invalid_request", str(error), error.details)
        except RequestError as error:
            return _error(413, "too_long", str(error))
        except EngineError as error:
            return _error(503, "unavailable", str(error))
        except TimeoutError:
            return _error(504, "timeout", f"no verdict within {gateway.config.judge_timeout_s:g} s; ask for a lower k")
        return JSONResponse(answer.model_dump(mode="json"))

    @app.get("/v1/models")
    async def models() -> dict[str, list[dict[str, str]]]:
        served = [{"name": gateway.config.name, "role": "judge"}]
        return {"models": [*served, {"name": "meta", "role": "meta"}] if gateway.meta else served}

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        if await judge_is_ready():
            return JSONResponse({"status": "ok"})
        return _error(503, "unavailable", "no judge replica is running")

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, "http", str(error.detail))

    return app


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the request's body is larger than {MAX_BODY_BYTES} bytes; send shorter texts")
    return bytes(body)


def _error(status: int, kind: str, message: str, details: Sequence[dict[str, str]] = ()) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return JSONResponse(
        {"error": {"type": kind, "message": message, "details": list(details)}}, status_code=status, headers=headers
    )
