"""From a request to a verdict: seeds, fan-out, meta scores, vote. HTTP is in routes.py, Ray in app.py.

A sample that cannot be parsed appears in the answer as a named failure, never as a score.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from spct_ray.errors import EngineError, RequestError, TooLongError
from spct_ray.judge.adaptive import looks, may_stop
from spct_ray.judge.cohort import score_cohort
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.parse import Failure, Scale
from spct_ray.judge.principles import Principles, PrinciplesCache
from spct_ray.judge.prompt import meta_messages, scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.judge.vote import confidence, decide, vote
from spct_ray.records import Completion, Item, Message, Trajectory
from spct_ray.serve import schema
from spct_ray.serve.backends import JudgeBackend, MetaBackend
from spct_ray.serve.deployment import ServeConfig
from spct_ray.serve.schema import MAX_SEED, JudgeAnswer, JudgeRequest, Tally

MAX_CHARACTERS_PER_TOKEN = 32  # longer texts are refused without encoding them k times, which would block the engine

OnSample = Callable[[Tally], None]


@dataclass(frozen=True)
class Plan:
    """How to judge an item, whichever route it came by. A temperature or seed of None is the server's choice."""

    k: int | Literal["auto"] = 8
    k_meta: int | None = None
    temperature: float | None = None
    seed: int | None = None
    auto_principles: bool = False
    budget: schema.Budget = field(default_factory=schema.Budget)


@dataclass(frozen=True)
class CohortScores:
    """Scores [N] of many responses on the judge's scale, NaN where there is no verdict, and the tokens they cost."""

    scores: list[float]
    scale: Scale
    tokens: int

    @property
    def shares(self) -> list[float]:
        """The scores on a scale of 0 to 1, clipped where aligning the chunks moved them beyond its ends."""
        low, high = self.scale.low, self.scale.high
        return [s if math.isnan(s) else min(max((s - low) / (high - low), 0.0), 1.0) for s in self.scores]


@dataclass
class _Progress:
    """The state of one request."""

    item: Item
    plan: Plan
    seed: int
    started: float = field(default_factory=time.perf_counter)
    principles: Principles | None = None
    samples: list[Trajectory] = field(default_factory=list)
    stopped: schema.Stopped = "k"


