"""The report of `spct evaluate`: every judge on every benchmark, side by side, from samples that earlier steps drew.

Writes summary.json, samples.parquet (a row a judgement), index.html; its metrics hold the table for the terminal.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spct_ray.errors import DataError
from spct_ray.graph.record import write_atomically
from spct_ray.judge.prompt import JudgeConfig, scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Item, Trajectory

if TYPE_CHECKING:
    from spct_ray.evaluation.compute import Rates
    from spct_ray.evaluation.curves import ScoreTable
    from spct_ray.evaluation.evaluation import Counting, Judged, Task
    from spct_ray.graph.step import StepContext

VERSION = 4


@dataclass(frozen=True)
class CompareConfig:
    """`judges` and their prompts (None: a scalar reward model); `names` in the registry and `labels` of the benchmarks;
    the rest as in `spct_ray.evaluation.evaluation.Counting`."""

    judges: tuple[str, ...]
    prompts: tuple[JudgeConfig | None, ...]
    names: tuple[str, ...]
    labels: tuple[str, ...]
    ks: tuple[int, ...] = (1, 2, 4, 8)
    k_meta_share: float = 0.5
    num_draws: int = 16
    resamples: int = 300
    num_examples: int = 12  # judgements on the page, of each judge and benchmark


@dataclass(frozen=True)
class CompareResources:
    """The report needs nothing but the step's own process."""


