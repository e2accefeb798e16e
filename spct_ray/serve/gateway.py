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

import numpy as np

from spct_ray.errors import EngineError, RequestError, TooLongError
from spct_ray.judge.adaptive import looks, may_stop
from spct_ray.judge.cohort import score_cohort
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.parse import Failure
from spct_ray.judge.principles import Principles, PrinciplesCache
from spct_ray.judge.prompt import meta_messages, scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.judge.vote import confidence, decide, vote
from spct_ray.records import Completion, Item, Message, Trajectory
from spct_ray.serve import schema
from spct_ray.serve.backends import JudgeBackend, MetaBackend
from spct_ray.serve.deployment import ServeConfig
from spct_ray.serve.schema import MAX_SEED, InvalidRequest, JudgeAnswer, JudgeRequest, SampleOut, Tally

MAX_CHARACTERS_PER_TOKEN = 32  # longer texts are refused without encoding them k times, which would block the engine

OnSample = Callable[[Tally], None]


@dataclass(frozen=True)
class CohortScores:
    """Scores [N] of many responses on the judge's scale, NaN where there is no verdict; the same on a scale of 0 to 1,
    clipped where aligning the chunks moved them beyond its ends; and the tokens they cost."""

    scores: list[float]
    shares: list[float]
    tokens: int


@dataclass
class _Progress:
    """The state of one request."""

    request: JudgeRequest
    item: Item  # with the principles of the request, or those written for it
    seed: int
    started: float = field(default_factory=time.perf_counter)
    written: Principles | None = None
    samples: list[Trajectory] = field(default_factory=list)
    stopped: Literal["k", "settled", "budget"] = "k"


