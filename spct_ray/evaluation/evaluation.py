"""The blocks of an evaluation's summary.json: one judge on one benchmark, and two judges against each other.

All numbers come from one set of samples and one set of greedy judgements an item. Intervals are 95 % percentiles of a
bootstrap over questions (rows of the benchmark) that also draws which k of the K samples were taken. Axes: I items,
Q questions, R draws, K samples.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spct_ray.evaluation import aggregate, curves, metrics, orders, summary
from spct_ray.evaluation.aggregate import FILTERS, GUIDED, PLAIN
from spct_ray.evaluation.compute import Rates, cost
from spct_ray.evaluation.curves import Floats, Ints, ScoreTable
from spct_ray.evaluation.registry import Benchmark
from spct_ray.evaluation.sheet import Decision, Sheet, decided
from spct_ray.judge.adaptive import num_needed
from spct_ray.judge.modes import MODES
from spct_ray.judge.prompt import JudgeConfig, scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Item, Trajectory

ADAPTIVE_ERRORS = (0.01, 0.05)  # `error` of spct_ray.judge.adaptive; the service's default is the first


@dataclass(frozen=True, slots=True)
class Counting(summary.Counting):
    """The same, and how many draws of k samples each number is a mean over."""

    num_draws: int

    @property
    def k_max(self) -> int:
        """The largest number of samples of a vote."""
        return max(self.ks)


@dataclass(frozen=True, slots=True)
class Judged:
    """One judge's sampled judgements of one benchmark, the tables of these and of its greedy ones (two orders), and its
    prompt. A scalar reward model has no judgements and no prompt, and one sample in both tables."""

    trajectories: tuple[Trajectory, ...]
    samples: ScoreTable
    greedy: ScoreTable
    rates: Rates
    prompt: JudgeConfig | None


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark with its items."""

    benchmark: Benchmark
    items: tuple[Item, ...]
    sheet: Sheet


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way to decide came to: the official score, also of each bootstrap resample; per-item credit, and whether
    the item was decided, both means over draws [I]."""

    score: float | None
    credit_I: Floats
    decided_I: Floats
    resampled: Floats


def weights(task: Task, counting: Counting) -> Floats:
    """[resamples, I] how often each item was drawn; the same for every judge, so that differences pair up."""
    rng = np.random.default_rng(derive_seed(counting.seed, "bootstrap"))
    num = task.sheet.num_questions
    drawn = rng.multinomial(num, np.full(num, 1 / num), size=counting.resamples).astype(np.float64)
    return np.asarray(drawn[:, task.sheet.question_I])


def entry(
    task: Task, decisions: Sequence[Decision], weights_BI: Floats, k: float, spent: Mapping[str, float | None]
) -> tuple[dict[str, Any], Outcome]:
    """One way to decide: its official score with interval and parts, ties, undecided items and cost."""
    ones = np.ones(len(task.items))
    scored = [task.benchmark.score(task.sheet, d, ones) for d in decisions]
    parts = {name: float(np.mean([s[name] for s in scored if name in s])) for name in scored[0]}
    resampled = np.array(
        [
            task.benchmark.score(task.sheet, decisions[b % len(decisions)], weight_I).get("score", np.nan)
            for b, weight_I in enumerate(weights_BI)
        ]
    )
    credit_I = np.mean([np.nan_to_num(task.benchmark.credit(task.sheet, d.scores_IO)) for d in decisions], axis=0)
    decided_I = np.mean([decided(d.scores_IO) for d in decisions], axis=0)
    made: dict[str, Any] = {
        "score": parts.pop("score", None),
        "ci": np.nanquantile(resampled, [0.025, 0.975]).tolist() if not np.isnan(resampled).all() else None,
        "parts": parts,
        "tie_rate": float(np.mean([_tied(task.sheet, d.scores_IO) for d in decisions])),
        "undecided_rate": float(1 - decided_I.mean()),
        "right_of_decided": float(credit_I.sum() / decided_I.sum()) if decided_I.any() else None,
        "k": k,
        "cost": dict(spent),
    }
    return made, Outcome(made["score"], credit_I, decided_I, resampled)


def _tied(sheet: Sheet, scores_IO: Floats) -> float:
    """Share of the items whose highest score is shared."""
    held = np.where(sheet.option_IO, scores_IO, -np.inf)
    return float(((held == held.max(axis=-1, keepdims=True)).sum(axis=-1) > 1).mean())


def judge_block(
    task: Task, judged: Judged, weights_BI: Floats, counting: Counting
) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """One judge's entry of a benchmark, and the outcomes of its greedy judgements and votes (for `paired`)."""
    if judged.prompt is None:
        return _scalar_block(task, judged, weights_BI, counting)
    table, seed = judged.samples, derive_seed(counting.seed, "draws")
    outcomes: dict[str, Outcome] = {}

    def vote(name: str, k: int) -> dict[str, Any] | None:
        if task.benchmark.both_orders and k < 2:
            return None  # one judgement sees one order
        take = aggregate.draw(table, k, counting.num_draws, seed)
        decisions = aggregate.decide(name, table, take, counting.k_meta(k), seed)
        spent = cost(judged.rates, k, name in GUIDED)
        made, outcomes[f"{name}@{k}"] = entry(task, decisions, weights_BI, k, spent)
        return made | ({"k_meta": counting.k_meta(k)} if name == "meta_top" else {})

    def votes(name: str) -> dict[str, Any]:
        return {str(k): made for k in counting.ks if (made := vote(name, k))}

    guided, k_max = table.logits_IK is not None, counting.k_max
    # One greedy judgement decides, and the two orders are averaged; only where the score asks for both, both decide.
    num_greedy, together = judged.greedy.num_samples, task.benchmark.both_orders
    take = np.ones((1, num_greedy), dtype=bool) if together else np.eye(num_greedy, dtype=bool)
    greedy_decisions = aggregate.decide("sum", judged.greedy, np.broadcast_to(take, (len(task.items), *take.shape)), 1)
    k_greedy = num_greedy if together else 1
    greedy, outcomes["greedy"] = entry(
        task, greedy_decisions, weights_BI, k_greedy, cost(judged.rates, k_greedy, False)
    )
    block: dict[str, Any] = {
        "greedy": greedy,
        "vote": votes("sum"),
        "meta_vote": votes("meta_top") if guided else {},
        "aggregators": {name: vote(name, k_max) for name in (*PLAIN, *(GUIDED if guided else ()))},
        "adaptive": _adaptive(task, judged, judged.prompt, weights_BI, counting),
        "rates": curves.rates(table) | {"greedy_parse_rate": float(judged.greedy.used_IK.mean())},
        "failures": dict(Counter(t.failure for t in judged.trajectories if t.failure).most_common()),
        "num_in_chunks": _num_in_chunks(judged.trajectories, judged.prompt),
        "by_subset": _by_subset(task, outcomes[f"sum@{k_max}"]),
        "score_histogram": _histogram(judged.trajectories),
        "margins": margins(task, table, k_max, counting.seed),
        "orders": {
            str(k): found
            for k in counting.ks
            if (found := orders.compare_orders(table, task.sheet, k, derive_seed(counting.seed, "orders")))
        },
        "num_samples": table.num_samples,
    }
    if guided:
        block["meta_rm"] = summary.meta_block(table) | {"filters": {name: vote(name, k_max) for name in FILTERS}}
        block["meta_rm"]["gain_by_filter"] = gain_by_filter(block, k_max)
        block["k_meta"] = _k_meta(task, judged, weights_BI, counting)
    return block, outcomes


