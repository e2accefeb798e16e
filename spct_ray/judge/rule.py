"""Eq. 10, the rule behind rejection sampling, the RL reward and the meta-RM labels; and the rejection itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spct_ray.records import Item, Trajectory


def is_correct(scores: Sequence[int], rewards: Sequence[float]) -> bool:
    """Whether predicted `scores` [N] single out the truly best response, both in the item's order (Eq. 10).

    n >= 2: the best response must score strictly above every other (a tie is wrong; the order of the rest is
    ignored). n == 1: the score must equal the 0/1 reward. Raises ValueError unless the lengths agree.
    """
    if len(scores) != len(rewards) or not scores:
        raise ValueError(f"{len(scores)} scores for {len(rewards)} rewards: both must have one value per response")
    if len(scores) == 1:
        return scores[0] == rewards[0]
    best = max(range(len(rewards)), key=rewards.__getitem__)
    return all(scores[best] > score for i, score in enumerate(scores) if i != best)


def is_tied(scores: Sequence[int]) -> bool:
    """Whether several responses share the highest of `scores` [N]."""
    return scores.count(max(scores)) > 1


def is_ordered(scores: Sequence[int], rewards: Sequence[float]) -> bool:
    """Whether `scores` [N] rank the responses as `rewards` do: r_i > r_k requires S_i > S_k for every i, k.

    Responses with equal rewards may have any scores. Equal to `is_correct` for n <= 2 and wherever all but the best
    response have equal rewards; for n == 1 the score must equal the reward.
    """
    if len(scores) == 1:
        return is_correct(scores, rewards)
    pairs = list(zip(scores, rewards, strict=True))
    return all(s > t for s, r in pairs for t, q in pairs if r > q)


def reward(scores: Sequence[int], rewards: Sequence[float]) -> float:
    """Rule-based reward of one rollout (Eq. 11): +1 if correct, else -1; no scores (unparsable) is -1 too."""
    return 1.0 if scores and is_correct(scores, rewards) else -1.0


@dataclass(frozen=True, slots=True)
class Selection:
    """The accepted trajectories of one item, and counts by reason."""

    accepted: tuple[Trajectory, ...]
    counts: dict[str, int]


def select(item: Item, trajectories: Sequence[Trajectory], reject_easy: bool = True) -> Selection:
    """Eq. 10 and Section 4.1: reject every incorrect sample, and (`reject_easy`) an item whose unhinted ones are all
    correct.

    A hinted sample is rejected only when incorrect (or with its too-easy item). Unparsable samples are rejected under
    their failure's name.
    """
    counts: Counter[str] = Counter()
    correct = {t.key: not t.failure and is_correct(t.scores, item.rewards) for t in trajectories}
    unhinted = [t for t in trajectories if not t.hinted]
    too_easy = reject_easy and bool(unhinted) and all(correct[t.key] for t in unhinted)
    accepted = []
    for t in trajectories:
        reason = t.failure or ("incorrect" if not correct[t.key] else "too_easy" if too_easy else "accepted")
        counts[f"{'hinted' if t.hinted else 'unhinted'}_{reason}"] += 1
        if reason == "accepted":
            accepted.append(t)
    return Selection(tuple(accepted), dict(counts))
