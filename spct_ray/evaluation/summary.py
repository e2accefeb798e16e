"""The blocks of summary.json: what one judge did on one set of items, and what the meta RM is worth by itself.

Leaves out reading and writing files; see `spct_ray.stages.report`. Axes: I items, K samples.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spct_ray.evaluation import curves, metrics
from spct_ray.evaluation.curves import Floats, ScoreTable, Votes
from spct_ray.evaluation.terminal import LABELS
from spct_ray.records import Item, Trajectory


@dataclass(frozen=True, slots=True)
class Judged:
    """One judge on one set of items: its samples and their table, and the table of its greedy judgements.

    A judge without samples has its greedy judgements in place of them.
    """

    items: tuple[Item, ...]
    trajectories: tuple[Trajectory, ...]
    samples: ScoreTable
    greedy: ScoreTable

    @property
    def has_samples(self) -> bool:
        """Whether there is anything to vote with."""
        return self.samples is not self.greedy


@dataclass(frozen=True, slots=True)
class Counting:
    """How votes are counted: numbers of samples k, share of them kept by a meta vote, seed, bootstrap resamples."""

    ks: tuple[int, ...]
    k_meta_share: float
    seed: int
    resamples: int

    def k_meta(self, k: int) -> int:
        """How many of k samples a meta vote sums; at least one."""
        return max(1, int(k * self.k_meta_share))


def model_block(judged: Judged, counting: Counting) -> tuple[dict[str, Any], dict[str, Floats]]:
    """One judge's entry of summary.json, and its accuracy an item [I] under each way to decide (for `paired`)."""
    table, k_max, ks = judged.samples, max(counting.ks), counting.ks if judged.has_samples else ()

    def entry(votes: Votes) -> dict[str, Any]:
        return votes.summary(counting.seed, counting.resamples)

    greedy = curves.vote_curve_point(judged.greedy, 1)
    votes = {k: curves.vote_curve_point(table, k) for k in ks}
    meta: dict[int, Votes] = {}
    weighted: dict[int, Votes] = {}
    if table.logits_IK is not None:
        meta = {k: curves.vote_curve_point(table, k, counting.k_meta(k)) for k in ks}
        weighted = {k: curves.vote_curve_point(table, k, weighted=True) for k in ks}
    accuracies = {"greedy": greedy.accuracy_I}
    accuracies |= {f"vote@{k}": votes[k].accuracy_I for k in (1, k_max) if k in votes}
    if meta:
        accuracies[f"meta vote@{k_max}"] = meta[k_max].accuracy_I
        accuracies[f"weighted vote@{k_max}"] = weighted[k_max].accuracy_I
    compared = {item.id for item in judged.items if len(item.responses) > 1}
    histogram = Counter(s for t in judged.trajectories if t.item_id in compared for s in t.scores)
    block = curves.rates(table)
    if judged.greedy.num_samples > 1:  # samples differ by chance as well as by the order
        block["position_consistency"] = curves.position_consistency(judged.greedy)
    block |= {
        "greedy": entry(greedy) | {"parse_rate": float(judged.greedy.used_IK.mean())},
        "vote": {str(k): entry(v) for k, v in votes.items()},
        "meta_vote": {str(k): entry(v) | {"k_meta": counting.k_meta(k)} for k, v in meta.items()},
        "weighted_vote": {str(k): entry(v) for k, v in weighted.items()},
        "by_subset": by_subset(judged.items, votes.get(k_max, greedy).accuracy_I, counting),
        "failures": dict(Counter(t.failure for t in judged.trajectories if t.failure).most_common()),
        "score_histogram": {str(s): histogram[s] for s in sorted(histogram)},
        "num_samples": table.num_samples if judged.has_samples else 0,
    }
    return block, accuracies


