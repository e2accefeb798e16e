"""The numbers of a report: a block per benchmark, with an entry per judge and paired differences.

All numbers come from the same samples and greedy judgements. Intervals are 95 % percentiles of a bootstrap over
questions (rows of the benchmark) that also draws which k of the K samples vote. Axes: I items, R draws, K samples,
B bootstrap resamples.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spct_ray.evaluation import statistics, votes
from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Scoring
from spct_ray.evaluation.compute import Rates, cost, pareto
from spct_ray.evaluation.judgements import Decision, Floats, Ints, ScoreTable, Sheet, decided, winners
from spct_ray.evaluation.votes import FILTERS, GUIDED, PLAIN
from spct_ray.judge.modes import MODES
from spct_ray.judge.prompt import JudgeConfig, scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Item, Trajectory

ADAPTIVE_ERRORS = (0.01, 0.05)  # `error` of spct_ray.judge.adaptive; the service's default is the first
VOTES = {"vote": "sum", "meta_vote": "meta_top", "weighted_vote": "meta_weighted"}  # key of a block -> aggregator
AGGREGATORS = {  # for display
    "sum": "sum",
    "mean": "mean",
    "median": "median",
    "majority": "majority",
    "best_by_meta": "best by meta",
    "meta_top": "meta top-k",
    "meta_weighted": "meta-weighted",
}
LABELS = {"base": "base", "rft": "RFT", "grpo": "GRPO"}  # of a run's judges; others keep their names


@dataclass(frozen=True)
class Counting:
    """How votes are counted. `ks`: numbers of samples to vote with; a meta vote keeps `k_meta_share` of them. Numbers
    that are no exact mean average `num_draws` draws; intervals take `resamples`."""

    ks: tuple[int, ...] = (1, 2, 4, 8)
    k_meta_share: float = 0.5
    num_draws: int = 16
    resamples: int = 300

    @property
    def k_max(self) -> int:
        """The largest number of samples of a vote."""
        return max(self.ks)

    def k_meta(self, k: int) -> int:
        """How many of k samples a meta vote sums; at least one."""
        return max(1, int(k * self.k_meta_share))


@dataclass(frozen=True, slots=True)
class Judged:
    """One judge on one benchmark: its sampled judgements, their table, that of its greedy judgements (two orders), and
    its prompt. `samples` is None for a judge that only judged greedily. A scalar reward model has no prompt, and its
    scores are in `greedy`."""

    trajectories: tuple[Trajectory, ...]
    samples: ScoreTable | None
    greedy: ScoreTable
    rates: Rates
    prompt: JudgeConfig | None

    @property
    def votable(self) -> ScoreTable:
        """The samples, or the greedy judgements of a judge that has none."""
        return self.greedy if self.samples is None else self.samples


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark with its items, and how votes on them are counted. `weights_BI` is how often each item was drawn,
    the same for all judges, so that differences are paired."""

    benchmark: Benchmark
    items: tuple[Item, ...]
    counting: Counting
    seed: int
    sheet: Sheet
    weights_BI: Floats

    @classmethod
    def of(cls, benchmark: Benchmark, items: Sequence[Item], counting: Counting, seed: int) -> Task:
        """The task of these items."""
        sheet, rng = Sheet.of(items), np.random.default_rng(derive_seed(seed, "bootstrap"))
        num = sheet.num_questions
        drawn = rng.multinomial(num, np.full(num, 1 / num), size=counting.resamples).astype(np.float64)
        return cls(benchmark, tuple(items), counting, seed, sheet, np.asarray(drawn[:, sheet.question_I]))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one way to decide: its `numbers` in the report, the official score of each bootstrap resample, and
    per item credit and whether it was decided, as means over draws."""

    numbers: dict[str, Any]
    credit_I: Floats
    decided_I: Floats
    resampled_B: Floats


def benchmark_block(task: Task, judged: Mapping[str, Judged], against: Sequence[str] = ()) -> dict[str, Any]:
    """All judges on one benchmark: {"chance", "models": {judge: entry}, "paired", ...}; the judges in `against` are
    compared with chance as well."""
    guess = chance(task)
    blocks = {name: judge_block(task, judge) for name, judge in judged.items()}
    outcomes = {name: ways for name, (_, ways) in blocks.items()}
    models = {name: block for name, (block, _) in blocks.items()}
    points = [
        {"judge": name, "way": way, "k": made["k"], "score": made["score"], **made["cost"]}
        for name, model in models.items()
        for way, made in ways_to_decide(model)
        if made["score"] is not None
    ]
    return {
        "title": task.benchmark.title,
        "num_items": len(task.items),
        "num_questions": task.sheet.num_questions,
        "layout": layout(task.items),
        "absent_subsets": [name for name in task.benchmark.subsets if name not in task.sheet.names],
        "chance": guess.numbers["score"],
        "models": models,
        "points": points,
        "pareto": {axis: pareto([p for p in points if p[axis]], axis) for axis in ("tokens", "flops", "seconds")},
        "paired": paired(outcomes, dict.fromkeys(against, guess), f"vote@{task.counting.k_max}"),
    }


def ways_to_decide(model: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every way to decide of one judge's block by its name, with its entry."""
    ways = [("greedy", model["greedy"])]
    ways += [(f"{key.replace('_', ' ')}@{k}", made) for key in VOTES for k, made in model[key].items()]
    others = ((name, made) for name, made in model["aggregators"].items() if name not in VOTES.values())
    ways += [(AGGREGATORS[name], made) for name, made in others]
    return ways + [(f"adaptive, {name}", made) for name, made in model["adaptive"].items()]


