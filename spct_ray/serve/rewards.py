"""The served judge as the reward of other trainers: TRL's GRPOTrainer and verl's batch reward manager.

All completions of one prompt are judged together, because scores are only comparable within one prompt. A completion's
reward is its mean score on the judge's scale. Without a verdict it is None (TRL) or NaN (verl), never a number that a
trainer would mistake for a low score. OpenRLHF needs no function: it calls `POST /v1/reward` itself.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Unpack, get_args

import httpx

from spct_ray.errors import TooLongError
from spct_ray.judge.cohort import score_cohort, score_groups
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Message, Role
from spct_ray.serve.client import AsyncJudgeClient, Options, ServerError
from spct_ray.serve.schema import MAX_SEED

Cohort = tuple[tuple[Message, ...], str]  # conversation and reference answer; completions of equal ones are comparable
TrlReward = Callable[..., Awaitable[list[float | None]]]
MAX_UNDER_WAY = 32  # concurrent requests; a server refuses what its queue has no room for
MAX_ATTEMPTS = 8  # waiting costs a trainer less than a missing reward
_BLANK = "(no text)"  # shown for a blank completion, which the server would refuse


async def cohort_rewards(
    client: AsyncJudgeClient,
    cohorts: Sequence[Cohort],
    completions: Sequence[str],
    max_cohort: int = 8,
    **options: Unpack[Options],
) -> list[float]:
    """One reward per completion. Completions with equal cohorts are judged together, at most `max_cohort` per prompt,
    fewer where so many do not fit.

    NaN where the server refused (too long even in a pair), failed after all attempts, or gave no usable judgement.
    Raises ServerError where no request could succeed (wrong key, wrong address, options that the schema refuses).
    """
    room = asyncio.Semaphore(MAX_UNDER_WAY)
    shown = [text if text.strip() else _BLANK for text in completions]

    async def score(cohort: Cohort, indices: list[int]) -> list[float]:
        messages, reference = cohort

        async def judge(part: tuple[int, ...]) -> Sequence[float] | None:
            own = Options(**options)
            if reference:
                own["reference"] = reference
            if "seed" in own:
                own["seed"] = derive_seed(own["seed"], *part) % MAX_SEED
            try:
                async with room:
                    return (await client.judge(messages, [shown[indices[i]] for i in part], **own)).mean_scores
            except httpx.TransportError:
                return None
            except ServerError as error:
                if error.kind == "too_long":
                    raise TooLongError(str(error)) from error
                if error.status in (401, 404, 405) or error.kind == "invalid_request":
                    raise  # misconfigured: no request would ever succeed
                return None

        try:
            return await score_cohort(len(indices), max_cohort, judge)
        except TooLongError:
            return [math.nan] * len(indices)

    return await score_groups(cohorts, score)


def trl_reward(
    base_url: str, api_key: str = "", max_cohort: int = 8, reference_column: str = "", **options: Unpack[Options]
) -> TrlReward:
    """A reward function for TRL's GRPOTrainer (`reward_funcs=[trl_reward("http://127.0.0.1:8000", k=4)]`).

    Prompts may be texts or conversations. `reference_column` names the dataset's column of reference answers, if any.
    """

    async def judged(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:  # a coroutine function, because TRL runs those concurrently
        answers = columns[reference_column] if reference_column else [""] * len(prompts)
        cohorts = [(_conversation(p), answer) for p, answer in zip(prompts, answers, strict=True)]
        async with AsyncJudgeClient(base_url, api_key, max_attempts=MAX_ATTEMPTS) as client:
            rewards = await cohort_rewards(client, cohorts, [_text(c) for c in completions], max_cohort, **options)
        return [None if math.isnan(r) else r for r in rewards]

    return judged


def verl_reward(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[dict[str, Any]],
    base_url: str = "http://127.0.0.1:8000",
    api_key: str = "",
    max_cohort: int = 8,
    prompt_key: str = "question",
    use_ground_truth: bool = False,
    **options: Unpack[Options],
) -> list[dict[str, float]]:
    """verl's `custom_reward_function` for `reward_manager: batch`; `reward_kwargs` set the rest.

    `extra_infos[i][prompt_key]` is the prompt, as a text or a conversation. With `use_ground_truth` the judge is shown
    the ground truth as reference answer. Raises KeyError for a row without the prompt.
    """
    prompts = [info[prompt_key] for info in extra_infos]
    references = [truth if use_ground_truth and isinstance(truth, str) else "" for truth in ground_truths]
    cohorts = [(_conversation(p), reference) for p, reference in zip(prompts, references, strict=True)]

    async def run() -> list[float]:
        async with AsyncJudgeClient(base_url, api_key, max_attempts=MAX_ATTEMPTS) as client:
            return await cohort_rewards(client, cohorts, solution_strs, max_cohort, **options)

    return [{"score": r, "judge_failed": float(math.isnan(r))} for r in asyncio.run(run())]


def _conversation(prompt: Any) -> tuple[Message, ...]:
    """A text is one user message; other roles than ours (a tool's) are shown as the user's."""
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    roles = get_args(Role)
    return tuple(Message(m["role"] if m["role"] in roles else "user", m["content"]) for m in prompt)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "\n".join(m["content"] or "" for m in completion)
