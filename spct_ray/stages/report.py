"""The last step: what the judges are worth on items never trained on, as summary.json, a page, and a table of text.

Reads only what earlier steps wrote, generates nothing and trains nothing. Any judge may be absent (a run without GRPO,
say): the report shows what is there and lists what is missing.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spct_ray.errors import ConfigError, DataError
from spct_ray.judge.parse import Scale
from spct_ray.judge.prompt import JudgeConfig, scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.judge.vote import decide, decide_single, vote
from spct_ray.records import Item, Trajectory

if TYPE_CHECKING:
    from spct_ray.evaluation.page import Chart, Sample
    from spct_ray.evaluation.summary import Judged
    from spct_ray.graph.step import StepContext

VERSION = 6
JUDGES = ("base", "rft", "grpo")
GRPO_PANELS = {
    "Reward": ("reward",),
    "Share of rollouts": ("share_correct", "share_tied", "share_unparsable"),
    "Groups without signal": ("zero_signal_groups",),
    "KL to the RFT judge": ("kl",),
    "Entropy of sampled tokens": ("entropy",),
    "Tokens a judgement": ("completion_tokens_mean",),
}


@dataclass(frozen=True)
class ReportConfig:
    """`ks`: numbers of samples to vote with (1 is always shown); a meta vote keeps `k_meta_share` of them.

    `resamples` is for the bootstrap over items; `single` is the scale for n = 1 that evaluation used.
    """

    ks: tuple[int, ...] = (1, 2, 4, 8)
    k_meta_share: float = 0.5
    resamples: int = 1000
    num_examples: int = 12
    single: Literal["binary", "scale"] = "scale"


@dataclass(frozen=True)
class ReportResources:
    """The report needs nothing but the step's own process."""


def run(context: StepContext, config: ReportConfig, resources: ReportResources) -> dict[str, Any]:
    """Write index.html and summary.json; the metrics hold `summary_text`, the table for the terminal.

    Raises DataError when the inputs do not fit together, ConfigError when `ks` asks for more samples than were drawn.
    """
    from spct_ray.evaluation import curves, page, summary, terminal

    if not 0 < config.k_meta_share <= 1 or min(config.ks, default=0) < 1:
        raise ConfigError(f"report: ks {config.ks} must be >= 1 and k_meta_share {config.k_meta_share} in (0, 1]")
    seed = derive_seed(context.seed, "report")
    counting = summary.Counting(tuple(sorted({1, *config.ks})), config.k_meta_share, seed, config.resamples)
    scale = scale_of(1, JudgeConfig(single=config.single))
    sets = _item_sets(context.inputs["items"])
    judged = {
        name: _judged(context.inputs, name, sets, scale) for name in JUDGES if f"evaluate_{name}" in context.inputs
    }
    if not judged:
        raise DataError(
            "report: no evaluated judge among the inputs; needs evaluate_base, evaluate_rft or evaluate_grpo"
        )
    blocks: dict[str, dict[str, Any]] = {}
    for set_name, items in sets.items():
        models: dict[str, Any] = {}
        accuracies: dict[str, Any] = {}
        for name, by_set in judged.items():
            context.progress(len(models), len(judged), "judges", set_name)
            models[name], accuracies[name] = summary.model_block(by_set[set_name], counting)
        blocks[set_name] = {
            "models": models,
            "paired": summary.paired(accuracies, curves.chance(items), counting),
            "chance": float(curves.chance(items).mean()),
            "num_items": len(items),
        }
    final = list(judged)[-1]
    heldout = {name: by_set["heldout"] for name, by_set in judged.items()}
    result = {
        **blocks.pop("heldout"),
        "meta_rm": summary.meta_block(heldout[final].samples)
        | {"auc_by_judge": {name: summary.meta_block(j.samples)["auc_without_ties"] for name, j in heldout.items()}},
        "habits": {name: found for name, j in heldout.items() if (found := _habits(j))},
        "benchmarks": blocks,
        "seconds": _seconds(context.inputs),
        "missing": _missing(context.inputs),
    }
    selection: dict[str, float] = {}
    if "select" in context.inputs:
        selection = json.loads(Path(context.inputs["select"], "select_report.json").read_text())["counts"]
    samples = _samples(heldout, config.num_examples, seed)
    html = page.render(result, _charts(result, heldout[final], context.inputs), selection, samples)
    _write(Path(context.out, "index.html"), html)
    _write(Path(context.out, "summary.json"), json.dumps(result, indent=2, allow_nan=False) + "\n")
    examples = _text_examples(final, heldout[final], max(counting.ks), scale, seed)
    return {"summary_text": terminal.summary_text(result, examples), "num_items": result["num_items"]}