def layout(items: Sequence[Item]) -> dict[str, int]:
    """How many items have n responses, e.g. {"n = 2": 500}."""
    return dict(sorted(Counter(f"n = {len(item.responses)}" for item in items).items()))


def outcome(task: Task, decisions: Sequence[Decision], k: float, spent: Mapping[str, float | None]) -> Outcome:
    """One way to decide by k judgements: its official score with interval and parts, ties, undecided items and cost."""
    sheet, score = task.sheet, task.benchmark.score
    scored = [score(Scoring(sheet, d, np.ones(len(task.items)))) for d in decisions]
    parts = {name: float(np.mean([s[name] for s in scored if name in s])) for name in scored[0]}
    drawn = zip(itertools.cycle(decisions), task.weights_BI, strict=False)
    resampled_B = np.array([score(Scoring(sheet, d, weight_I)).get("score", np.nan) for d, weight_I in drawn])
    credit_I = np.mean([np.nan_to_num(task.benchmark.credit(sheet, d.scores_IO)) for d in decisions], axis=0)
    decided_I = np.mean([decided(d.scores_IO) for d in decisions], axis=0)
    tied = [(winners(sheet, d.scores_IO).sum(axis=-1) > 1).mean() for d in decisions]
    numbers = {
        "score": parts.pop("score", None),
        "ci": None if np.isnan(resampled_B).all() else interval(resampled_B),
        "parts": parts,
        "tie_rate": float(np.mean(tied)),
        "undecided_rate": float(1 - decided_I.mean()),
        "right_of_decided": float(credit_I.sum() / decided_I.sum()) if decided_I.any() else None,
        "k": k,
        "cost": dict(spent),
    }
    return Outcome(numbers, credit_I, decided_I, resampled_B)


def interval(values_B: Floats) -> list[float]:
    """The 95 % interval of a bootstrap's values; those that are not defined do not count."""
    return [float(end) for end in np.nanquantile(values_B, [0.025, 0.975])]


def chance(task: Task, num: int = 50) -> Outcome:
    """A guessing judge: exactly, by equal scores, where a tie is a guess; else the mean of `num` random judges."""
    equal = np.where(task.sheet.option_IO, 1.0, 0.0)
    decisions = [Decision(equal, equal, equal)]
    if task.benchmark.strict:
        rng = np.random.default_rng(0)
        decisions = []
        for _ in range(num):
            scores, other = rng.random(equal.shape), rng.random(equal.shape)
            scores[task.sheet.single_I, 0] = 0.5
            decisions.append(Decision(scores, scores, other))
    return outcome(task, decisions, 0, {})