def run(context: StepContext, config: CompareConfig, resources: CompareResources) -> dict[str, Any]:
    """Write the report. Raises DataError when the inputs do not fit together."""
    from spct_ray.data.store import write_rows
    from spct_ray.evaluation import evaluation, evaluation_page, evaluation_text
    from spct_ray.evaluation.compute import pareto
    from spct_ray.evaluation.registry import BENCHMARKS

    seed = derive_seed(context.seed, "compare")
    counting = evaluation.Counting(config.ks, config.k_meta_share, seed, config.resamples, config.num_draws)
    tasks = _tasks(context.inputs["items"], config)
    rates = {name: _rates(context.inputs, name) for name in config.judges}
    judged: dict[str, dict[str, Judged]] = {}
    for name, prompt in zip(config.judges, config.prompts, strict=True):
        if prompt is None:
            judged[name] = _scored(context.inputs, name, tasks, rates[name])
        else:
            judged[name] = _judged(context.inputs, name, tasks, prompt, rates[name])
    report = json.loads(Path(context.inputs["items"], "data_report.json").read_text())
    blocks: dict[str, Any] = {}
    for label, task in tasks.items():
        blocks[label] = report.get(label) or _read_in_run(task)
        absent = [name for name in task.benchmark.subsets if name not in task.sheet.names]
        blocks[label] |= {"in_distribution": task.benchmark is BENCHMARKS["heldout"], "absent_subsets": absent}
        blocks[label] |= _block(task, {n: by[label] for n, by in judged.items()}, counting, context)
    points = [
        {"benchmark": label, "judge": name, "way": way, "k": made["k"], "score": made["score"], **made["cost"]}
        for label, block in blocks.items()
        for name, model in block["models"].items()
        for way, made in ways(model)
        if made["score"] is not None
    ]
    result = {
        "judges": {name: _about(context.inputs, name, rates[name]) for name in config.judges},
        "ks": list(config.ks),
        "benchmarks": blocks,
        "meta_rm": _transfer(blocks),
        "points": points,
        "pareto": {
            label: {
                axis: pareto([p for p in points if p["benchmark"] == label and p[axis]], axis)
                for axis in ("tokens", "flops", "seconds")
            }
            for label in blocks
        },
    }
    out = Path(context.out)
    rows = _samples(tasks, judged)
    write_rows(str(out / "samples.parquet"), rows)
    html = evaluation_page.render(result, _shown(rows, tasks, config.num_examples))
    write_atomically(str(out / "index.html"), html.encode())
    write_atomically(str(out / "summary.json"), (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    return {"summary_text": evaluation_text.summary_text(result)}


def _transfer(blocks: Mapping[str, Any]) -> dict[str, Any]:
    """The meta RM of each judge on each benchmark, those of its training distribution first."""
    ordered = sorted(blocks.items(), key=lambda named: not named[1]["in_distribution"])
    keys = ("auc", "auc_within_item", "ece", "accuracy", "share_right", "num_samples")
    found: dict[str, Any] = {}
    for label, block in ordered:
        for name, model in block["models"].items():
            if "meta_rm" in model:
                found.setdefault(name, {})[label] = {key: model["meta_rm"][key] for key in keys}
    return found


def ways(model: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every way to decide of one judge's block, with its entry."""
    from spct_ray.evaluation.evaluation_text import NAMES

    found = [("greedy", model["greedy"])]
    found += [(f"vote@{k}", made) for k, made in model["vote"].items()]
    found += [(f"meta vote@{k}", made) for k, made in model["meta_vote"].items()]
    others = ((name, made) for name, made in model["aggregators"].items() if made and name not in ("sum", "meta_top"))
    found += [(NAMES[name], made) for name, made in others]
    return found + [(f"adaptive, {name}", made) for name, made in model["adaptive"].items()]


def _block(task: Task, judged: Mapping[str, Judged], counting: Counting, context: StepContext) -> dict[str, Any]:
    from spct_ray.evaluation import evaluation

    weights = evaluation.weights(task, counting)
    models: dict[str, Any] = {}
    outcomes: dict[str, dict[str, evaluation.Outcome]] = {}
    for name, found in judged.items():
        context.progress(len(models), len(judged), "judges", task.benchmark.title)
        models[name], outcomes[name] = evaluation.judge_block(task, found, weights, counting)
    top = counting.k_max
    shown = ("greedy", f"sum@{top}", f"meta_top@{top}")
    names = list(judged)  # of many judges, each is compared with the first, else the pairs would bury the reader
    compared = itertools.combinations(names, 2) if len(names) <= 3 else ((names[0], name) for name in names[1:])
    pairs = {f"{b} - {a}": evaluation.paired(outcomes[a], outcomes[b], shown, task, counting) for a, b in compared}
    return {"chance": evaluation.chance(task), "models": models, "paired": pairs}


def _tasks(directory: str, config: CompareConfig) -> dict[str, Task]:
    from spct_ray.data.store import judged_files, read_items
    from spct_ray.evaluation.evaluation import Task
    from spct_ray.evaluation.registry import find
    from spct_ray.evaluation.sheet import Sheet

    files = judged_files(directory)
    found = {}
    for name, label in zip(config.names, config.labels, strict=True):
        items = tuple(read_items(str(files[label])))
        found[label] = Task(find(name), items, Sheet.of(items))
    return found


def _read_in_run(task: Task) -> dict[str, Any]:
    """What `stages.benchmarks` notes of a benchmark, for items that a run's own data step read."""
    from spct_ray.evaluation.readers import layout

    return {
        "name": "heldout",
        "title": task.benchmark.title,
        "num_items": len(task.items),
        "num_questions": task.sheet.num_questions,
        "layout": layout(task.items),
        "dropped": {"counts": {}},
        "contaminated": None,
    }


def _rates(inputs: Mapping[str, str], name: str) -> Rates:
    """Mean cost of one judgement (of an item, by a scalar reward model): tokens as drawn, seconds as the last attempt
    of the step measured them."""
    from spct_ray.evaluation.compute import Rates, count_weights

    directory = inputs[f"evaluate_{name}"]
    timing = json.loads(Path(directory, "timing.json").read_text())
    model, meta = inputs.get(f"model_{name}"), inputs.get(f"meta_{name}")
    params = count_weights(str(Path(model, "model"))) if model else None
    if (rows := _scalar_rows(directory)) is not None:
        tokens = sum(row["tokens"] for row in rows) / len(rows)
        return Rates(params, 0, tokens, 0.0, timing["engine_seconds"] / len(rows))
    made = _trajectories(inputs, name)
    return Rates(
        params=params,
        meta_params=count_weights(str(Path(meta, "model"))) if meta else 0,
        prompt_tokens=sum(t.prompt_tokens for t in made) / len(made),
        completion_tokens=sum(t.completion_tokens for t in made) / len(made),
        seconds=timing["engine_seconds"] / timing["judgements"] if timing["judgements"] else 0.0,
    )


def _about(inputs: Mapping[str, str], name: str, rates: Rates) -> dict[str, Any]:
    from spct_ray.graph.record import read_record

    record = read_record(inputs[f"evaluate_{name}"])
    return {
        "weights": rates.params,
        "meta_weights": rates.meta_params,
        "prompt_tokens": rates.prompt_tokens,
        "completion_tokens": rates.completion_tokens,
        "engine_seconds_a_judgement": rates.seconds,
        "evaluate": record.config if record else None,
    }


def _judged(
    inputs: Mapping[str, str], name: str, tasks: Mapping[str, Task], prompt: JudgeConfig, rates: Rates
) -> dict[str, Judged]:
    from spct_ray.evaluation.evaluation import Judged

    items = {label: task.items for label, task in tasks.items()}
    found = judged_tables(inputs, name, items, prompt)
    made: dict[str, list[Trajectory]] = {label: [] for label in tasks}
    label_of = {item.id: label for label, task in tasks.items() for item in task.items}
    for t in _trajectories(inputs, name):
        if t.temperature:
            made[label_of[t.item_id]].append(t)
    return {label: Judged(tuple(made[label]), *found[label], rates, prompt) for label in tasks}


def _scored(inputs: Mapping[str, str], name: str, tasks: Mapping[str, Task], rates: Rates) -> dict[str, Judged]:
    """The scores of a scalar reward model as one judgement an item that no order changes."""
    from spct_ray.evaluation.curves import tabulate_scores
    from spct_ray.evaluation.evaluation import Judged

    scores = {row["item_id"]: row["scores"] for row in _scalar_rows(inputs[f"evaluate_{name}"]) or ()}
    tables = {label: tabulate_scores(task.items, scores) for label, task in tasks.items()}
    return {label: Judged((), table, table, rates, None) for label, table in tables.items()}


def _scalar_rows(directory: str) -> list[dict[str, Any]] | None:
    """What `stages.scalar` wrote; None for a judge that writes."""
    import pyarrow.parquet as pq

    path = Path(directory, "scores.parquet")
    rows: list[dict[str, Any]] | None = pq.read_table(path).to_pylist() if path.exists() else None
    return rows


def _trajectories(inputs: Mapping[str, str], name: str) -> list[Trajectory]:
    from spct_ray.cluster.sampling import read_trajectories

    return read_trajectories(inputs[f"evaluate_{name}"])


def judged_tables(
    inputs: Mapping[str, str], name: str, items: Mapping[str, Sequence[Item]], prompt: JudgeConfig
) -> dict[str, tuple[ScoreTable, ScoreTable]]:
    """One judge's samples and greedy judgements (two orders) of each set of items. Raises DataError for items that it
    did not judge."""
    from spct_ray.evaluation.curves import in_all_orders, tabulate

    scale = scale_of(1, prompt)
    middle, logits = (scale.low + scale.high) / 2, _logits(inputs, name)
    of_item: dict[str, list[Trajectory]] = {}
    for t in _trajectories(inputs, name):
        of_item.setdefault(t.item_id, []).append(t)
    found = {}
    for label, asked in items.items():
        missing = [item.id for item in asked if item.id not in of_item]
        if missing:
            raise DataError(f"evaluation of {name}: no judgement of {len(missing)} items, the first is {missing[0]!r}")
        judged = [t for item in asked for t in of_item[item.id]]
        sampled, greedy = [t for t in judged if t.temperature], [t for t in judged if not t.temperature]
        found[label] = tabulate(asked, sampled, middle, logits), tabulate(asked, in_all_orders(greedy), middle)
    return found


def _logits(inputs: Mapping[str, str], name: str) -> dict[str, float] | None:
    """Of the judge's samples by key. A run scores its judges in one step, where they have their names in the run."""
    import pyarrow.parquet as pq

    from spct_ray.graph.record import read_record

    role = f"meta_scores_{name}"
    if role not in inputs:
        return None
    record = read_record(inputs[f"evaluate_{name}"])
    model = record.name.removeprefix("evaluate_") if record else name
    rows = pq.read_table(Path(inputs[role], "logits.parquet")).to_pylist()
    return {row["key"]: row["logit"] for row in rows if row["model"] == model}


def _samples(tasks: Mapping[str, Task], judged: Mapping[str, Mapping[str, Judged]]) -> list[dict[str, Any]]:
    """One row a sampled judgement: what was asked, written, scored, and its outcome by Eq. 10."""
    from spct_ray.evaluation.curves import correct_samples, tied_samples

    rows = []
    for name, by_label in judged.items():
        for label, found in by_label.items():
            right_IK, tied_IK = correct_samples(found.samples), tied_samples(found.samples)
            items = {item.id: (i, item) for i, item in enumerate(tasks[label].items)}
            place: dict[str, int] = {}
            for t in sorted(found.trajectories, key=lambda t: (t.item_id, t.sample)):
                i, item = items[t.item_id]
                k = place[t.item_id] = place.get(t.item_id, -1) + 1
                logits = found.samples.logits_IK
                logit = float(logits[i, k]) if logits is not None and not t.failure else None
                outcome = t.failure or ("right" if right_IK[i, k] else "tied" if tied_IK[i, k] else "wrong")
                rows.append(
                    {"judge": name, "benchmark": label, "subset": item.subset, "outcome": outcome, "logit": logit}
                    | {"key": t.key, **t.to_row()}
                )
    return rows


def _shown(rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Task], num: int) -> list[dict[str, Any]]:
    """First samples of `num` items of each judge and benchmark: right, wrong, tied and failed ones in turn."""
    items = {(label, item.id): item for label, task in tasks.items() for item in task.items}
    groups: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        if row["sample"] == 0:
            kind = row["outcome"] if row["outcome"] in ("right", "wrong", "tied") else "failure"
            groups.setdefault((row["judge"], row["benchmark"]), {}).setdefault(kind, []).append(row)
    chosen: list[dict[str, Any]] = []
    for kinds in groups.values():
        turns = [row for turn in itertools.zip_longest(*kinds.values()) for row in turn if row is not None]
        for row in turns[:num]:
            item = items[row["benchmark"], row["item_id"]]
            shown = [
                (
                    item.responses[i],
                    row["scores"][i] if row["scores"] else "–",
                    item.rewards[i] == max(1, *item.rewards),
                )
                for i in row["order"]
            ]
            query = "\n\n".join(m.content for m in item.messages)
            chosen.append({**row, "query": query, "responses": shown})
    return chosen