class Gateway:
    """Judges requests with `judge`; a `meta` RM, where there is one, guides the votes."""

    def __init__(self, config: ServeConfig, judge: JudgeBackend, meta: MetaBackend | None) -> None:
        self.config = config
        self.judge = judge
        self.meta = meta
        self.on_verdict: Callable[[JudgeAnswer], None] = lambda answer: (
            None
        )  # called with every verdict, also of cohorts
        self._principles = PrinciplesCache(self._write_principles, config.judge, config.principles_cache)
        replicas = config.resources.judge
        # Held by each part of a batch or cohort, so that a large one does not overrun the judge's queue.
        self.parts = asyncio.Semaphore(replicas.max_ongoing_requests * replicas.max_replicas)

    async def answer(self, request: JudgeRequest, on_sample: OnSample = lambda tally: None) -> JudgeAnswer:
        """Sample k judgements and vote; `on_sample` is called for each judgement as it arrives.

        Raises RequestError (TooLongError for the prompt), schema.InvalidRequest, EngineError (judge not available) and
        TimeoutError.
        """
        is_auto = request.principles == "auto"
        item = Item(
            "request",
            tuple(Message(m.role, m.content) for m in request.messages),
            tuple(request.responses),
            reference=request.reference,
            principles="" if is_auto else request.principles,
        )
        plan = Plan(request.k, request.k_meta, request.temperature, request.seed, is_auto, request.budget)
        return await self.verdict(item, plan, on_sample)

    async def cohort(self, item: Item, plan: Plan) -> CohortScores:
        """Mean scores of all responses of `item`, judged in chunks of at most `config.max_cohort` that fit the context.
        Raises the errors of `answer`."""
        seed = _seed(plan)
        tokens = 0

        async def judge(part: tuple[int, ...]) -> list[float] | None:
            nonlocal tokens
            chunk = replace(item, responses=tuple(item.responses[i] for i in part))
            own = replace(plan, seed=derive_seed(seed, *part) % MAX_SEED)
            async with self.parts:
                answer = await self.verdict(chunk, own)
            tokens += answer.prompt_tokens + answer.completion_tokens
            return answer.mean_scores

        scores = await score_cohort(len(item.responses), self.config.max_cohort, judge)
        return CohortScores(scores, scale_of(len(item.responses), self.config.judge), tokens)

    async def verdict(self, item: Item, plan: Plan, on_sample: OnSample = lambda tally: None) -> JudgeAnswer:
        """Like `answer`, for an item."""
        config, budget_s = self.config, (plan.budget.milliseconds or math.inf) / 1000
        self._check(item, plan)
        progress = _Progress(item, plan, _seed(plan))
        limit_s = min(config.judge_timeout_s, budget_s)
        with closing(_Scorer(self.meta, item, min(config.meta_timeout_s, limit_s))) as scorer:
            try:
                async with asyncio.timeout(limit_s):
                    await self._sample(progress, scorer, on_sample)
            except TimeoutError:
                if budget_s > config.judge_timeout_s or not progress.samples:
                    raise
                progress.stopped = "budget"
            progress.samples.sort(key=lambda t: t.sample)
            logits, plain_because = await scorer.logits(progress.samples)
        self._principles.saw_version(max(t.weight_version for t in progress.samples))
        answer = self._answer(progress, logits, plain_because)
        self.on_verdict(answer)
        return answer

    def _check(self, item: Item, plan: Plan) -> None:
        if plan.k_meta is not None and self.config.meta_vote == "weighted":
            message = "must not be given, because with meta_vote: weighted all samples count"
            raise schema.InvalidRequest([{"path": "k_meta", "message": message}])
        texts = (*(m.content for m in item.messages), *item.responses, item.reference, item.principles)
        max_tokens = self.config.resources.engine.max_model_len
        if (length := sum(map(len, texts))) > MAX_CHARACTERS_PER_TOKEN * max_tokens:
            raise TooLongError(
                f"texts of {length} characters cannot fit the engine's max_model_len of {max_tokens} tokens; "
                f"the limit is {MAX_CHARACTERS_PER_TOKEN * max_tokens} characters"
            )

    async def _sample(self, progress: _Progress, scorer: _Scorer, on_sample: OnSample) -> None:
        """Draw samples in rounds, until there are k, the winner is settled or the budget of tokens is spent."""
        config, plan, seed, item, samples = (
            self.config, progress.plan, progress.seed, progress.item, progress.samples
        )  # fmt: skip
        if plan.auto_principles:
            progress.principles = await self._principles.of(item.messages)
            text = progress.principles.text
            item = replace(item, principles="" if isinstance(text, Failure) else text)
        num_responses, k_max = len(item.responses), config.k_auto_max if plan.k == "auto" else plan.k
        temperature = config.temperature if plan.temperature is None else plan.temperature
        orders = balanced_orders(num_responses, k_max, derive_seed(seed, "orders"))
        tasks = [JudgeTask(item, o, k, temperature, derive_seed(seed, "sample", k)) for k, o in enumerate(orders)]
        in_rounds = plan.k == "auto" or plan.budget.tokens is not None
        for start, end in pairwise([0, *(looks(num_responses, k_max) if in_rounds else [k_max])]):
            async with aclosing(self.judge.judge(tasks[start:end])) as batches:
                async for batch in batches:
                    for trajectory in batch:
                        samples.append(trajectory)
                        on_sample(_tally(samples))
                    scorer.add(batch)
            if end == k_max:
                return
            if plan.k == "auto":
                logits, _ = await scorer.logits(samples)
                scale = scale_of(num_responses, config.judge)
                if may_stop(samples, logits, k_max, scale, config.k_auto_error, config.meta_vote):
                    progress.stopped = "settled"
                    return
            if plan.budget.tokens and sum(t.completion_tokens for t in samples) >= plan.budget.tokens:
                progress.stopped = "budget"
                return

    async def _write_principles(self, messages: Sequence[Message]) -> Completion:
        async with asyncio.timeout(self.config.judge_timeout_s):
            return await self.judge.principles(messages)

    def _answer(self, progress: _Progress, logits: Sequence[float], plain_because: str) -> JudgeAnswer:
        config, samples, seed = self.config, progress.samples, progress.seed
        num_responses = len(progress.item.responses)
        verdict = vote("", num_responses, samples, logits, progress.plan.k_meta if logits else None, config.meta_vote)
        winners = list(verdict.winners) if num_responses > 1 else []
        winner = decide(verdict, derive_seed(seed, "tie")) if winners else None
        used = [samples[k].scores for k in verdict.used]
        is_sure = None if winner is None or len(used) < 2 else confidence(used, winner, seed, verdict.weights)
        scale = scale_of(num_responses, config.judge)
        principles, source = _shown(progress)
        written = progress.principles
        paid: list[Trajectory | Completion] = [*samples]
        if written and not written.is_cached:
            paid.append(written.completion)
        return JudgeAnswer(
            scores=list(verdict.scores) or None,
            mean_scores=[s / len(verdict.used) for s in verdict.scores] or None,
            scale=(scale.low, scale.high),
            winner=winner,
            winners=winners,
            tie=len(winners) > 1,
            confidence=is_sure,
            num_samples=verdict.num_samples,
            stopped=progress.stopped,
            used=list(verdict.used),
            failures=verdict.failures,
            voting="plain" if plain_because else "weighted" if config.meta_vote == "weighted" else "meta",
            voting_reason=plain_because,
            principles=principles,
            principles_source=source,
            samples=[
                _sample_out(t, verdict.logits[k] if verdict.logits and not t.failure else None, k in verdict.used)
                for k, t in enumerate(samples)
            ],
            model=config.name,
            weight_version=max(t.weight_version for t in samples),
            seed=seed,
            prompt_tokens=sum(one.prompt_tokens for one in paid),
            completion_tokens=sum(one.completion_tokens for one in paid),
            milliseconds=round(1000 * (time.perf_counter() - progress.started), 1),
        )


class _Scorer:
    """Scores samples with the meta RM as they arrive. Where that fails, the vote is plain, and the answer says why."""

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
        """One logit per sample (NaN for an unparsable one), or none and the reason why the vote is plain."""
        while self._running and not self._plain_because:
            numbers, task = self._running[0]
            try:
                scored = await asyncio.shield(task)  # a budget that ends here must not cancel the scoring
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


def _sample_out(t: Trajectory, logit: float | None, kept: bool) -> schema.SampleOut:
    """A judgement as the answer shows it."""
    return schema.SampleOut(
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
    return Tally(sample=_sample_out(last, None, not last.failure), num_samples=len(samples), scores=list(sums) or None)


def _shown(progress: _Progress) -> tuple[str, schema.PrinciplesSource]:
    """The principles that the judge was shown, and where they came from."""
    if progress.principles is None:
        return progress.item.principles, "given" if progress.item.principles else "none"
    if isinstance(progress.principles.text, Failure):
        return "", "failed"
    return progress.principles.text, "cached" if progress.principles.is_cached else "generated"


def _seed(plan: Plan) -> int:
    return secrets.randbelow(MAX_SEED) if plan.seed is None else plan.seed
