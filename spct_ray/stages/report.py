"""The report of a run and of `spct evaluate`: every judge on every set of items, from what earlier steps wrote.

Writes summary.json, samples.parquet (a row a judgement) and index.html; its metrics hold the table for the terminal.
Generates nothing. A run's report adds what only a run has: training curves, counts of the selection, seconds by step.
Any judge of a run may be absent: the report shows what is there and lists what is missing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from spct_ray.data.builtin import SOURCE
from spct_ray.data.program import habits
from spct_ray.data.store import judged_files, read_items, write_rows
from spct_ray.errors import ConfigError, DataError
from spct_ray.evaluation import results, tables
from spct_ray.evaluation.benchmarks import find
from spct_ray.evaluation.compute import Rates, count_weights
from spct_ray.evaluation.judgements import in_all_orders, right_options, tabulate, tabulate_scores
from spct_ray.evaluation.results import Counting, Judged, Task
from spct_ray.graph.record import read_record, write_atomically
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.prompt import scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.judge.vote import decide, decide_single, vote
from spct_ray.learn.metrics_file import read_metrics
from spct_ray.records import Item, Trajectory
from spct_ray.stages.evaluate import config_of

JUDGES = ("base", "rft", "grpo")  # of a run, in the order in which they were trained
WANTED = {  # of a run's report
    **{f"evaluate_{name}": f"judge {name} was not evaluated" for name in JUDGES},
    "rft": "no RFT step, no loss curve",
    "grpo": "no GRPO step, no reward curves",
    "meta_scores": "no meta-RM scores, no meta votes",
    "select": "no selection step, no counts",
}


@dataclass(frozen=True)
class ReportConfig(Counting):
    """How votes are counted, and how many judgements of each judge and set of items are on the page."""

    num_examples: int = 12


@stage(version=7)
def run(context: StepContext, config: ReportConfig, _: None) -> dict[str, Any]:
    """Write the report. Raises DataError when the inputs do not fit together, ConfigError when `ks` asks for more
    samples than were drawn."""
    if not 0 < config.k_meta_share <= 1 or min(config.ks, default=0) < 1:
        raise ConfigError(f"report: ks {config.ks} must be >= 1 and k_meta_share {config.k_meta_share} in (0, 1]")
    inputs, of_run = context.inputs, not any(role.startswith("model_") for role in context.inputs)
    names = judge_names(inputs)
    if not names:
        raise DataError("report: no evaluated judge among the inputs, e.g. evaluate_rft")
    ks = tuple(sorted({1, *config.ks} if of_run else config.ks))
    tasks, notes = _tasks(inputs["items"], replace(config, ks=ks), context.seed)
    judged = {name: read_judge(inputs, name, {label: task.items for label, task in tasks.items()}) for name in names}
    blocks: dict[str, Any] = {}
    for label, task in tasks.items():
        context.progress(len(blocks), len(tasks), "sets of items", label)
        against = [name for name in names if of_run and name != "base"]
        block = results.benchmark_block(task, {name: of[label] for name, of in judged.items()}, against)
        noted = {"dropped": {}, "contaminated": None} | notes.get(label, {})
        blocks[label] = noted | block | {"in_distribution": label == "heldout"}
    found = {directory: record for directory in inputs.values() if (record := read_record(directory))}
    records = sorted(found.values(), key=lambda record: (record.finished_at, record.name))
    configs = {directory: record.config for directory, record in found.items()}
    result: dict[str, Any] = {
        "judges": {
            name: asdict(next(iter(of.values())).rates) | {"evaluate": configs.get(inputs[f"evaluate_{name}"])}
            for name, of in judged.items()
        },
        "ks": list(ks),
        "brief": of_run,
        "benchmarks": blocks,
        "habits": {name: habit for name, of in judged.items() if (habit := _habits(tasks, of))},
        "seconds": {r.name: round(float(r.seconds), 1) for r in records} if of_run else {},
        "missing": [what for role, what in WANTED.items() if of_run and role not in inputs],
    }
    about = {
        "command": context.command,
        "date": records[-1].finished_at if records else "unknown",
        "seed": str(context.seed),
        "items": inputs["items"],
    }
    rows = [
        row for name, of in judged.items() for label in of for row in _samples(name, label, tasks[label], of[label])
    ]
    write_rows(f"{context.out}/samples.parquet", rows)
    _write_page(context, about, result, _shown(rows, tasks, config.num_examples))
    write_atomically(f"{context.out}/summary.json", (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    examples = _examples(names[-1], judged[names[-1]]["heldout"], tasks["heldout"], max(ks)) if of_run else []
    return {
        "summary_text": tables.summary_text(result, examples),
        "num_items": sum(len(task.items) for task in tasks.values()),
    }


def judge_names(inputs: Mapping[str, str]) -> list[str]:
    """The evaluated judges among the inputs; those of a run in the order in which they were trained."""
    names = [role.removeprefix("evaluate_") for role in inputs if role.startswith("evaluate_")]
    return sorted(names, key=lambda name: JUDGES.index(name) if name in JUDGES else len(JUDGES))


def _tasks(directory: str, counting: Counting, seed: int) -> tuple[dict[str, Task], dict[str, Any]]:
    """The sets of items by label, and what the step that read them notes of each benchmark. Items of a run that it has
    no note of are scored by accuracy."""
    noted = Path(directory, "data_report.json")
    report = json.loads(noted.read_text()) if noted.exists() else {}
    notes = {label: note for label, note in report.items() if isinstance(note, dict) and "layout" in note}
    tasks = {}
    for label, file in judged_files(directory).items():
        items = read_items(str(file)) if notes else sorted(read_items(str(file)), key=lambda item: item.id)
        kind = notes.get(label, {}).get("name", "heldout" if label == "heldout" else "own")
        tasks[label] = Task.of(find(kind), items, counting, seed)
    return tasks, notes


def read_judge(inputs: Mapping[str, str], name: str, items: Mapping[str, Sequence[Item]]) -> dict[str, Judged]:
    """One judge's judgements of each set of items, or the scores of a scalar reward model.

    Costs are means per judgement (of a scalar reward model per item): tokens as drawn, seconds as the last attempt of
    the step measured them; weights are counted where the models are inputs. Raises DataError for items that it did not
    judge, or judged that are in no set.
    """
    from spct_ray.cluster.sampling import read_trajectories  # brings Ray

    directory, model, meta = inputs[f"evaluate_{name}"], inputs.get(f"model_{name}"), inputs.get(f"meta_{name}")
    timing = json.loads(Path(directory, "timing.json").read_text())
    params, meta_params = (count_weights(f"{d}/model") if d else default for d, default in ((model, None), (meta, 0)))
    if (file := Path(directory, "scores.parquet")).exists():
        rows = pq.read_table(file).to_pylist()
        scores, tokens = {row["item_id"]: row["scores"] for row in rows}, sum(row["tokens"] for row in rows)
        rates = Rates(params, 0, tokens / len(rows), 0.0, timing["engine_seconds"] / len(rows))
        return {label: Judged((), None, tabulate_scores(made, scores), rates, None) for label, made in items.items()}
    of_item: dict[str, list[Trajectory]] = {}
    for t in (trajectories := read_trajectories(directory)):
        of_item.setdefault(t.item_id, []).append(t)
    wanted = {item.id for made in items.values() for item in made}
    if unknown := sorted(set(of_item) - wanted):
        raise DataError(f"report: {directory} judges item {unknown[0]!r}, which is in no set of items")
    if absent := sorted(wanted - set(of_item)):
        raise DataError(f"evaluation of {name}: no judgement of {len(absent)} items, the first is {absent[0]!r}")
    rates = Rates(
        params=params,
        meta_params=meta_params or 0,
        prompt_tokens=sum(t.prompt_tokens for t in trajectories) / len(trajectories),
        completion_tokens=sum(t.completion_tokens for t in trajectories) / len(trajectories),
        seconds=timing["engine_seconds"] / timing["judgements"] if timing["judgements"] else 0.0,
    )
    prompt, logits = config_of(directory).prompt, judge_logits(inputs, name)
    middle = sum((scale_of(1, prompt).low, scale_of(1, prompt).high)) / 2
    judged = {}
    for label, made in items.items():
        of_set = [t for item in made for t in of_item[item.id]]
        sampled, greedy = [t for t in of_set if t.temperature], [t for t in of_set if not t.temperature]
        samples = tabulate(made, sampled, middle, logits) if sampled else None
        in_orders = tabulate(made, in_all_orders(greedy), middle)
        judged[label] = Judged(tuple(sampled or greedy), samples, in_orders, rates, prompt)
    return judged


def judge_logits(inputs: Mapping[str, str], name: str) -> dict[str, float] | None:
    """Meta-RM logits of one judge's samples by key; None where the meta RM did not score this judge. A run scores its
    judges in one step, where they have their names in the run."""
    role = f"meta_scores_{name}" if f"meta_scores_{name}" in inputs else "meta_scores"
    if role not in inputs:
        return None
    record = read_record(inputs[f"evaluate_{name}"]) if f"evaluate_{name}" in inputs else None
    model = record.name.removeprefix("evaluate_") if record else name
    rows = pq.read_table(Path(inputs[role], "logits.parquet")).to_pylist()
    return {row["key"]: row["logit"] for row in rows if row["model"] == model} or None


def _habits(tasks: Mapping[str, Task], judged: Mapping[str, Judged]) -> dict[str, float | None]:
    """Of judgements of built-in held-out items; empty where there are none that parsed."""
    if "heldout" not in tasks:
        return {}
    items = {item.id: item for item in tasks["heldout"].items if item.source == SOURCE and item.facts}
    made = judged["heldout"].trajectories
    parsed = [(items[t.item_id], t) for t in made if t.item_id in items and not t.failure]
    return habits(parsed) if parsed else {}


def _write_page(
    context: StepContext, about: Mapping[str, str], result: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]
) -> None:
    from spct_ray.evaluation import page  # brings matplotlib

    inputs, blocks = context.inputs, result["benchmarks"]
    seconds = {step: {"seconds": f"{seconds:,.1f}"} for step, seconds in result["seconds"].items()}
    counts = {}
    if "select" in inputs:
        counts = json.loads(Path(inputs["select"], "select_report.json").read_text())["counts"]
    reasons = {reason.replace("_", " "): {"judgements": f"{count:,}"} for reason, count in counts.items()}
    extra = [
        tables.habits(result["habits"]),
        tables.transfer(blocks),
        tables.Table.of("Selection for the cold start", "reason", reasons),
        tables.Table.of("Seconds by step", "step", seconds),
    ]
    extra = [table for table in extra if table.rows]
    training = page.of_training(*(read_metrics(inputs[step]) if step in inputs else [] for step in ("grpo", "rft")))
    sections = [page.of_benchmark(label, block, result["ks"]) for label, block in blocks.items()]
    if extra or training:
        sections.append(page.Section("The run" if training else "Judges", extra, training))
    note = "Right, wrong, tied and failed ones in turn, not in proportion; all are in samples.parquet."
    samples = page.Samples(shown, ("benchmark", "judge", "outcome"), note)
    title = "Judge report" if result["brief"] else "Evaluation"
    html = page.render(title, about, sections, samples, result["missing"])
    write_atomically(f"{context.out}/index.html", html.encode())


def _samples(name: str, label: str, task: Task, judged: Judged) -> list[dict[str, Any]]:
    """One row a judgement of a judge on a benchmark: what was asked, written, scored, and its outcome by Eq. 10."""
    table, places = judged.votable, {item.id: i for i, item in enumerate(task.items)}
    rows, right_IK, tied_IK = [], table.correct_IK, table.tied_IK
    by_item = itertools.groupby(sorted(judged.trajectories, key=lambda t: (t.item_id, t.sample)), lambda t: t.item_id)
    for item_id, samples in by_item:
        for k, t in enumerate(samples):
            i = places[item_id]
            row = {
                "judge": name,
                "benchmark": label,
                "subset": task.items[i].subset,
                "outcome": t.failure or ("right" if right_IK[i, k] else "tied" if tied_IK[i, k] else "wrong"),
                "logit": None if table.logits_IK is None or t.failure else float(table.logits_IK[i, k]),
                "key": t.key,
            }
            rows.append(row | t.to_row())
    return rows


def _shown(rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Task], num: int) -> list[dict[str, Any]]:
    """First samples of `num` items of each judge and benchmark: right, wrong, tied and failed ones in turn."""
    items = {(label, item.id): item for label, task in tasks.items() for item in task.items}
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["sample"] == 0:
            shown = _shown_sample(row, items[row["benchmark"], row["item_id"]])
            kinds = groups.setdefault((row["judge"], row["benchmark"]), {})
            kinds.setdefault(shown["outcome"], []).append(shown)
    in_turn = (itertools.chain(*itertools.zip_longest(*kinds.values())) for kinds in groups.values())
    return [shown for turns in in_turn for shown in itertools.islice(filter(None, turns), num)]


def _shown_sample(row: Mapping[str, Any], item: Item) -> dict[str, Any]:
    tags = [tag for tag in (item.subset, f"n = {len(item.responses)}") if tag]
    tags += [] if row["logit"] is None else [f"meta logit {row['logit']:.2f}"]
    marks = [("", "best")[right] for right in right_options(item)]
    if len(item.responses) == 1:
        marks = ["truth: right" if item.rewards[0] > 0.5 else "truth: wrong"]
    scores = row["scores"] or "–" * len(marks)
    return {
        "benchmark": row["benchmark"],
        "judge": row["judge"],
        "outcome": row["outcome"] if row["outcome"] in ("right", "wrong", "tied") else "failure",
        "badge": row["outcome"].replace("_", " "),
        "tags": tags,
        "query": [m.content if len(item.messages) == 1 else f"{m.role}: {m.content}" for m in item.messages],
        "responses": [{"text": item.responses[i], "score": scores[i], "mark": marks[i]} for i in row["order"]],
        "text": row["text"],
    }


def _examples(name: str, judged: Judged, task: Task, k: int) -> list[str]:
    """The first held-out item that the vote got right, and the first that it got wrong, of those with several responses
    where there are any; each with the first judgement that decides as the vote did, if there is one."""
    assert judged.prompt is not None
    scale = scale_of(1, judged.prompt)
    by_item: dict[str, list[Trajectory]] = {item.id: [] for item in task.items}
    for t in sorted(judged.trajectories, key=lambda t: t.sample):
        by_item[t.item_id].append(t)
    examples: dict[bool, str] = {}
    for item in [item for item in task.items if len(item.responses) > 1] or task.items:
        samples, seed = by_item[item.id][:k], derive_seed(0, item.id)
        verdict = vote(item.id, len(item.responses), samples)
        decision = decide(verdict, seed) if len(item.responses) > 1 else decide_single(verdict, scale, seed)
        is_right = decision is not None and right_options(item)[decision]
        if is_right not in examples:
            alike = (t for t in samples if decision is not None and _singles_out(t, decision))
            shown = next(alike, next((t for t in samples if not t.failure), samples[0]))
            examples[is_right] = tables.example(name, item, shown, verdict, decision)
        if len(examples) == 2:
            break
    return [examples[is_right] for is_right in (True, False) if is_right in examples]


def _singles_out(t: Trajectory, option: int) -> bool:
    """Whether a judgement alone decides as the vote did."""
    best = [i for i, score in enumerate(t.scores) if score == max(t.scores)]
    return best == [option] if len(t.scores) > 1 else t.scores == (option,)