def judge_block(task: Task, judged: Judged) -> tuple[dict[str, Any], dict[str, Outcome]]:
    """One judge's entry of a benchmark, and the outcome of each of its ways to decide by its name (for `paired`)."""
    table, counting = judged.votable, task.counting
    outcomes = {"greedy": _greedy(task, judged)}
    consistent = judged.greedy if judged.greedy.num_samples > 1 else table  # greedy ones differ only by the order
    compared = {item.id for item in task.items if len(item.responses) > 1}
    histogram = Counter(s for t in judged.trajectories if t.item_id in compared for s in t.scores)
    in_chunks = {t.item_id for t in judged.trajectories if t.num_prompts > 1}
    together = judged.prompt is not None and MODES[judged.prompt.mode].rates_together
    block: dict[str, Any] = {key: {} for key in (*VOTES, "aggregators", "adaptive", "orders", "k_meta")}
    block |= {
        "greedy": outcomes["greedy"].numbers,
        "rates": {
            "parse_rate": float(table.used_IK.mean()),
            "tie_rate": table.tie_rate(),
            "correct_rate": float(table.correct_IK.mean()),
            "position_consistency": consistent.position_consistency(),
            "tokens_per_judgement": float(table.tokens_IK.mean()),
            "greedy_parse_rate": float(judged.greedy.used_IK.mean()),
        },
        "failures": dict(Counter(t.failure for t in judged.trajectories if t.failure).most_common()),
        "num_in_chunks": len(in_chunks) if together else 0,
        "score_histogram": {str(s): histogram[s] for s in sorted(histogram)},
        "margins": margins(task, table, min(counting.k_max, table.num_samples)),
        "num_samples": 0 if judged.samples is None else table.num_samples,
    }
    if judged.samples is not None:
        _add_votes(block, outcomes, task, judged)
    elif judged.prompt is None:  # a scalar reward model's one score stands for its votes, too
        outcomes |= dict.fromkeys((f"vote@{counting.k_max}", f"meta vote@{counting.k_max}"), outcomes["greedy"])
    block["by_subset"] = by_subset(task, outcomes.get(f"vote@{counting.k_max}", outcomes["greedy"]))
    return block, outcomes


def _greedy(task: Task, judged: Judged) -> Outcome:
    """One greedy judgement decides, averaged over orders; where the score needs both orders, both decide together."""
    num, together = judged.greedy.num_samples, task.benchmark.both_orders
    take = np.ones((1, num), dtype=bool) if together else np.eye(num, dtype=bool)
    decisions = votes.decide("sum", judged.greedy, np.broadcast_to(take, (len(task.items), *take.shape)), 1)
    if judged.prompt is None:  # its score does not depend on an order
        decisions = [Decision(d.scores_IO, d.scores_IO, d.scores_IO) for d in decisions]
    k = num if together else 1
    return outcome(task, decisions, k, cost(judged.rates, k, False))


def _add_votes(block: dict[str, Any], outcomes: dict[str, Outcome], task: Task, judged: Judged) -> None:
    """Everything that needs samples: votes over k, aggregators, adaptive k, orders, the meta RM."""
    table, counting, k_max = judged.votable, task.counting, task.counting.k_max
    seed, guided = derive_seed(task.seed, "draws"), table.logits_IK is not None
    takes = {k: votes.draw(table, k, counting.num_draws, seed) for k in counting.ks}

    def vote(name: str, k: int = k_max, keep: int | None = None) -> Outcome:
        decisions = votes.decide(name, table, takes[k], keep or counting.k_meta(k), seed)
        made = outcome(task, decisions, k, cost(judged.rates, k, name in GUIDED))
        if name == "meta_top":
            made.numbers["k_meta"] = keep or counting.k_meta(k)
        return made

    ks = [k for k in counting.ks if k > 1 or not task.benchmark.both_orders]  # one judgement sees one order
    for (key, name), k in itertools.product(VOTES.items(), ks):
        if name == "sum" or guided:
            outcomes[f"{key.replace('_', ' ')}@{k}"] = vote(name, k)
            block[key][str(k)] = outcomes[f"{key.replace('_', ' ')}@{k}"].numbers
    known = {name: block[key].get(str(k_max)) for key, name in VOTES.items()}
    ways = (*PLAIN, *(GUIDED if guided else ())) if k_max in ks else ()
    block["aggregators"] = {name: known.get(name) or vote(name).numbers for name in ways}
    block["adaptive"] = _adaptive(task, judged)
    orders = {k: votes.compare_orders(table, k, derive_seed(task.seed, "orders")) for k in counting.ks}
    block["orders"] = {str(k): comparison for k, comparison in orders.items() if comparison}
    if guided:
        block["meta_rm"] = meta_block(table)
        if k_max in ks:
            filters = {name: vote(name).numbers for name in FILTERS}
            plain, best = known["sum"]["score"], known["meta_top"]["score"]
            gain = 0.0 if plain is None or best is None else best - plain
            # The share of the gain that keeping other samples gives; None where the meta vote gains nothing.
            gains = {n: (made["score"] - plain) / gain if gain > 0 else None for n, made in filters.items()}
            block["meta_rm"] |= {"filters": filters, "gain_by_filter": gains}
            block["k_meta"] = {str(keep): vote("meta_top", keep=keep).numbers for keep in counting.ks}


