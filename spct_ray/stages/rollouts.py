"""One GRPO step's rollouts: which prompts, what is asked of the engine, and what the answers are worth (Eq. 10, 11).

Everything here is a function of the run's seed, the step's number and what was sampled, so a resumed run asks what it
would have asked. Leaves out engines, ranks and the update; see `spct_ray.stages.grpo`.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from spct_ray.engines.base import Request, SamplingParams
from spct_ray.judge.judge import JudgeTask, to_trajectory
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.parse import Failure, after_thinking, has_three_parts
from spct_ray.judge.prompt import JudgeConfig, judge_messages
from spct_ray.judge.rule import is_correct, is_ordered
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Completion, Item, Record, StopReason, Trajectory

RewardRule = Literal["best", "expected", "order", "both_orders"]
PARSED_OUTCOMES = ("correct", "tied", "wrong", "misordered", "inconsistent")


@dataclass(frozen=True, slots=True)
class Rollout(Record):
    """One sampled judgement as training data.

    `outcome` is "correct", a `Failure`, or why it is not rewarded: "wrong" or "tied" (another response scores higher
    than, or as high as, the best one) or, where Eq. 10 holds but the reward asks for more, "misordered" (the scores do
    not follow the order of the given rewards) or "inconsistent" (its twin of the other order is not right).
    """

    item_id: str
    token_ids: tuple[int, ...]  # prompt and completion
    num_prompt_tokens: int
    engine_logprobs: tuple[float, ...]  # of the completion's tokens
    outcome: str
    well_formed: bool  # has scores and the three parts
    reward: float
    stop_reason: StopReason
    weight_version: int


def tasks_of_step(
    items: Sequence[Item], num_prompts: int, step: int, seed: int, orders_per_item: int = 1
) -> list[JudgeTask]:
    """The step's prompts: the items in a new random order each epoch, response orders balanced within the step.

    With `orders_per_item` 2 each item has two prompts, one after the other, the second with its responses reversed:
    every two responses then stand both ways round.
    """
    num_items = num_prompts // orders_per_item
    picked = []
    for place in range(step * num_items, (step + 1) * num_items):
        epoch, offset = divmod(place, len(items))
        picked.append(items[_epoch_order(len(items), epoch, seed)[offset]])
    counts = Counter(len(item.responses) for item in picked)
    orders = {n: iter(balanced_orders(n, c, derive_seed(seed, "orders", step, n))) for n, c in counts.items()}
    tasks: list[JudgeTask] = []
    for item in picked:
        order = next(orders[len(item.responses)])
        for shown in (order, order[::-1])[:orders_per_item]:
            place = step * num_prompts + len(tasks)
            tasks.append(JudgeTask(item, shown, place, 1.0, derive_seed(seed, step, place, item.id)))
    return tasks


@functools.lru_cache(maxsize=2)  # a step touches at most two epochs, unless it is longer than an epoch
def _epoch_order(num_items: int, epoch: int, seed: int) -> list[int]:
    return random.Random(derive_seed(seed, "epoch", epoch)).sample(range(num_items), num_items)


def request_of(task: JudgeTask, judge: JudgeConfig, group_size: int) -> Request:
    """G samples of the same prompt, at temperature 1: any other would not sample from the policy that is trained."""
    params = SamplingParams(judge.budget, task.temperature, task.seed, n=group_size, logprobs=True)
    return Request(judge_messages(task.item, task.order, judge), params)


def to_groups(
    tasks: Sequence[JudgeTask],
    answers: Sequence[Sequence[Completion]],
    judge: JudgeConfig,
    rule: RewardRule,
    format_weight: float,
) -> list[list[Rollout]]:
    """The answers to `tasks` as groups of rollouts, each rewarded +1 where it is right by `rule`, else -1 (Eq. 11).

    best: Eq. 10. expected: Eq. 10, but a judgement that gives the best score to m responses, the best one among them,
    gets 2 / m - 1, which is what breaking its tie at random would get on average: by Eq. 10 alone a guess pays more
    than a tie, and judges learn to guess by place. order: the scores follow the order of the given rewards, see
    `judge.rule.is_ordered`. both_orders: rollout g of a prompt and rollout g of the same item's other prompt are right
    where both are by Eq. 10, which takes tasks of two orders an item. Unparsable ones are never right; `format_weight`
    is added where a judgement has scores and the three parts.
    """
    groups = [
        [to_rollout(task, judge, completion, rule, format_weight) for completion in completions]
        for task, completions in zip(tasks, answers, strict=True)
    ]
    if rule != "both_orders":
        return groups
    for i in range(0, len(groups), 2):
        if len(tasks[i].order) > 1:  # a single response has one order, and its groups stand for themselves
            one, other = groups[i : i + 2]
            groups[i : i + 2] = _consistent(one, other, format_weight), _consistent(other, one, format_weight)
    return groups


def _consistent(group: Sequence[Rollout], twins: Sequence[Rollout], format_weight: float) -> list[Rollout]:
    return [
        replace(rollout, outcome="inconsistent", reward=_reward("inconsistent", rollout.well_formed, format_weight))
        if rollout.outcome == "correct" and twin.outcome != "correct"
        else rollout
        for rollout, twin in zip(group, twins, strict=True)
    ]


def to_rollout(
    task: JudgeTask, judge: JudgeConfig, completion: Completion, rule: RewardRule, format_weight: float
) -> Rollout:
    """Parse and compare with the truth; an unparsable judgement has its failure as outcome."""
    trajectory = to_trajectory(task, judge, text=completion.text, stop_reason=completion.stop_reason, model="policy")
    outcome = outcome_of(trajectory, task.item, rule)
    well_formed = not trajectory.failure and has_three_parts(after_thinking(trajectory.text) or "")
    share = 1 / trajectory.scores.count(max(trajectory.scores)) if rule == "expected" and outcome == "tied" else 0.0
    return Rollout(
        item_id=task.item.id,
        token_ids=completion.prompt_token_ids + completion.token_ids,
        num_prompt_tokens=len(completion.prompt_token_ids),
        engine_logprobs=completion.logprobs,
        outcome=outcome,
        well_formed=well_formed,
        reward=_reward(outcome, well_formed, format_weight, share),
        stop_reason=completion.stop_reason,
        weight_version=completion.weight_version,
    )


def _reward(outcome: str, well_formed: bool, format_weight: float, share: float = 0.0) -> float:
    return 2 * (1.0 if outcome == "correct" else share) - 1 + format_weight * well_formed


def outcome_of(trajectory: Trajectory, item: Item, rule: RewardRule) -> str:
    """See `Rollout.outcome`; "inconsistent" takes two rollouts and is not found here."""
    if trajectory.failure:
        return trajectory.failure
    if is_correct(trajectory.scores, item.rewards):
        ordered = rule != "order" or is_ordered(trajectory.scores, item.rewards)
        return "correct" if ordered else "misordered"
    best = trajectory.scores[item.best]
    others = [s for i, s in enumerate(trajectory.scores) if i != item.best]
    return "tied" if others and best == max(others) else "wrong"


def has_signal(group: Sequence[Rollout]) -> bool:
    """Whether the rewards of a group differ; else all of its advantages are 0."""
    return len({rollout.reward for rollout in group}) > 1


def sample_groups(
    tasks: Sequence[JudgeTask],
    ask: Callable[[Sequence[JudgeTask]], list[list[Rollout]]],
    num_prompts: int,
    orders_per_item: int = 1,
) -> list[list[Rollout]]:
    """The groups of the first `num_prompts` tasks, and of as many further ones as were without signal, until there are
    `num_prompts` with one or the tasks do not suffice for another round (DAPO's dynamic sampling, arXiv 2503.14476,
    Section 3.2). The number of tasks thus bounds the rounds; with `num_prompts` of them there is one.
    """
    groups = ask(tasks[:num_prompts])
    for _ in range(len(tasks) // num_prompts - 1):
        missing = num_prompts - len(with_signal(groups, orders_per_item))
        if missing == 0:
            break
        groups += ask(tasks[len(groups) : len(groups) + missing])
    return groups


def with_fresh_groups(
    groups: Sequence[list[Rollout]],
    tasks: Sequence[JudgeTask],
    ask: Callable[[Sequence[JudgeTask]], list[list[Rollout]]],
    oldest: int,
    orders_per_item: int = 1,
) -> list[list[Rollout]]:
    """The groups of the first tasks; items with a sample from weights older than version `oldest` are asked again."""
    starts = range(0, len(groups), orders_per_item)
    stale = [
        place
        for start in starts
        if any(r.weight_version < oldest for group in groups[start : start + orders_per_item] for r in group)
        for place in range(start, start + orders_per_item)
    ]
    again = dict(zip(stale, ask([tasks[place] for place in stale]) if stale else (), strict=True))
    return [again.get(place, group) for place, group in enumerate(groups)]


def with_signal(groups: Sequence[Sequence[Rollout]], orders_per_item: int = 1) -> list[Sequence[Rollout]]:
    """The groups that have a signal; the groups of one item stay together."""
    items = [groups[i : i + orders_per_item] for i in range(0, len(groups), orders_per_item)]
    return [group for item in items if any(map(has_signal, item)) for group in item]


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
        "share_well_formed": statistics.fmean(rollout.well_formed for rollout in rollouts),
        "zero_signal_groups": statistics.fmean(not has_signal(group) for group in groups),
        "truncated": statistics.fmean(rollout.stop_reason == "length" for rollout in rollouts),
        "prompt_tokens_mean": statistics.fmean(rollout.num_prompt_tokens for rollout in rollouts),
        "completion_tokens_mean": statistics.fmean(completion_tokens),
        "completion_tokens_max": max(completion_tokens),
        "weight_version": min(rollout.weight_version for rollout in rollouts),
    }