def _item_sets(directory: str) -> dict[str, tuple[Item, ...]]:
    """ "heldout" and each benchmark by its name, items in order of id."""
    from spct_ray.data.store import judged_files, read_items

    files = judged_files(directory).items()
    return {name: tuple(sorted(read_items(str(file)), key=lambda item: item.id)) for name, file in files}


def _judged(
    inputs: Mapping[str, str], name: str, sets: Mapping[str, Sequence[Item]], scale: Scale
) -> dict[str, Judged]:
    """One judge's judgements, told apart by the set of their item, and sampled from greedy by their temperature."""
    from spct_ray.cluster.sampling import read_trajectories
    from spct_ray.evaluation.curves import in_all_orders, tabulate
    from spct_ray.evaluation.summary import Judged

    directory, middle, logits = inputs[f"evaluate_{name}"], (scale.low + scale.high) / 2, judge_logits(inputs, name)
    set_of = {item.id: set_name for set_name, items in sets.items() for item in items}
    sampled: dict[str, list[Trajectory]] = {set_name: [] for set_name in sets}
    greedy: dict[str, list[Trajectory]] = {set_name: [] for set_name in sets}
    for t in read_trajectories(directory):
        if t.item_id not in set_of:
            raise DataError(f"report: {directory} judges item {t.item_id!r}, which is in no set of items")
        (sampled if t.temperature else greedy)[set_of[t.item_id]].append(t)
    found = {}
    for set_name, items in sets.items():
        table = tabulate(items, in_all_orders(greedy[set_name]), middle)
        samples = tabulate(items, sampled[set_name], middle, logits) if sampled[set_name] else table
        found[set_name] = Judged(tuple(items), tuple(sampled[set_name] or greedy[set_name]), samples, table)
    return found


def _habits(judged: Judged) -> dict[str, float | None]:
    """Of judgements of built-in items; empty where there are none that parsed."""
    from spct_ray.data.builtin import SOURCE
    from spct_ray.data.habits import habits

    items = {item.id: item for item in judged.items if item.source == SOURCE and item.facts}
    told = [(items[t.item_id], t) for t in judged.trajectories if t.item_id in items and not t.failure]
    return habits(told) if told else {}


def judge_logits(inputs: Mapping[str, str], name: str) -> dict[str, float] | None:
    """Meta-RM logits of one judge's samples by key; None where the meta RM did not score this judge."""
    import pyarrow.parquet as pq

    if "meta_scores" not in inputs:
        return None
    rows = pq.read_table(Path(inputs["meta_scores"], "logits.parquet")).to_pylist()
    return {row["key"]: row["logit"] for row in rows if row["model"] == name} or None


def _seconds(inputs: Mapping[str, str]) -> dict[str, float]:
    """Seconds of each input step by its name, in the order in which they finished."""
    from spct_ray.graph.record import read_record

    records = [record for directory in set(inputs.values()) if (record := read_record(directory))]
    return {r.name: round(float(r.seconds), 1) for r in sorted(records, key=lambda r: (r.finished_at, r.name))}


def _missing(inputs: Mapping[str, str]) -> list[str]:
    wanted = {f"evaluate_{name}": f"judge {name} was not evaluated" for name in JUDGES}
    wanted |= {
        "rft": "no RFT step, no loss curve",
        "grpo": "no GRPO step, no reward curves",
        "meta_scores": "no meta-RM scores, no meta votes",
        "select": "no selection step, no counts",
    }
    return [what for role, what in wanted.items() if role not in inputs]


