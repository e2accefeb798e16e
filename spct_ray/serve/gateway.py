"""From a request to a verdict: seeds, fan-out, meta scores, vote. Leaves out HTTP (routes.py) and Ray (app.py).

A sample that cannot be parsed is a named failure in the answer and never a score.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from spct_ray.errors import EngineError, RequestError, TooLongError
from spct_ray.judge.adaptive import looks, may_stop
from spct_ray.judge.cohort import score_cohort
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.parse import Scale
from spct_ray.judge.prompt import meta_messages, scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.judge.vote import confidence, decide, vote
from spct_ray.records import Item, Message, Trajectory
from spct_ray.serve.backends import JudgeBackend, MetaBackend
from spct_ray.serve.config import ServeConfig
from spct_ray.serve.principles import Principles, PrinciplesCache
from spct_ray.serve.schema import MAX_SEED, Budget, JudgeAnswer, JudgeRequest, SampleOut, Tally

MAX_CHARACTERS_PER_TOKEN = 32  # longer texts are refused unread: to encode them k times would keep the engine busy

OnSample = Callable[[Tally], None]


@dataclass(frozen=True)
class Plan:
    """How to judge an item, whatever request it came with. A temperature or seed of None is the server's choice."""

    k: int | Literal["auto"] = 8
    k_meta: int | None = None
    temperature: float | None = None
    seed: int | None = None
    auto_principles: bool = False
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True)
class CohortScores:
    """Scores [N] of many responses on the judge's scale, NaN without a verdict; and what they cost, in tokens."""

    scores: list[float]
    scale: Scale
    tokens: int

    @property
    def shares(self) -> list[float]:
        """The scores on a scale of 0 to 1; what alignment moved beyond the ends is cut off."""
        low, high = self.scale.low, self.scale.high
        return [s if math.isnan(s) else min(max((s - low) / (high - low), 0.0), 1.0) for s in self.scores]