def _adaptive(task: Task, judged: Judged) -> dict[str, Any]:
    """The service's rule (`spct_ray.judge.adaptive`) on the first k_max samples of each item in the order in which they
    were drawn, plain and guided: the entry, the share of tokens needed, and the share of decisions that differ from
    those of all k_max (ties as probabilities) with its interval."""
    from spct_ray.judge.adaptive import num_needed  # brings scipy, which `spct plan` does not need

    table, k_max, prompt = judged.votable, task.counting.k_max, judged.prompt or JudgeConfig()
    drawn: dict[str, list[Trajectory]] = {item.id: [] for item in task.items}
    for t in sorted(judged.trajectories, key=lambda t: t.sample):
        drawn[t.item_id].append(t)
    scales = [scale_of(len(item.responses), prompt) for item in task.items]
    ways: list[tuple[str, list[Any]]] = [("", [[]] * len(scales))]
    if table.logits_IK is not None:
        ways.append(("meta, ", table.logits_IK[:, :k_max].tolist()))
    by_rule = {}
    for (way, logits), error in itertools.product(ways, ADAPTIVE_ERRORS):
        rows = zip(drawn.values(), logits, scales, strict=True)
        needed_I = np.array([num_needed(ts[:k_max], logits_K, scale, error) for ts, logits_K, scale in rows])
        early, last = (_first(table, k_I, bool(way)) for k_I in (needed_I, np.full(len(scales), k_max)))
        differ_I = np.where(needed_I < k_max, _differ(task.sheet, early.scores_IO, last.scores_IO), 0.0)
        taken_IK = np.arange(table.num_samples) < needed_I[:, None]
        mean_k = float(needed_I.mean())
        made = outcome(task, [early], mean_k, cost(judged.rates, mean_k, bool(way)))
        by_rule[f"{way}error {error:g}"] = made.numbers | {
            "differ_from_k_max": float(differ_I.mean()),
            "differ_ci": interval(task.weights_BI @ differ_I / task.weights_BI.sum(axis=1)),
            "share_of_tokens": float(table.tokens_IK[taken_IK].sum() / max(1, table.tokens_IK[:, :k_max].sum())),
        }
    return by_rule