class Gateway:
    """Judges requests with `judge`; a `meta` RM, where there is one, guides the votes."""

    def __init__(self, config: ServeConfig, judge: JudgeBackend, meta: MetaBackend | None) -> None:
        self.config, self.judge, self.meta = config, judge, meta
        self.on_verdict: Callable[[JudgeAnswer], None] = lambda answer: None  # called with all, also of cohorts
        self._principles = PrinciplesCache(self._write_principles, config.judge, config.principles_cache)
        replicas = config.resources.judge
        # Held by each part of a batch or cohort, so that a large one does not overrun the judge's queue.
        self.parts = asyncio.Semaphore(replicas.max_ongoing_requests * replicas.max_replicas)

    async def cohort(
        self, request: schema.CohortRequest, query: str, responses: Sequence[str], reference: str = ""
    ) -> CohortScores:
        """Mean scores of all responses, judged in chunks of at most `config.max_cohort` that fit the context.
        Raises the errors of `answer`."""
        turn = schema.MessageIn.model_construct(role="user", content=query)
        seed, tokens = _seed(request.seed), 0

        async def judge(part: tuple[int, ...]) -> list[float] | None:
            nonlocal tokens
            chunk = JudgeRequest.model_construct(  # unchecked: a completion may be empty
                messages=[turn],
                responses=[responses[i] for i in part],
                k=request.k,
                seed=derive_seed(seed, *part) % MAX_SEED,
                reference=reference,
            )
            async with self.parts:
                answer = await self.answer(chunk)
            tokens += answer.prompt_tokens + answer.completion_tokens
            return answer.mean_scores

        scores = await score_cohort(len(responses), self.config.max_cohort, judge)
        scale = scale_of(len(responses), self.config.judge)
        shares = np.clip((np.array(scores) - scale.low) / (scale.high - scale.low), 0, 1).tolist()
        return CohortScores(scores, shares, tokens)

    async def answer(self, request: JudgeRequest, on_sample: OnSample = lambda tally: None) -> JudgeAnswer:
        """Sample k judgements and vote; `on_sample` is called for each judgement as it arrives.

        Raises RequestError (TooLongError for the prompt), InvalidRequest, EngineError (judge not available) and
        TimeoutError.
        """
        config, budget_s = self.config, (request.budget.milliseconds or math.inf) / 1000
        messages = tuple(Message(m.role, m.content) for m in request.messages)
        principles = "" if request.principles == "auto" else request.principles
        item = Item("request", messages, tuple(request.responses), reference=request.reference, principles=principles)
        self._check(item, request)
        progress = _Progress(request, item, _seed(request.seed))
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
        answer = self._answer(progress, logits, plain_because)
        self._principles.saw_version(answer.weight_version)
        self.on_verdict(answer)
        return answer

    def _check(self, item: Item, request: JudgeRequest) -> None:
        if request.k_meta is not None and self.config.meta_vote == "weighted":
            message = "must not be given, because with meta_vote: weighted all samples count"
            raise InvalidRequest([{"path": "k_meta", "message": message}])
        texts = (*(m.content for m in item.messages), *item.responses, item.reference, item.principles)
        max_tokens = self.config.resources.engine.max_model_len
        if (length := sum(map(len, texts))) > MAX_CHARACTERS_PER_TOKEN * max_tokens:
            raise TooLongError(
                f"texts of {length} characters cannot fit the engine's max_model_len of {max_tokens} tokens; "
                f"the limit is {MAX_CHARACTERS_PER_TOKEN * max_tokens} characters"
            )

    async def _sample(self, progress: _Progress, scorer: _Scorer, on_sample: OnSample) -> None:
        """Draw samples in rounds, until there are k, the winner is settled or the budget of tokens is spent."""
        config, request, seed, samples = self.config, progress.request, progress.seed, progress.samples
        if request.principles == "auto":
            progress.written = await self._principles.of(progress.item.messages)
            text = progress.written.text
            progress.item = replace(progress.item, principles="" if isinstance(text, Failure) else text)
        num_responses, is_auto = len(request.responses), request.k == "auto"
        k_max = config.k_auto_max if request.k == "auto" else request.k
        temperature = config.temperature if request.temperature is None else request.temperature
        orders = balanced_orders(num_responses, k_max, derive_seed(seed, "orders"))
        tasks = [
            JudgeTask(progress.item, order, k, temperature, derive_seed(seed, "sample", k))
            for k, order in enumerate(orders)
        ]
        in_rounds = is_auto or request.budget.tokens is not None
        for start, end in pairwise([0, *(looks(num_responses, k_max) if in_rounds else [k_max])]):
            async with aclosing(self.judge.judge(tasks[start:end])) as batches:
                async for batch in batches:
                    for trajectory in batch:
                        samples.append(trajectory)
                        on_sample(_tally(samples))
                    scorer.add(batch)
            if end == k_max:
                return
            if is_auto:
                logits, _ = await scorer.logits(samples)
                scale = scale_of(num_responses, config.judge)
                if may_stop(samples, logits, k_max, scale, config.k_auto_error, config.meta_vote):
                    progress.stopped = "settled"
                    return
            if request.budget.tokens and sum(t.completion_tokens for t in samples) >= request.budget.tokens:
                progress.stopped = "budget"
                return

    async def _write_principles(self, messages: Sequence[Message]) -> Completion:
        async with asyncio.timeout(self.config.judge_timeout_s):
            return await self.judge.principles(messages)

    def _answer(self, progress: _Progress, logits: Sequence[float], plain_because: str) -> JudgeAnswer:
        config, request, samples, seed = self.config, progress.request, progress.samples, progress.seed
        num_responses, written, shown = len(request.responses), progress.written, progress.item.principles
        verdict = vote("", num_responses, samples, logits, request.k_meta if logits else None, config.meta_vote)
        winners = list(verdict.winners) if num_responses > 1 else []
        winner = decide(verdict, derive_seed(seed, "tie")) if winners else None
        used = [samples[k].scores for k in verdict.used]
        is_sure = None if winner is None or len(used) < 2 else confidence(used, winner, seed, verdict.weights)
        scale = scale_of(num_responses, config.judge)
        paid: list[Trajectory | Completion] = [*samples]
        source: schema.PrinciplesSource = "given" if shown else "none"
        if written:
            source = "failed" if not shown else "cached" if written.is_cached else "generated"
            paid += [] if written.is_cached else [written.completion]
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
            principles=shown,
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
        self._batches: list[tuple[list[int], asyncio.Task[list[float]]]] = []  # numbers of the samples, their logits
        self._plain_because = "" if meta else "no meta RM is served"

    def add(self, batch: Sequence[Trajectory]) -> None:
        usable = [t for t in batch if not t.failure]
        if self._meta and usable and not self._plain_because:
            self._batches.append(([t.sample for t in usable], asyncio.create_task(self._score(self._meta, usable))))

    async def logits(self, samples: Sequence[Trajectory]) -> tuple[list[float], str]:
        """One logit per sample (NaN for an unparsable one), or none and the reason why the vote is plain."""
        logits: dict[int, float] = {}
        try:
            for numbers, task in self._batches:  # a budget that ends here must not cancel the scoring
                logits |= zip(numbers, await asyncio.shield(task), strict=True)
        except TimeoutError:
            self._plain_because = f"the meta RM did not answer within {self._timeout_s:g} s"
        except (EngineError, RequestError) as error:
            self._plain_because = f"the meta RM failed: {error}"
        if not all(map(math.isfinite, logits.values())):
            self._plain_because = "the meta RM gave a logit that is not finite"
        reason = self._plain_because or ("" if logits else "no usable sample to score")
        return [] if reason else [logits.get(t.sample, math.nan) for t in samples], reason

    def close(self) -> None:
        for _, task in self._batches:
            task.cancel()

    async def _score(self, meta: MetaBackend, usable: Sequence[Trajectory]) -> list[float]:
        async with asyncio.timeout(self._timeout_s):
            return await meta.score([meta_messages(self._item, t.order, t.text) for t in usable])


def _sample_out(trajectory: Trajectory, logit: float | None, kept: bool) -> SampleOut:
    return SampleOut.model_validate(trajectory).model_copy(update={"meta_logit": logit, "kept": kept})


def _tally(samples: Sequence[Trajectory]) -> Tally:
    last, sums = samples[-1], vote("", len(samples[-1].order), samples).scores
    sample = _sample_out(last, None, not last.failure)
    return Tally(sample=sample, num_samples=len(samples), scores=list(sums) or None)


def _seed(chosen: int | None) -> int:
    return secrets.randbelow(MAX_SEED) if chosen is None else chosen