def _k_meta(task: Task, judged: Judged, weights_BI: Floats, counting: Counting) -> dict[str, Any]:
    """The meta vote over the largest k, for each of `counting.ks` as the number of samples that it keeps."""
    k_max, seed = counting.k_max, derive_seed(counting.seed, "draws")
    take = aggregate.draw(judged.samples, k_max, counting.num_draws, seed)
    spent = cost(judged.rates, k_max, True)
    return {
        str(keep): entry(task, aggregate.decide("meta_top", judged.samples, take, keep), weights_BI, k_max, spent)[0]
        for keep in counting.ks
    }


def _scalar_block(
    task: Task, judged: Judged, weights_BI: Floats, counting: Counting
) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """The same for a scalar reward model, whose one score stands under "greedy", and in comparisons for a vote too."""
    scores_IO = np.where(judged.samples.option_IO, judged.samples.scores_IKO[:, 0], 0.0)
    decision = Decision(scores_IO, scores_IO, scores_IO)
    made, outcome = entry(task, [decision], weights_BI, 1, cost(judged.rates, 1, False))
    empty: dict[str, Any] = {key: {} for key in ("vote", "meta_vote", "aggregators", "adaptive", "failures", "orders")}
    block = empty | {
        "greedy": made,
        "rates": curves.rates(judged.samples) | {"greedy_parse_rate": 1.0},
        "by_subset": _by_subset(task, outcome),
        "score_histogram": {},
        "num_in_chunks": 0,
        "margins": margins(task, judged.samples, 1, counting.seed),
        "num_samples": 1,
    }
    return block, {"greedy": outcome, f"sum@{counting.k_max}": outcome, f"meta_top@{counting.k_max}": outcome}