def by_subset(items: Sequence[Item], accuracy_I: Floats, counting: Counting) -> dict[str, Any]:
    """Accuracy with its interval for each number of responses and each named subset."""
    groups: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(f"n = {len(item.responses)}", []).append(i)
    subsets: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        if item.subset:
            subsets.setdefault(item.subset, []).append(i)
    chosen = dict(sorted(groups.items())) | dict(sorted(subsets.items()))
    return {
        name: {
            "num_items": len(members),
            "accuracy": float(accuracy_I[members].mean()),
            "ci": list(metrics.bootstrap_ci(accuracy_I[members], counting.seed, counting.resamples)),
        }
        for name, members in chosen.items()
    }


def paired(accuracies: Mapping[str, Mapping[str, Floats]], chance_I: Floats, counting: Counting) -> dict[str, Any]:
    """Trained judges against chance, each judge against the one before it, and each judge's ways to decide against each
    other, all on the same items."""
    names, top = list(accuracies), f"vote@{max(counting.ks)}"
    pairs = [
        (f"{LABELS[name]} - chance, greedy", accuracies[name]["greedy"], chance_I) for name in names if name != "base"
    ]
    pairs += [
        (f"{LABELS[b]} - {LABELS[a]}, {way}", accuracies[b][way], accuracies[a][way])
        for a, b in itertools.pairwise(names)
        for way in ("greedy", "vote@1", top)
        if way in accuracies[a]
    ]
    pairs += [
        (f"{a} - {b}, {LABELS[name]}", ways[a], ways[b])
        for a, b in ((top, "vote@1"), (f"meta {top}", top), (f"weighted {top}", top))
        for name, ways in accuracies.items()
        if a in ways and b in ways and a != b
    ]
    differences = ((name, metrics.paired_difference(a, b, counting.seed, counting.resamples)) for name, a, b in pairs)
    return {name: dataclasses.asdict(difference) for name, difference in differences}


def meta_logits(table: ScoreTable) -> tuple[Floats, Floats]:
    """Logits of the parsed samples, and their labels by Eq. 10 (1 right, 0 wrong); empty without meta RM."""
    if table.logits_IK is None:
        return np.empty(0), np.empty(0)
    return table.logits_IK[table.used_IK], curves.correct_samples(table)[table.used_IK].astype(np.float64)


def meta_block(table: ScoreTable) -> dict[str, Any]:
    """The meta RM by itself on one judge's parsed samples, against Eq. 10: AUC, accuracy at logit 0, calibration; None
    where they are not defined. `auc_without_ties` leaves out what Eq. 10 calls wrong at a glance.

    `auc_within_item` compares only samples of one item, which is all that a meta vote asks of the meta RM.
    """
    logits, labels = meta_logits(table)
    block: dict[str, Any] = dict.fromkeys(
        ("auc", "auc_without_ties", "ece", "auc_within_item", "accuracy", "share_right")
    )
    block |= {"num_samples": len(logits), "reliability": []}
    if table.logits_IK is None or not len(logits):
        return block
    probabilities = 1 / (1 + np.exp(-logits))
    block |= {
        "accuracy": float(((logits > 0) == labels).mean()),
        "ece": metrics.ece(probabilities, labels),
        "share_right": float(labels.mean()),
        "reliability": [dataclasses.asdict(b) for b in metrics.reliability(probabilities, labels)],
    }
    if 0 < labels.sum() < len(labels):
        block["auc"] = metrics.auc(logits, labels)
    right_IK = curves.correct_samples(table)
    strict_IK = table.used_IK & ~curves.tied_samples(table)
    if 0 < right_IK[strict_IK].sum() < strict_IK.sum():
        block["auc_without_ties"] = metrics.auc(table.logits_IK[strict_IK], right_IK[strict_IK].astype(np.float64))
    within = [
        metrics.auc(logits_K[used_K], right_K[used_K])
        for logits_K, right_K, used_K in zip(table.logits_IK, right_IK, table.used_IK, strict=True)
        if 0 < right_K[used_K].sum() < used_K.sum()
    ]
    if within:
        block["auc_within_item"] = float(np.mean(within))
    return block
