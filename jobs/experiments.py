"""Asks the open questions of SPCT of the built-in world: every file of conf/experiments, over several seeds.

    python jobs/experiments.py run --root runs/experiments [--seeds 1 2 3 4 5] [--jobs 2] [--only NAME ...]
    python jobs/experiments.py table --root runs/experiments

`run` is a queue of `spct run`, `--jobs` at a time on one thread each; for each seed the demo comes first, because the
others reuse its steps. Stopped and started again, it goes on where it was. `table` reads what is there: an effect is
the mean over seeds of a difference within a seed, its 95 % interval Student's t over the seeds, each of which has
items, weights and samples of its own.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from spct_ray.cluster.sampling import read_trajectories
from spct_ray.data.store import read_items
from spct_ray.evaluation import judgements, votes
from spct_ray.evaluation.judgements import ScoreTable, best_credit
from spct_ray.evaluation.results import meta_block
from spct_ray.records import Item, Trajectory
from spct_ray.stages.report import judge_logits

DEMO = "demo"
Cell = tuple[str, str, str, str]  # run, judge, set of items, measure
Effects = dict[str, tuple[Cell, Cell]]


@dataclass(frozen=True)
class Experiment:
    """`until`: the last steps that it needs. `effects`: differences of cells, the first minus the second, by label."""

    until: tuple[str, ...]
    effects: Mapping[str, tuple[Cell, Cell]]
    reuse: str = DEMO
    question: str = ""
    alone: Mapping[str, Cell] = field(default_factory=dict)  # values that are no difference


def _versus(
    name: str, judges: Sequence[str], measures: Sequence[str], other: str = DEMO
) -> dict[str, tuple[Cell, Cell]]:
    """The experiment against `other`, for each judge and measure."""
    return {
        f"{judge.upper()}, {measure}": ((name, judge, "heldout", measure), (other, judge, "heldout", measure))
        for judge in judges
        for measure in measures
    }


def _within(run: str, judge: str, items: str, *pairs: tuple[str, str]) -> Effects:
    where = "" if items == "heldout" else f", {items}"
    return {f"{judge.upper()}: {a} - {b}{where}": ((run, judge, items, a), (run, judge, items, b)) for a, b in pairs}


_ACCURACY = ("one sample", "vote@8")
_VOTES = (("vote@8", "one sample"), ("meta@8", "vote@8"), ("weighted@8", "vote@8"))
_SETS = ("heldout", "two_requirements", "five_requirements", "three_responses")
EXPERIMENTS = {
    DEMO: Experiment(
        ("report",),
        {
            **{
                f"GRPO - RFT, {m}": ((DEMO, "grpo", "heldout", m), (DEMO, "rft", "heldout", m))
                for m in ("greedy", "one sample", "vote@8", "position consistency")
            },
            **_within(DEMO, "rft", "heldout", ("vote@8", "one sample"), ("meta@8", "vote@8"), ("weighted@8", "vote@8")),
            **_within(
                DEMO, "grpo", "heldout", ("vote@8", "one sample"), ("meta@8", "vote@8"), ("weighted@8", "vote@8")
            ),
        },
        question="The stages of the demo",
        alone={
            f"{judge.upper()}, {m}": (DEMO, judge, "heldout", m)
            for judge in ("rft", "grpo")
            for m in ("greedy", *_ACCURACY, "meta@8", "weighted@8", "n = 3, vote@8", "parsed", "position consistency")
        },
    ),
    "no_hinted": Experiment(
        ("evaluate_rft",), _versus("no_hinted", ("rft",), _ACCURACY), question="No hinted samples in the cold start"
    ),
    "no_easy_rejection": Experiment(
        ("evaluate_rft",),
        _versus("no_easy_rejection", ("rft",), _ACCURACY),
        question="Too easy items stay in the cold start",
    ),
    "no_principles": Experiment(
        ("evaluate_rft", "evaluate_grpo"),
        _versus("no_principles", ("rft", "grpo"), _ACCURACY),
        question="Judgements without principles",
    ),
    "beta_0": Experiment(
        ("evaluate_grpo",), _versus("beta_0", ("grpo",), (*_ACCURACY, "parsed")), question="No KL term in GRPO"
    ),
    "beta_high": Experiment(
        ("evaluate_grpo",), _versus("beta_high", ("grpo",), (*_ACCURACY, "parsed")), question="A large KL term in GRPO"
    ),
    "format_reward": Experiment(
        ("evaluate_grpo",),
        _versus("format_reward", ("grpo",), (*_ACCURACY, "parsed")),
        question="A format reward in GRPO",
    ),
    "reward_best": Experiment(
        ("evaluate_grpo",),
        _versus("reward_best", ("grpo",), (*_ACCURACY, "position consistency", "tied")),
        question="Eq. 10 as GRPO's reward, in place of what breaking ties at random would get",
    ),
    "both_orders": Experiment(
        ("evaluate_grpo",),
        _versus("both_orders", ("grpo",), (*_ACCURACY, "position consistency", "tied")),
        question="A rollout is right only where it is in both orders of the responses",
    ),
    "graded": Experiment(("evaluate_rft", "evaluate_grpo"), {}, reuse="", question=""),
    "reward_order": Experiment(
        ("evaluate_grpo",),
        _versus("reward_order", ("grpo",), (*_ACCURACY, "pairs in order"), "graded"),
        reuse="graded",
        question="n = 3, all ranked: a reward for the whole order, in place of the best alone",
    ),
    "meta_off_policy": Experiment(
        ("meta_scores",),
        _versus("meta_off_policy", ("rft", "grpo"), ("weighted@8", "AUC without ties")),
        question="A meta RM of cold-start judgements alone",
    ),
    "meta_on_policy": Experiment(
        ("meta_scores",),
        _versus("meta_on_policy", ("rft", "grpo"), ("weighted@8", "AUC without ties")),
        question="A meta RM of on-policy judgements alone",
    ),
    "meta_ties": Experiment(
        ("meta_scores",),
        _versus("meta_ties", ("rft", "grpo"), ("meta@8", "weighted@8", "AUC without ties")),
        question="A meta RM that is trained on tied judgements too",
    ),
    "out_of_distribution": Experiment(
        ("meta_scores",),
        {
            label: effect
            for items in _SETS
            for label, effect in {
                **{
                    f"GRPO - RFT, {m}, {items}": (
                        ("out_of_distribution", "grpo", items, m),
                        ("out_of_distribution", "rft", items, m),
                    )
                    for m in _ACCURACY
                },
                **_within("out_of_distribution", "rft", items, ("weighted@8", "vote@8")),
            }.items()
        },
        question="Items unlike those trained on",
    ),
    "votes_32": Experiment(
        ("meta_scores",),
        {
            label: effect
            for judge in ("rft", "grpo")
            for k in (8, 16, 32)
            for label, effect in _within(
                "votes_32",
                judge,
                "heldout",
                (f"vote@{k}", "one sample"),
                *((f"{way}@{k}", f"vote@{k}") for way in ("meta 1/4", "meta", "meta 3/4", "weighted")),
            ).items()
        },
        question="Votes over up to 32 samples, and ways to use the meta RM on them",
    ),
}


def run(root: Path, seeds: Sequence[int], names: Sequence[str], jobs: int) -> int:
    """Run what is not finished; returns the number of runs that failed. Their logs lie beside their directories."""
    wanted = [name for name in EXPERIMENTS if not names or name in names or name == DEMO]
    wanted += [e.reuse for name in wanted if (e := EXPERIMENTS[name]).reuse not in ("", DEMO, *wanted)]
    waves = [[DEMO], [n for n in wanted if n != DEMO and EXPERIMENTS[n].reuse in ("", DEMO)]]
    waves.append([n for n in wanted if n not in waves[0] + waves[1]])
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        for wave in waves:
            queue = [(seed, name) for name in wave for seed in seeds]
            for (seed, name), code in zip(queue, pool.map(lambda q: _run_one(root, *q), queue), strict=True):
                failed += code != 0
                if code:
                    print(f"{name}, seed {seed} failed: see {root / str(seed) / name}.log", flush=True)
    return failed


def _run_one(root: Path, seed: int, name: str) -> int:
    experiment, home = EXPERIMENTS[name], root / str(seed)
    home.mkdir(parents=True, exist_ok=True)
    conf = "conf/demo.yaml" if name == DEMO else f"conf/experiments/{name}.yaml"
    reuse = experiment.reuse if name != DEMO else ""
    command = [sys.executable, "-m", "spct_ray.cli", "run", conf, f"seed={seed}", f"root={home / name}"]
    command += [f"reuse={home / reuse}"] * bool(reuse) + [f"--until={step}" for step in experiment.until]
    started = time.monotonic()
    with open(home / f"{name}.log", "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    print(f"{name}, seed {seed}: exit {code} after {time.monotonic() - started:.0f} s", flush=True)
    return code


@cache
def measures(run_root: Path, judge: str, set_name: str) -> dict[str, float]:
    """What one judge of a run did on one set of items, each value a share. Raises FileNotFoundError where the run has
    not come so far."""
    items = _items(run_root, set_name)
    by_id = {item.id: item for item in items}
    judged = [t for t in read_trajectories(str(_step(run_root, f"evaluate_{judge}"))) if t.item_id in by_id]
    greedy = judgements.tabulate(items, judgements.in_all_orders([t for t in judged if not t.temperature]), 0.5)
    try:
        logits = judge_logits({"meta_scores": str(_step(run_root, "meta_scores"))}, judge)
    except FileNotFoundError:
        logits = None
    sampled = [t for t in judged if t.temperature]
    table = judgements.tabulate(items, sampled, 0.5, logits)
    found = {
        "greedy": vote_accuracy(greedy, 1).mean(),
        "one sample": vote_accuracy(table, 1).mean(),
        "parsed": table.used_IK.mean(),
        "position consistency": _or_nan(greedy.position_consistency()),
        "tied": _or_nan(table.tie_rate()),
        "pairs in order": _pairs_in_order(by_id, sampled),
    }
    for k in [k for k in (8, 16, 32) if k <= table.num_samples]:
        right_I = vote_accuracy(table, k)
        found[f"vote@{k}"] = right_I.mean()
        of_three = table.sheet.num_responses_I == 3
        found[f"n = 3, vote@{k}"] = right_I[of_three].mean() if of_three.any() else math.nan
        if logits is not None:
            for way, share in (("meta 1/4", 0.25), ("meta", 0.5), ("meta 3/4", 0.75)):
                found[f"{way}@{k}"] = vote_accuracy(table, k, "meta_top", max(1, int(k * share))).mean()
            found[f"weighted@{k}"] = vote_accuracy(table, k, "meta_weighted").mean()
    if logits is not None:
        found["AUC without ties"] = _or_nan(meta_block(table)["auc_without_ties"])
    return {name: float(value) for name, value in found.items()}


def vote_accuracy(table: ScoreTable, k: int, way: str = "sum", k_meta: int = 1) -> NDArray[np.float64]:
    """[I] mean over all full blocks of k successive samples of the chance that their vote is right. Blocks share no
    sample and keep the balanced orders of a run of k samples."""
    place = np.arange(table.num_samples)
    block_BK = place[None, :] // k == place[: table.num_samples // k, None]
    take_IBK = np.broadcast_to(block_BK, (len(table.used_IK), *block_BK.shape))
    decisions = votes.decide(way, table, take_IBK, k_meta)
    return np.asarray(np.mean([best_credit(table.sheet, decision.scores_IO) for decision in decisions], axis=0))


def _or_nan(value: float | None) -> float:
    """A measure that is not defined is left out of the table; 0 is a value."""
    return math.nan if value is None else value


def _step(run_root: Path, name: str) -> Path:
    """The finished directory of a step; of several (of other configurations) the newest."""
    records = sorted(run_root.glob(f"steps/{name}-*/record.json"), key=lambda p: p.stat().st_mtime)
    records = [r for r in records if r.parent.name.rpartition("-")[0] == name]
    if not records:
        raise FileNotFoundError(f"{run_root} has no finished step {name}")
    return records[-1].parent


def _items(run_root: Path, set_name: str) -> list[Item]:
    try:
        directory = _step(run_root, "unseen")
    except FileNotFoundError:
        directory = _step(run_root, "items")
    file = directory / ("heldout.parquet" if set_name == "heldout" else f"bench_{set_name}.parquet")
    return sorted(read_items(str(file)), key=lambda item: item.id)


def _pairs_in_order(items: Mapping[str, Item], sampled: Sequence[Trajectory]) -> float:
    """Share of pairs of responses with unequal rewards that a sample puts in their order; a tie counts as half."""
    hits = [
        0.0 if t.failure else 0.5 if t.scores[i] == t.scores[j] else float(t.scores[i] > t.scores[j])
        for t in sampled
        for i, better in enumerate(items[t.item_id].rewards)
        for j, worse in enumerate(items[t.item_id].rewards)
        if better > worse
    ]
    return fmean(hits) if hits else math.nan


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval of it; one value has none (NaN)."""
    from scipy.stats import t

    mean = fmean(values)
    half = math.nan if len(values) < 2 else t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def table(root: Path) -> str:
    """Markdown: for each experiment its values and effects in points, with mean, interval, least, number of seeds."""
    seeds = sorted(int(p.name) for p in root.iterdir() if p.name.isdigit())

    def values(of_seed: Callable[[int], float]) -> list[float]:
        found = []
        for seed in seeds:
            try:
                value = of_seed(seed)
            except FileNotFoundError:
                continue
            if not math.isnan(value):
                found.append(100 * value)
        return found

    def cell(seed: int, c: Cell) -> float:
        name, judge, set_name, measure = c
        return measures(root / str(seed) / name, judge, set_name).get(measure, math.nan)

    def line(label: str, found: Sequence[float], signed: bool) -> str:
        mean, low, high = interval(found)
        form = "+.1f" if signed else ".1f"
        verdict = "" if not signed else "yes" if low > 0 or high < 0 else "no"
        cells = [label, f"{mean:{form}}", f"[{low:{form}}, {high:{form}}]", f"{min(found):{form}}", len(found), verdict]
        return f"| {' | '.join(map(str, cells))} |"

    blocks = []
    for experiment in EXPERIMENTS.values():
        lines = [
            line(label, found, False)
            for label, c in experiment.alone.items()
            if (found := values(lambda seed, c=c: cell(seed, c)))  # type: ignore[misc]
        ]
        lines += [
            line(label, found, True)
            for label, (a, b) in experiment.effects.items()
            if (found := values(lambda seed, a=a, b=b: cell(seed, a) - cell(seed, b)))  # type: ignore[misc]
        ]
        if lines:
            head = ["| in % or points | mean | 95 % | least | seeds | beyond noise |", "|---|---|---|---|---|---|"]
            blocks.append("\n".join([f"**{experiment.question}**", "", *head, *lines]))
    return "\n\n".join(blocks)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"some of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--root", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    asked = parser.parse_args()
    if unknown := set(asked.only) - set(EXPERIMENTS):
        parser.error(f"no such experiment: {', '.join(sorted(unknown))}")
    if asked.action == "run":
        sys.exit(min(1, run(asked.root.resolve(), asked.seeds, asked.only, asked.jobs)))
    print(table(asked.root))


if __name__ == "__main__":
    main()