def _adaptive(
    task: Task, judged: Judged, prompt: JudgeConfig, weights_BI: Floats, counting: Counting
) -> dict[str, Any]:
    """The served rule (`spct_ray.judge.adaptive`) on the first k_max samples of each item, in the order in which they
    were drawn, plain and guided: beside the entry, the share of the tokens that it needed, and the share of decisions
    that differ from those of all k_max (chance ties counted as chances), with its interval."""
    table, k_max = judged.samples, counting.k_max
    drawn: dict[str, list[Trajectory]] = {item.id: [] for item in task.items}
    for t in sorted(judged.trajectories, key=lambda t: t.sample):
        drawn[t.item_id].append(t)
    scales = [scale_of(len(item.responses), prompt) for item in task.items]
    ways: list[tuple[str, list[Any]]] = [("", [[]] * len(scales))]
    if table.logits_IK is not None:
        ways.append(("meta, ", table.logits_IK[:, :k_max].tolist()))
    found = {}
    for (way, logits), error in itertools.product(ways, ADAPTIVE_ERRORS):
        asked = zip(drawn.values(), logits, scales, strict=True)
        needed_I = np.array([num_needed(made[:k_max], logits_K, scale, error) for made, logits_K, scale in asked])
        early, last = (_first(table, k_I, bool(way)) for k_I in (needed_I, np.full(len(scales), k_max)))
        differ_I = np.where(needed_I < k_max, _differ(task.sheet, early.scores_IO, last.scores_IO), 0.0)
        differ_B = weights_BI @ differ_I / weights_BI.sum(axis=1)
        taken_IK = np.arange(table.num_samples) < needed_I[:, None]
        mean_k = float(needed_I.mean())
        made, _ = entry(task, [early], weights_BI, mean_k, cost(judged.rates, mean_k, bool(way)))
        found[f"{way}error {error:g}"] = made | {
            "differ_from_k_max": float(differ_I.mean()),
            "differ_ci": np.quantile(differ_B, [0.025, 0.975]).tolist(),
            "share_of_tokens": float(table.tokens_IK[taken_IK].sum() / max(1, table.tokens_IK[:, :k_max].sum())),
        }
    return found