class Gateway:
    """Judges requests with `judge` and, where there is one, lets `meta` guide the vote."""

    def __init__(self, config: ServeConfig, judge: JudgeBackend, meta: MetaBackend | None) -> None:
        self.config = config
        self.judge = judge
        self.meta = meta
        self.on_verdict: Callable[[JudgeAnswer], None] = lambda answer: None  # told of each, those of cohorts too
        self._principles = PrinciplesCache(judge, config.judge, config.principles_cache, config.judge_timeout_s)
        replicas = config.resources.judge
        # Parts of batches and cohorts wait here, so that a large one does not overrun the judge's queue.
        self._parts = asyncio.Semaphore(replicas.max_ongoing_requests * replicas.max_replicas)

    async def answer(self, request: JudgeRequest, on_sample: OnSample = lambda tally: None) -> JudgeAnswer:
        """Sample k judgements, vote, answer; `on_sample` is told of each as it comes.

        Raises RequestError (TooLongError for the prompt), EngineError (judge not available), TimeoutError.
        """
        is_auto = request.principles == "auto"
        item = Item(
            "request",
            tuple(Message(m.role, m.content) for m in request.messages),
            request.responses,
            reference=request.reference,
            principles="" if is_auto else request.principles,
        )
        plan = Plan(request.k, request.k_meta, request.temperature, request.seed, is_auto, request.budget)
        return await self.verdict(item, plan, on_sample)

    async def part(self, work: Callable[[], Awaitable[JudgeAnswer]]) -> JudgeAnswer:
        """`work()` once there is room for one more part of a batch or cohort."""
        async with self._parts:
            return await work()

    async def cohort(self, item: Item, plan: Plan) -> CohortScores:
        """Mean scores of all responses of `item`, judged in chunks of `config.max_cohort`, or smaller ones where these
        are too long. Raises as `answer`."""
        seed = _seed(plan)
        tokens = 0

        async def judge(part: tuple[int, ...]) -> list[float] | None:
            nonlocal tokens
            chunk = replace(item, responses=tuple(item.responses[i] for i in part))
            own = replace(plan, seed=derive_seed(seed, *part) % MAX_SEED)
            answer = await self.part(lambda: self.verdict(chunk, own))
            tokens += answer.prompt_tokens + answer.completion_tokens
            return answer.mean_scores

        scores = await score_cohort(len(item.responses), self.config.max_cohort, judge)
        return CohortScores(scores, scale_of(len(item.responses), self.config.judge), tokens)

    async def verdict(self, item: Item, plan: Plan, on_sample: OnSample = lambda tally: None) -> JudgeAnswer:
        """As `answer`, for an item."""
        started = time.perf_counter()
        seed, config, num_responses = _seed(plan), self.config, len(item.responses)
        texts = (*(m.content for m in item.messages), *item.responses, item.reference, item.principles)
        max_tokens = config.resources.engine.max_model_len
        if (length := sum(map(len, texts))) > MAX_CHARACTERS_PER_TOKEN * max_tokens:
            raise TooLongError(
                f"texts of {length} characters cannot fit the engine's max_model_len of {max_tokens} tokens; "
                f"the limit is {MAX_CHARACTERS_PER_TOKEN * max_tokens} characters"
            )
        k_max = config.k_auto_max if plan.k == "auto" else plan.k
        temperature = config.temperature if plan.temperature is None else plan.temperature
        orders = balanced_orders(num_responses, k_max, derive_seed(seed, "orders"))
        in_rounds = plan.k == "auto" or plan.budget.tokens is not None
        ends = looks(num_responses, k_max) if in_rounds else [k_max]
        limit_s = min(config.judge_timeout_s, (plan.budget.milliseconds or math.inf) / 1000)
        samples: list[Trajectory] = []
        principles = Principles(item.principles, "given" if item.principles else "none")
        stopped: Literal["k", "settled", "budget"] = "k"
        with closing(_Scorer(self.meta, item, min(config.meta_timeout_s, limit_s))) as scorer:
            try:
                async with asyncio.timeout(limit_s):
                    if plan.auto_principles:
                        principles = await self._principles.of(item.messages)
                        item = replace(item, principles=principles.text)
                    tasks = [
                        JudgeTask(item, o, k, temperature, derive_seed(seed, "sample", k)) for k, o in enumerate(orders)
                    ]
                    for start, end in pairwise([0, *ends]):
                        async with aclosing(self.judge.judge(tasks[start:end])) as batches:
                            async for batch in batches:
                                for trajectory in batch:
                                    samples.append(trajectory)
                                    on_sample(_tally(samples))
                                scorer.add(batch)
                        if end == k_max:
                            break
                        if plan.k == "auto" and await self._may_stop(samples, scorer, k_max):
                            stopped = "settled"
                            break
                        if plan.budget.tokens and sum(t.completion_tokens for t in samples) >= plan.budget.tokens:
                            stopped = "budget"
                            break
            except TimeoutError:
                if plan.budget.milliseconds is None or not samples:
                    raise
                stopped = "budget"
            samples.sort(key=lambda t: t.sample)
            logits, plain_because = await scorer.logits(samples)
        self._principles.saw_version(max(t.weight_version for t in samples))
        answer = self._answer(samples, logits, plan.k_meta, plain_because, principles, stopped, seed, started)
        self.on_verdict(answer)
        return answer

    async def _may_stop(self, samples: Sequence[Trajectory], scorer: _Scorer, k_max: int) -> bool:
        """The rule of judge/adaptive.py."""
        logits, _ = await scorer.logits(samples)
        scale = scale_of(len(samples[0].order), self.config.judge)
        return may_stop(samples, logits, k_max, scale, self.config.k_auto_error)

    def _answer(
        self,
        samples: Sequence[Trajectory],
        logits: Sequence[float],
        k_meta: int | None,
        plain_because: str,
        principles: Principles,
        stopped: Literal["k", "settled", "budget"],
        seed: int,
        started: float,
    ) -> JudgeAnswer:
        num_responses = len(samples[0].order)
        verdict = vote("", num_responses, samples, logits, k_meta if logits else None)
        winners = list(verdict.winners) if num_responses > 1 else []
        winner = decide(verdict, derive_seed(seed, "tie")) if winners else None
        used = [samples[k].scores for k in verdict.used]
        scale = scale_of(num_responses, self.config.judge)
        is_sure = confidence(used, winner, seed) if winner is not None and len(used) > 1 else None
        return JudgeAnswer(
            scores=list(verdict.scores) or None,
            mean_scores=[s / len(verdict.used) for s in verdict.scores] or None,
            scale=(scale.low, scale.high),
            winner=winner,
            winners=winners,
            tie=len(winners) > 1,
            confidence=is_sure,
            num_samples=verdict.num_samples,
            stopped=stopped,
            used=list(verdict.used),
            failures=verdict.failures,
            voting="plain" if plain_because else "meta",
            voting_reason=plain_because,
            principles=principles.text,
            principles_source=principles.source,
            samples=[
                sample_out(t, verdict.logits[k] if verdict.logits and not t.failure else None, k in verdict.used)
                for k, t in enumerate(samples)
            ],
            model=self.config.name,
            weight_version=max(t.weight_version for t in samples),
            seed=seed,
            prompt_tokens=principles.prompt_tokens + sum(t.prompt_tokens for t in samples),
            completion_tokens=principles.completion_tokens + sum(t.completion_tokens for t in samples),
            milliseconds=round(1000 * (time.perf_counter() - started), 1),
        )