def _first(table: ScoreTable, k_I: Ints, guided: bool) -> Decision:
    """The vote over the first k_I samples of each item, of which the meta RM keeps half, as in the service."""
    take_I1K = (np.arange(table.num_samples) < k_I[:, None])[:, None]
    (decision,) = votes.decide("meta_top" if guided else "sum", table, take_I1K, np.maximum(1, k_I // 2))
    return decision


def _differ(sheet: Sheet, a_IO: Floats, b_IO: Floats) -> Floats:
    """[I] probability that two votes choose differently when each breaks ties at random."""
    top = [winners(sheet, scores_IO) for scores_IO in (a_IO, b_IO)]
    chosen = [top_IO / np.maximum(1, top_IO.sum(axis=-1, keepdims=True)) for top_IO in top]
    return np.asarray(1 - (chosen[0] * chosen[1]).sum(axis=-1))


def by_subset(task: Task, decided_by: Outcome) -> dict[str, Any]:
    """Share of items right with its interval over questions, for each number of responses and each named subset."""
    sheet = task.sheet
    groups = {f"n = {n}": sheet.num_responses_I == n for n in sorted(set(sheet.num_responses_I.tolist()))}
    groups |= {name: sheet.subset_I == s for s, name in enumerate(sheet.names) if name}
    rows = {}
    for name, inside_I in groups.items():
        drawn_BI = task.weights_BI * inside_I
        drawn_BI = drawn_BI[drawn_BI.any(axis=1)]
        rows[name] = {
            "num_items": int(inside_I.sum()),
            "accuracy": float(decided_by.credit_I[inside_I].mean()),
            "ci": interval(drawn_BI @ decided_by.credit_I / drawn_BI.sum(axis=1)),
        }
    return rows


def margins(task: Task, table: ScoreTable, k: int) -> list[dict[str, float]]:
    """Five bins of equal size by the vote's lead (points per sample, decided items): mean lead, share right, count."""
    scores_IO = votes.decide("mean", table, votes.draw(table, k, 1, task.seed)[:, :1], 1)[0].scores_IO
    held = np.sort(np.where(task.sheet.option_IO, scores_IO, -np.inf), axis=-1)
    rows = np.flatnonzero(decided(scores_IO))
    lead, right = (held[:, -1] - held[:, -2])[rows], task.benchmark.credit(task.sheet, scores_IO)[rows]
    return [
        {"lead": float(lead[part].mean()), "share_right": float(right[part].mean()), "count": len(part)}
        for part in np.array_split(np.argsort(lead, kind="stable"), 5)
        if len(part)
    ]


def meta_block(table: ScoreTable) -> dict[str, Any]:
    """The meta RM by itself on one judge's parsed samples, against Eq. 10: AUC, accuracy at logit 0, calibration; None
    where they are not defined. `auc_without_ties` excludes what Eq. 10 calls wrong at a glance.

    `auc_within_item` compares only samples of one item, which is all that a meta vote asks of the meta RM.
    """
    block: dict[str, Any] = dict.fromkeys(
        ("auc", "auc_without_ties", "ece", "auc_within_item", "accuracy", "share_right")
    )
    block |= {"num_samples": 0, "reliability": []}
    if table.logits_IK is None or not table.used_IK.any():
        return block
    right_IK, strict_IK = table.correct_IK, table.used_IK & ~table.tied_IK
    logits, labels = table.logits_IK[table.used_IK], right_IK[table.used_IK].astype(np.float64)
    probabilities = 1 / (1 + np.exp(-logits))
    of_items = zip(table.logits_IK, right_IK, table.used_IK, strict=True)
    areas = [statistics.auc(logits_K[used_K], right_K[used_K]) for logits_K, right_K, used_K in of_items]
    within = [area for area in areas if area is not None]
    return block | {
        "num_samples": len(logits),
        "auc": statistics.auc(logits, labels),
        "auc_without_ties": statistics.auc(table.logits_IK[strict_IK], right_IK[strict_IK]),
        "auc_within_item": float(np.mean(within)) if within else None,
        "accuracy": float(((logits > 0) == labels).mean()),
        "ece": statistics.ece(probabilities, labels),
        "share_right": float(labels.mean()),
        "reliability": statistics.reliability(probabilities, labels),
    }


def label(name: str) -> str:
    """A judge's name for display."""
    return LABELS.get(name, name)


def paired(
    outcomes: Mapping[str, Mapping[str, Outcome]], guesses: Mapping[str, Outcome], top: str
) -> dict[str, dict[str, Any]]:
    """Differences on the same items by name: judges against chance, against each other in the same way to decide, and
    each judge's ways to decide against each other. Of more than three judges, each is compared with the first."""
    names = list(outcomes)
    pairs = [(f"{label(n)} - chance, greedy", outcomes[n]["greedy"], guess) for n, guess in guesses.items()]
    among = itertools.combinations(names, 2) if len(names) <= 3 else ((names[0], name) for name in names[1:])
    pairs += [
        (f"{label(b)} - {label(a)}, {way}", outcomes[b][way], outcomes[a][way])
        for a, b in among
        for way in ("greedy", "vote@1", top, f"meta {top}")
        if way in outcomes[a] and way in outcomes[b]
    ]
    pairs += [
        (f"{a} - {b}, {label(name)}", ways[a], ways[b])
        for a, b in ((top, "vote@1"), (f"meta {top}", top), (f"weighted {top}", top))
        for name, ways in outcomes.items()
        if a in ways and b in ways and a != b and ways[a] is not ways[b]
    ]
    return {name: difference(a, b) for name, a, b in pairs if a.numbers["score"] is not None}


def difference(a: Outcome, b: Outcome) -> dict[str, Any]:
    """a minus b: the official score, the interval of a bootstrap that draws the same questions for both, and twice the
    share of its resamples on the other side of 0 (at least 1 / (B + 1)) as p; items won and lost, and apart from them
    those that one of the two could not decide."""
    delta_B = (a.resampled_B - b.resampled_B)[~np.isnan(a.resampled_B - b.resampled_B)]
    beyond = 1 + min(int((delta_B <= 0).sum()), int((delta_B >= 0).sum()))
    both = (a.decided_I == 1) & (b.decided_I == 1)
    won, lost = a.credit_I > b.credit_I, a.credit_I < b.credit_I
    return {
        "difference": float(np.float64(a.numbers["score"]) - np.float64(b.numbers["score"])),
        "ci": interval(delta_B),
        "p_value": min(1.0, 2 * beyond / (1 + len(delta_B))),
        "won": int((won & both).sum()),
        "lost": int((lost & both).sum()),
        "equal": int((~won & ~lost & both).sum()),
        "undecided": int((~both).sum()),
    }
