"""One GRPO step's rollouts: which prompts, what is asked of the engine, and what the answers are worth (Eq. 10, 11).

Everything here is a function of the run's seed and the step's number, so a resumed run asks what it would have asked.
Leaves out engines, ranks and the update; see `spct_ray.stages.grpo`.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spct_ray.engines.base import Request, SamplingParams
from spct_ray.judge.judge import JudgeTask, to_trajectory
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.parse import Failure
from spct_ray.judge.prompt import JudgeConfig, judge_messages
from spct_ray.judge.rule import is_correct
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Completion, Item, Record, StopReason, Trajectory

PARSED_OUTCOMES = ("correct", "tied", "wrong")


@dataclass(frozen=True, slots=True)
class Rollout(Record):
    """One sampled judgement as training data.

    `outcome` is "correct", "tied" (a response scored as high as the best one), "wrong", or a `Failure`.
    """

    token_ids: tuple[int, ...]  # prompt and completion
    num_prompt_tokens: int
    engine_logprobs: tuple[float, ...]  # of the completion's tokens
    outcome: str
    stop_reason: StopReason
    weight_version: int

    @property
    def reward(self) -> float:
        """+1 if correct, else -1, also when unparsable (Eq. 11)."""
        return 1.0 if self.outcome == "correct" else -1.0


def tasks_of_step(items: Sequence[Item], num_prompts: int, step: int, seed: int) -> list[JudgeTask]:
    """The step's prompts: the items in a new random order each epoch, response orders balanced within the step."""
    picked = []
    for place in range(step * num_prompts, (step + 1) * num_prompts):
        epoch, offset = divmod(place, len(items))
        picked.append(items[_epoch_order(len(items), epoch, seed)[offset]])
    counts = Counter(len(item.responses) for item in picked)
    orders = {n: iter(balanced_orders(n, c, derive_seed(seed, "orders", step, n))) for n, c in counts.items()}
    return [
        JudgeTask(item, next(orders[len(item.responses)]), place, 1.0, derive_seed(seed, step, place, item.id))
        for place, item in enumerate(picked)
    ]


@functools.lru_cache(maxsize=2)  # a step touches at most two epochs, unless it is longer than an epoch
def _epoch_order(num_items: int, epoch: int, seed: int) -> list[int]:
    return random.Random(derive_seed(seed, "epoch", epoch)).sample(range(num_items), num_items)


def request_of(task: JudgeTask, judge: JudgeConfig, group_size: int) -> Request:
    """G samples of the same prompt, at temperature 1: any other would not sample from the policy that is trained."""
    params = SamplingParams(judge.budget, task.temperature, task.seed, n=group_size, logprobs=True)
    return Request(judge_messages(task.item, task.order, judge), params)


def to_rollout(task: JudgeTask, judge: JudgeConfig, completion: Completion) -> Rollout:
    """Parse and compare with the truth; an unparsable judgement has its failure as outcome."""
    trajectory = to_trajectory(task, judge, text=completion.text, stop_reason=completion.stop_reason, model="policy")
    return Rollout(
        token_ids=completion.prompt_token_ids + completion.token_ids,
        num_prompt_tokens=len(completion.prompt_token_ids),
        engine_logprobs=completion.logprobs,
        outcome=outcome_of(trajectory, task.item),
        stop_reason=completion.stop_reason,
        weight_version=completion.weight_version,
    )


def outcome_of(trajectory: Trajectory, item: Item) -> str:
    """See `Rollout.outcome`. Only "correct" is Eq. 10's; a tie is wrong there."""
    if trajectory.failure:
        return trajectory.failure
    if is_correct(trajectory.scores, item.rewards):
        return "correct"
    best = trajectory.scores[item.best]
    others = [s for i, s in enumerate(trajectory.scores) if i != item.best]
    return "tied" if others and best == max(others) else "wrong"


def rollout_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Reward, share of each outcome (every one is always listed), groups without signal, lengths in tokens.

    `weight_version` is the oldest that a sample was made with; a synchronous loop has the step's number here.
    """
    rollouts = [rollout for group in groups for rollout in group]
    outcomes = Counter(rollout.outcome for rollout in rollouts)
    completion_tokens = [len(rollout.engine_logprobs) for rollout in rollouts]
    num = len(rollouts)
    return {
        "reward": statistics.fmean(rollout.reward for rollout in rollouts),
        **{f"share_{name}": outcomes[name] / num for name in PARSED_OUTCOMES},
        **{f"share_unparsable_{failure}": outcomes[failure] / num for failure in Failure},
        "zero_signal_groups": statistics.fmean(len({r.reward for r in group}) == 1 for group in groups),
        "truncated": statistics.fmean(rollout.stop_reason == "length" for rollout in rollouts),
        "prompt_tokens_mean": statistics.fmean(rollout.num_prompt_tokens for rollout in rollouts),
        "completion_tokens_mean": statistics.fmean(completion_tokens),
        "completion_tokens_max": max(completion_tokens),
        "weight_version": min(rollout.weight_version for rollout in rollouts),
    }