class _Scorer:
    """Meta-RM logits of samples, asked for as the samples come. Without a working meta RM it says why."""

    def __init__(self, meta: MetaBackend | None, item: Item, timeout_s: float) -> None:
        self._meta, self._item, self._timeout_s = meta, item, timeout_s
        self._running: list[tuple[list[int], asyncio.Task[list[float]]]] = []
        self._logits: dict[int, float] = {}
        self._plain_because = "" if meta else "no meta RM is served"

    def add(self, batch: Sequence[Trajectory]) -> None:
        usable = [t for t in batch if not t.failure]
        if self._meta and usable and not self._plain_because:
            self._running.append(([t.sample for t in usable], asyncio.create_task(self._score(self._meta, usable))))

    async def logits(self, samples: Sequence[Trajectory]) -> tuple[list[float], str]:
        """A logit a sample (NaN for an unparsable one), or none and the reason why the vote is plain."""
        while self._running and not self._plain_because:
            numbers, task = self._running[0]
            try:
                scored = await asyncio.shield(task)  # else the end of a budget, in here, would lose them
            except TimeoutError:
                self._plain_because = f"the meta RM did not answer within {self._timeout_s:g} s"
            except (EngineError, RequestError) as error:
                self._plain_because = f"the meta RM failed: {error}"
            else:
                if not all(map(math.isfinite, scored)):
                    self._plain_because = "the meta RM gave a logit that is not finite"
                self._logits |= zip(numbers, scored, strict=True)
                self._running.pop(0)
        if self._plain_because:
            return [], self._plain_because
        if all(t.failure for t in samples):
            return [], "no usable sample to score"
        return [self._logits.get(t.sample, math.nan) for t in samples], ""

    def close(self) -> None:
        for _, task in self._running:
            task.cancel()

    async def _score(self, meta: MetaBackend, usable: Sequence[Trajectory]) -> list[float]:
        async with asyncio.timeout(self._timeout_s):
            return await meta.score([meta_messages(self._item, t.order, t.text) for t in usable])


def sample_out(t: Trajectory, logit: float | None, kept: bool) -> SampleOut:
    """A judgement as the answer shows it."""
    return SampleOut(
        sample=t.sample,
        order=list(t.order),
        text=t.text,
        scores=list(t.scores) or None,
        failure=t.failure or None,
        meta_logit=logit,
        kept=kept,
        prompt_tokens=t.prompt_tokens,
        completion_tokens=t.completion_tokens,
        stop_reason=t.stop_reason,
        weight_version=t.weight_version,
    )


def _tally(samples: Sequence[Trajectory]) -> Tally:
    sums = vote("", len(samples[0].order), samples).scores
    last = samples[-1]
    return Tally(sample=sample_out(last, None, not last.failure), num_samples=len(samples), scores=list(sums) or None)


def _seed(plan: Plan) -> int:
    return secrets.randbelow(MAX_SEED) if plan.seed is None else plan.seed