def _charts(result: Mapping[str, Any], final: Judged, inputs: Mapping[str, str]) -> list[Chart]:
    from spct_ray.evaluation import plots
    from spct_ray.evaluation.page import Chart
    from spct_ray.evaluation.summary import meta_logits
    from spct_ray.evaluation.terminal import LABELS

    models, chance, meta = result["models"], result["chance"], result["meta_rm"]
    bands = "Bands are 95 % bootstrap intervals over items."
    charts = [
        Chart("Accuracy over samples", f"Votes with k samples. {bands}", plots.accuracy_curves(models, chance, False)),
        Chart(
            "Accuracy over generated tokens",
            f"What a decision costs in written tokens; the meta RM reads but writes none. {bands}",
            plots.accuracy_curves(models, chance, True),
        ),
    ]
    if "grpo" in inputs:
        rows = [
            row | {"share_unparsable": sum(v for k, v in row.items() if k.startswith("share_unparsable_"))}
            for row in _lines(inputs["grpo"])
        ]
        svg = plots.training_curves(rows, GRPO_PANELS, plots.COLOURS["grpo"])
        charts.append(Chart("GRPO", "Each step's value, and its running mean.", svg, wide=True))
    if "rft" in inputs:
        svg = plots.training_curves(_lines(inputs["rft"]), {"Loss": ("loss",)}, plots.COLOURS["rft"])
        charts.append(Chart("Rejective fine-tuning", "Loss a judgement token; each step and its running mean.", svg))
    histograms = {name: block["score_histogram"] for name, block in models.items()}
    charts.append(Chart("Scores given", "Items with two or more responses.", plots.score_histograms(histograms)))
    if meta["num_samples"]:
        logits, labels = meta_logits(final.samples)
        svg = plots.meta_reliability(meta["reliability"], logits[labels == 1].tolist(), logits[labels == 0].tolist())
        areas = {f"{LABELS[name]}'s samples without ties": area for name, area in meta["auc_by_judge"].items()}
        areas["the final judge's samples of one item, item by item,"] = meta["auc_within_item"]
        caption = f"{meta['num_samples']:,} parsed samples of the final judge, {meta['share_right']:.0%} of them right."
        caption += "".join(f" AUC on {what} {area:.3f}." for what, area in areas.items() if area is not None)
        charts.append(Chart("Meta RM", caption, svg))
    return charts


def _lines(directory: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines() if line]


def _samples(judges: Mapping[str, Judged], num: int, seed: int) -> list[Sample]:
    """The first sample of each judge on `num` items: right, wrong, tied and failed ones of the last judge in turn."""
    from spct_ray.evaluation.page import Sample

    outcomes = {name: _outcomes(judged) for name, judged in judges.items()}
    last = outcomes[list(judges)[-1]]
    ids = list(last)
    random.Random(seed).shuffle(ids)
    kinds = {"right": 0, "wrong": 1, "tied": 2}
    turn: dict[str, tuple[int, int]] = {}
    seen = [0, 0, 0, 0]
    for item_id in ids:
        kind = kinds.get(last[item_id][1], 3)
        turn[item_id] = (seen[kind], kind)
        seen[kind] += 1
    chosen = sorted(ids, key=turn.__getitem__)[:num]
    items = {item.id: item for item in next(iter(judges.values())).items}
    return [Sample(name, items[i], *outcomes[name][i]) for i in chosen for name in judges]


def _outcomes(judged: Judged) -> dict[str, tuple[Trajectory, str]]:
    """Each item's first sample and what became of it."""
    from spct_ray.evaluation.curves import correct_samples, tied_samples

    right_IK, tied_IK = correct_samples(judged.samples), tied_samples(judged.samples)
    first: dict[str, Trajectory] = {}
    for t in sorted(judged.trajectories, key=lambda t: t.sample):
        first.setdefault(t.item_id, t)
    return {
        item.id: (t, t.failure or ("right" if right_IK[i, 0] else "tied" if tied_IK[i, 0] else "wrong"))
        for i, item in enumerate(judged.items)
        for t in [first[item.id]]
    }


def _text_examples(name: str, judged: Judged, k: int, scale: Scale, seed: int) -> list[str]:
    """The first held-out item that the vote got right, and the first that it got wrong, of those with several responses
    where there are any; each with the first judgement that decides as the vote did, if there is one."""
    from spct_ray.evaluation.curves import right_option
    from spct_ray.evaluation.terminal import example

    by_item: dict[str, list[Trajectory]] = {item.id: [] for item in judged.items}
    for t in sorted(judged.trajectories, key=lambda t: t.sample):
        by_item[t.item_id].append(t)
    found: dict[bool, str] = {}
    for item in [item for item in judged.items if len(item.responses) > 1] or judged.items:
        samples = by_item[item.id][:k]
        verdict = vote(item.id, len(item.responses), samples)
        decision = decide(verdict, seed) if len(item.responses) > 1 else decide_single(verdict, scale, seed)
        is_right = decision == right_option(item)
        if is_right not in found:
            alike = (t for t in samples if decision is not None and _singles_out(t, decision))
            shown = next(alike, next((t for t in samples if not t.failure), samples[0]))
            found[is_right] = example(name, item, shown, verdict, decision)
        if len(found) == 2:
            break
    return [found[is_right] for is_right in (True, False) if is_right in found]


def _singles_out(t: Trajectory, option: int) -> bool:
    """Whether a judgement alone decides as the vote did."""
    best = [i for i, score in enumerate(t.scores) if score == max(t.scores)]
    return best == [option] if len(t.scores) > 1 else t.scores == (option,)


def _write(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
