"""Rejective selection of the cold start: which judgements become SFT targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from spct_ray.judge.rule import is_correct
from spct_ray.records import Item, Trajectory


@dataclass(frozen=True, slots=True)
class Selection:
    """Of one item: accepted trajectories, and counts by reason."""

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
        kind = "hinted" if t.hinted else "unhinted"
        if t.failure:
            counts[f"{kind}_{t.failure}"] += 1
        elif not correct[t.key]:
            counts[f"{kind}_incorrect"] += 1
        elif too_easy:
            counts[f"{kind}_too_easy"] += 1
        else:
            counts[f"{kind}_accepted"] += 1
            accepted.append(t)
    return Selection(tuple(accepted), dict(counts))