def _first(table: ScoreTable, k_I: Ints, guided: bool) -> Decision:
    """The vote over the first k_I samples of each item, of which the meta RM keeps half as it does when serving."""
    take_I1K = (np.arange(table.num_samples) < k_I[:, None])[:, None]
    (decision,) = aggregate.decide("meta_top" if guided else "sum", table, take_I1K, np.maximum(1, k_I // 2))
    return decision


def _differ(sheet: Sheet, a_IO: Floats, b_IO: Floats) -> Floats:
    """[I] chance that two votes choose differently when each breaks its ties at random."""
    chosen = []
    for scores_IO in (a_IO, b_IO):
        held = np.where(sheet.option_IO, scores_IO, -np.inf)
        top_IO = held == held.max(axis=-1, keepdims=True)
        chosen.append(top_IO / np.maximum(1, top_IO.sum(axis=-1, keepdims=True)))
    return np.asarray(1 - (chosen[0] * chosen[1]).sum(axis=-1))


def _by_subset(task: Task, outcome: Outcome) -> dict[str, Any]:
    rows = {}
    for s, name in enumerate(task.sheet.names):
        inside = task.sheet.subset_I == s
        low, high = metrics.bootstrap_ci(outcome.credit_I[inside], 0)
        rows[name or "all"] = {
            "num_items": int(inside.sum()),
            "accuracy": float(outcome.credit_I[inside].mean()),
            "ci": [low, high],
        }
    return rows


def _num_in_chunks(trajectories: Sequence[Trajectory], prompt: JudgeConfig) -> int:
    """Items whose responses did not fit one prompt and were judged in several."""
    if not MODES[prompt.mode].rates_together:
        return 0
    return len({t.item_id for t in trajectories if t.num_prompts > 1})


def _histogram(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    found = Counter(s for t in trajectories for s in t.scores)
    return {str(s): found[s] for s in sorted(found)}


def margins(task: Task, table: ScoreTable, k: int, seed: int) -> list[dict[str, float]]:
    """Five bins of equal size of the vote's lead (points a sample, of decided items): mean lead, share right, count."""
    take = aggregate.draw(table, k, 1, seed)[:, :1]
    (decision,) = aggregate.decide("mean", table, take, 1)
    held = np.sort(np.where(task.sheet.option_IO, decision.scores_IO, -np.inf), axis=-1)
    rows = np.flatnonzero(decided(decision.scores_IO))
    lead, right = (held[:, -1] - held[:, -2])[rows], task.benchmark.credit(task.sheet, decision.scores_IO)[rows]
    order = np.argsort(lead, kind="stable")
    return [
        {"lead": float(lead[part].mean()), "share_right": float(right[part].mean()), "count": len(part)}
        for part in np.array_split(order, 5)
        if len(part)
    ]


def gain_by_filter(block: Mapping[str, Any], k: int) -> dict[str, float | None]:
    """Share of the meta vote's gain over the plain vote of k that keeping as many samples without a meta RM gives:
    at random, or by length. None where the meta vote gains nothing."""
    plain, guided = block["vote"][str(k)]["score"], block["meta_vote"][str(k)]["score"]
    filters = block["meta_rm"]["filters"]
    gain = guided - plain
    return {name: (filters[name]["score"] - plain) / gain if gain > 0 else None for name in FILTERS}


def paired(
    a: Mapping[str, Outcome], b: Mapping[str, Outcome], ways: Sequence[str], task: Task, counting: Counting
) -> dict[str, Any]:
    """Judge b minus judge a on the same items, for each way to decide.

    Official score with the interval of a bootstrap that draws the same questions for both; p by sign flips of the
    questions' mean credit; items won and lost, and apart from them those that only one could decide.
    """
    rows = {}
    for way in ways:
        if way not in a or way not in b or None in (a[way].score, b[way].score):
            continue
        difference = b[way].resampled - a[way].resampled
        low, high = np.nanquantile(difference, [0.025, 0.975])
        members = np.bincount(task.sheet.question_I)
        credit_b, credit_a = (np.bincount(task.sheet.question_I, o[way].credit_I) / members for o in (b, a))
        test = metrics.paired_difference(credit_b, credit_a, counting.seed)
        both = (a[way].decided_I == 1) & (b[way].decided_I == 1)
        won, lost = b[way].credit_I > a[way].credit_I, b[way].credit_I < a[way].credit_I
        rows[way] = {
            "difference": float(np.float64(b[way].score) - np.float64(a[way].score)),
            "ci": [float(low), float(high)],
            "p_value": test.p_value,
            "won": int((won & both).sum()),
            "lost": int((lost & both).sum()),
            "equal": int((~won & ~lost & both).sum()),
            "undecided": int((~both).sum()),
        }
    return rows


def chance(task: Task, num: int = 50) -> float | None:
    """Official score of a judge that scores at random: mean over `num` such judges."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(num):
        scores, other = rng.random(task.sheet.option_IO.shape), rng.random(task.sheet.option_IO.shape)
        scores[task.sheet.single_I, 0] = 0.5
        decision = Decision(scores, scores, other)
        found.append(task.benchmark.score(task.sheet, decision, np.ones(len(task.items))).get("score", np.nan))
    return None if np.isnan(found).all() else float(np.nanmean(found))
