"""The report of a run and of `spct evaluate`: every judge on every set of items, from what earlier steps wrote.

Writes summary.json, samples.parquet (a row a judgement) and index.html; its metrics hold the table for the terminal.
Generates nothing. A run's report adds what only a run has: training curves, counts of the selection, seconds by step.
Any judge of a run may be absent: the report shows what is there and lists what is missing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spct_ray.errors import ConfigError, DataError
from spct_ray.graph.record import read_record, write_atomically
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.prompt import scale_of
from spct_ray.judge.seeds import derive_seed
from spct_ray.judge.vote import decide, decide_single, vote
from spct_ray.learn.metrics_file import read_metrics
from spct_ray.records import Item, Trajectory
from spct_ray.stages.evaluate import config_of

if TYPE_CHECKING:
    from spct_ray.evaluation.compute import Rates
    from spct_ray.evaluation.judgements import ScoreTable
    from spct_ray.evaluation.page import Chart
    from spct_ray.evaluation.results import Counting, Judged, Task

JUDGES = ("base", "rft", "grpo")  # of a run, in the order in which they were trained
GRPO_PANELS = {
    "Reward": ("reward",),
    "Share of rollouts": ("share_correct", "share_tied", "share_unparsable"),
    "Groups without signal": ("zero_signal_groups",),
    "KL to the RFT judge": ("kl",),
    "Entropy of sampled tokens": ("entropy",),
    "Tokens per judgement": ("completion_tokens_mean",),
}


@dataclass(frozen=True)
class ReportConfig:
    """`ks`: numbers of samples to vote with; a meta vote keeps `k_meta_share` of them. Numbers that are no exact mean
    average `num_draws` draws; intervals take `resamples`. `num_examples` judgements of each judge and set of items are
    on the page."""

    ks: tuple[int, ...] = (1, 2, 4, 8)
    k_meta_share: float = 0.5
    num_draws: int = 16
    resamples: int = 300
    num_examples: int = 12


@stage(version=6)
def run(context: StepContext, config: ReportConfig, _: None) -> dict[str, Any]:
    """Write the report. Raises DataError when the inputs do not fit together, ConfigError when `ks` asks for more
    samples than were drawn."""
    from spct_ray.data.store import write_rows
    from spct_ray.evaluation import page, results, tables

    if not 0 < config.k_meta_share <= 1 or min(config.ks, default=0) < 1:
        raise ConfigError(f"report: ks {config.ks} must be >= 1 and k_meta_share {config.k_meta_share} in (0, 1]")
    inputs, of_run = context.inputs, not any(role.startswith("model_") for role in context.inputs)
    names = judge_names(inputs)
    if not names:
        raise DataError("report: no evaluated judge among the inputs, e.g. evaluate_rft")
    ks = tuple(sorted({1, *config.ks} if of_run else config.ks))
    counting = results.Counting(ks, config.k_meta_share, context.seed, config.resamples, config.num_draws)
    tasks, notes = _tasks(inputs["items"], counting)
    judged = {name: _judged(inputs, name, {n: t.items for n, t in tasks.items()}) for name in names}
    blocks: dict[str, Any] = {}
    against = [name for name in names if of_run and name != "base"]
    for name, task in tasks.items():
        context.progress(len(blocks), len(tasks), "sets of items", name)
        block = results.benchmark_block(task, {n: by[name] for n, by in judged.items()}, against)
        blocks[name] = {"dropped": {}, "contaminated": None} | notes.get(name, {}) | block
        blocks[name]["in_distribution"] = name == "heldout"
    points = _points(blocks)
    result: dict[str, Any] = {
        "judges": {name: _about(inputs, name, next(iter(judged[name].values())).rates) for name in names},
        "ks": list(ks),
        "brief": of_run,
        "benchmarks": blocks,
        "meta_rm": _transfer(blocks),
        "points": points,
        "pareto": _pareto(points, blocks),
        "habits": {n: found for n in names if "heldout" in tasks and (found := _habits(tasks, judged[n]))},
        "seconds": _seconds(inputs) if of_run else {},
        "missing": _missing(inputs) if of_run else [],
    }
    rows = _samples(tasks, judged)
    out = Path(context.out)
    write_rows(str(out / "samples.parquet"), rows)
    about = {"command": context.command, "date": _date(inputs), "seed": str(context.seed), "items": inputs["items"]}
    note = "Right, wrong, tied and failed ones in turn, not in proportion; all are in samples.parquet."
    shown = page.Samples(_shown(rows, tasks, config.num_examples), ("benchmark", "judge", "outcome"), note)
    title = "Judge report" if of_run else "Evaluation"
    html = page.render(title, about, _sections(result, inputs, ks), shown, result["missing"])
    write_atomically(str(out / "index.html"), html.encode())
    write_atomically(str(out / "summary.json"), (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())
    examples = _examples(names[-1], judged[names[-1]]["heldout"], tasks["heldout"], max(ks)) if of_run else []
    return {
        "summary_text": tables.summary_text(result, examples),
        "num_items": sum(len(t.items) for t in tasks.values()),
    }


def judge_names(inputs: Mapping[str, str]) -> list[str]:
    """The evaluated judges among the inputs; those of a run in the order in which they were trained."""
    names = [role.removeprefix("evaluate_") for role in inputs if role.startswith("evaluate_")]
    return sorted(names, key=lambda name: JUDGES.index(name) if name in JUDGES else len(JUDGES))


def _tasks(directory: str, counting: Counting) -> tuple[dict[str, Task], dict[str, Any]]:
    """The sets of items by label, and what the step that read them notes of each benchmark. Items of a run that it has
    no note of are scored by accuracy."""
    from spct_ray.data.store import judged_files, read_items
    from spct_ray.evaluation.benchmarks import find
    from spct_ray.evaluation.results import Task

    noted = Path(directory, "data_report.json")
    report = json.loads(noted.read_text()) if noted.exists() else {}
    notes = {name: note for name, note in report.items() if isinstance(note, dict) and "layout" in note}
    tasks = {}
    for name, file in judged_files(directory).items():
        items = tuple(sorted(read_items(str(file)), key=lambda item: item.id) if not notes else read_items(str(file)))
        kind = notes.get(name, {}).get("name", "heldout" if name == "heldout" else "own")
        tasks[name] = Task.of(find(kind), items, counting)
    return tasks, notes


def _judged(inputs: Mapping[str, str], name: str, items: Mapping[str, Sequence[Item]]) -> dict[str, Judged]:
    """One judge's judgements of each set of items, or the scores of a scalar reward model."""
    from spct_ray.evaluation.judgements import tabulate_scores
    from spct_ray.evaluation.results import Judged

    rates = _rates(inputs, name)
    if (scored := _scalar_rows(inputs[f"evaluate_{name}"])) is not None:
        scores = {row["item_id"]: row["scores"] for row in scored}
        return {n: Judged((), None, tabulate_scores(made, scores), rates, None) for n, made in items.items()}
    prompt, found = config_of(inputs[f"evaluate_{name}"]).prompt, judged_tables(inputs, name, items)
    return {n: Judged(sampled, samples, greedy, rates, prompt) for n, (sampled, samples, greedy) in found.items()}


def judged_tables(
    inputs: Mapping[str, str], name: str, items: Mapping[str, Sequence[Item]]
) -> dict[str, tuple[tuple[Trajectory, ...], ScoreTable | None, ScoreTable]]:
    """One judge's samples, their table (None without samples) and that of its greedy judgements (two orders), for each
    set of items. Raises DataError for items that it did not judge, or judged that are in no set."""
    from spct_ray.cluster.sampling import read_trajectories
    from spct_ray.evaluation.judgements import in_all_orders, tabulate

    directory = inputs[f"evaluate_{name}"]
    scale, logits = scale_of(1, config_of(directory).prompt), judge_logits(inputs, name)
    middle = (scale.low + scale.high) / 2
    of_item: dict[str, list[Trajectory]] = {}
    for t in read_trajectories(directory):
        of_item.setdefault(t.item_id, []).append(t)
    asked = {item.id for made in items.values() for item in made}
    if unknown := sorted(set(of_item) - asked):
        raise DataError(f"report: {directory} judges item {unknown[0]!r}, which is in no set of items")
    if absent := sorted(asked - set(of_item)):
        raise DataError(f"evaluation of {name}: no judgement of {len(absent)} items, the first is {absent[0]!r}")
    found = {}
    for label, made in items.items():
        judged = [t for item in made for t in of_item[item.id]]
        sampled, greedy = [t for t in judged if t.temperature], [t for t in judged if not t.temperature]
        table = tabulate(made, sampled, middle, logits) if sampled else None
        found[label] = (tuple(sampled or greedy), table, tabulate(made, in_all_orders(greedy), middle))
    return found


def judge_logits(inputs: Mapping[str, str], name: str) -> dict[str, float] | None:
    """Meta-RM logits of one judge's samples by key; None where the meta RM did not score this judge. A run scores its
    judges in one step, where they have their names in the run."""
    import pyarrow.parquet as pq

    role = f"meta_scores_{name}" if f"meta_scores_{name}" in inputs else "meta_scores"
    if role not in inputs:
        return None
    record = read_record(inputs[f"evaluate_{name}"]) if f"evaluate_{name}" in inputs else None
    model = record.name.removeprefix("evaluate_") if record else name
    rows = pq.read_table(Path(inputs[role], "logits.parquet")).to_pylist()
    return {row["key"]: row["logit"] for row in rows if row["model"] == model} or None


def _scalar_rows(directory: str) -> list[dict[str, Any]] | None:
    """What `stages.scalar` wrote; None for a judge that writes."""
    import pyarrow.parquet as pq

    path = Path(directory, "scores.parquet")
    rows: list[dict[str, Any]] | None = pq.read_table(path).to_pylist() if path.exists() else None
    return rows


def _rates(inputs: Mapping[str, str], name: str) -> Rates:
    """Mean cost of one judgement (of an item, by a scalar reward model): tokens as drawn, seconds as the last attempt
    of the step measured them. Weights are counted where the models are inputs."""
    from spct_ray.cluster.sampling import read_trajectories
    from spct_ray.evaluation.compute import Rates, count_weights

    directory = inputs[f"evaluate_{name}"]
    timing = json.loads(Path(directory, "timing.json").read_text())
    model, meta = inputs.get(f"model_{name}"), inputs.get(f"meta_{name}")
    params = count_weights(str(Path(model, "model"))) if model else None
    if (rows := _scalar_rows(directory)) is not None:
        tokens = sum(row["tokens"] for row in rows) / len(rows)
        return Rates(params, 0, tokens, 0.0, timing["engine_seconds"] / len(rows))
    made = read_trajectories(directory)
    return Rates(
        params=params,
        meta_params=count_weights(str(Path(meta, "model"))) if meta else 0,
        prompt_tokens=sum(t.prompt_tokens for t in made) / len(made),
        completion_tokens=sum(t.completion_tokens for t in made) / len(made),
        seconds=timing["engine_seconds"] / timing["judgements"] if timing["judgements"] else 0.0,
    )


def _about(inputs: Mapping[str, str], name: str, rates: Rates) -> dict[str, Any]:
    record = read_record(inputs[f"evaluate_{name}"])
    return {
        "weights": rates.params,
        "meta_weights": rates.meta_params,
        "prompt_tokens": rates.prompt_tokens,
        "completion_tokens": rates.completion_tokens,
        "engine_seconds_per_judgement": rates.seconds,
        "evaluate": record.config if record else None,
    }


def _habits(tasks: Mapping[str, Task], judged: Mapping[str, Judged]) -> dict[str, float | None]:
    """Of judgements of built-in items; empty where there are none that parsed."""
    from spct_ray.data.builtin import SOURCE
    from spct_ray.data.habits import habits

    items = {item.id: item for item in tasks["heldout"].items if item.source == SOURCE and item.facts}
    made = judged["heldout"].trajectories
    told = [(items[t.item_id], t) for t in made if t.item_id in items and not t.failure]
    return habits(told) if told else {}


def _seconds(inputs: Mapping[str, str]) -> dict[str, float]:
    """Seconds of each input step by its name, in the order in which they finished."""
    records = [record for directory in set(inputs.values()) if (record := read_record(directory))]
    return {r.name: round(float(r.seconds), 1) for r in sorted(records, key=lambda r: (r.finished_at, r.name))}


def _date(inputs: Mapping[str, str]) -> str:
    """When the last of the inputs was finished."""
    return max((r.finished_at for d in set(inputs.values()) if (r := read_record(d))), default="unknown")


def _missing(inputs: Mapping[str, str]) -> list[str]:
    wanted = {f"evaluate_{name}": f"judge {name} was not evaluated" for name in JUDGES}
    wanted |= {
        "rft": "no RFT step, no loss curve",
        "grpo": "no GRPO step, no reward curves",
        "meta_scores": "no meta-RM scores, no meta votes",
        "select": "no selection step, no counts",
    }
    return [what for role, what in wanted.items() if role not in inputs]


def ways(model: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every way to decide of one judge's block, with its entry."""
    from spct_ray.evaluation.results import VOTES
    from spct_ray.evaluation.tables import AGGREGATORS

    found = [("greedy", model["greedy"])]
    found += [(f"{key.replace('_', ' ')}@{k}", made) for key in VOTES for k, made in model[key].items()]
    others = ((name, made) for name, made in model["aggregators"].items() if name not in VOTES.values())
    found += [(AGGREGATORS[name], made) for name, made in others]
    return found + [(f"adaptive, {name}", made) for name, made in model["adaptive"].items()]


def _points(blocks: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"benchmark": label, "judge": name, "way": way, "k": made["k"], "score": made["score"], **made["cost"]}
        for label, block in blocks.items()
        for name, model in block["models"].items()
        for way, made in ways(model)
        if made["score"] is not None
    ]


def _pareto(points: Sequence[Mapping[str, Any]], blocks: Mapping[str, Any]) -> dict[str, Any]:
    from spct_ray.evaluation.compute import pareto

    return {
        label: {
            axis: pareto([p for p in points if p["benchmark"] == label and p[axis]], axis)
            for axis in ("tokens", "flops", "seconds")
        }
        for label in blocks
    }


def _transfer(blocks: Mapping[str, Any]) -> dict[str, Any]:
    """The meta RM of each judge on each benchmark, those of its training distribution first."""
    ordered = sorted(blocks.items(), key=lambda named: not named[1]["in_distribution"])
    keys = ("auc", "auc_without_ties", "auc_within_item", "ece", "accuracy", "share_right", "num_samples")
    found: dict[str, Any] = {}
    for label, block in ordered:
        for name, model in block["models"].items():
            if "meta_rm" in model:
                found.setdefault(name, {})[label] = {key: model["meta_rm"][key] for key in keys}
    return found


def _sections(result: Mapping[str, Any], inputs: Mapping[str, str], ks: Sequence[int]) -> list[Any]:
    from spct_ray.evaluation import tables
    from spct_ray.evaluation.page import Section

    sections = []
    for label, block in result["benchmarks"].items():
        title = "Held-out items" if label == "heldout" else f"{block['title']} ({label})"
        found = tables.of_benchmark(label, block, ks)
        charts = _charts(block, [p for p in result["points"] if p["benchmark"] == label], result["pareto"][label])
        sections.append(Section(title, found, charts, tables.remarks(block, ks)))
    extra = [tables.habits(result["habits"]), tables.transfer(result["meta_rm"], result["benchmarks"])]
    if "select" in inputs:
        counts = json.loads(Path(inputs["select"], "select_report.json").read_text())["counts"]
        rows = [(name.replace("_", " "), f"{count:,}") for name, count in counts.items()]
        extra.append(tables.Table.of("Selection for the cold start", ("reason", "judgements"), rows))
    rows = [(name, f"{seconds:,.1f}") for name, seconds in result["seconds"].items()]
    extra.append(tables.Table.of("Seconds by step", ("step", "seconds"), rows))
    extra = [table for table in extra if table.rows]
    training = _training_charts(inputs)
    return [*sections, Section("The run" if training else "Judges", extra, training)] if extra or training else sections


def _charts(block: Mapping[str, Any], points: Sequence[Mapping[str, Any]], fronts: Mapping[str, Any]) -> list[Chart]:
    from spct_ray.evaluation import plots
    from spct_ray.evaluation.page import Chart

    models, chance = block["models"], block["chance"]
    bands = "Bands: 95 % intervals over questions and draws of k samples."
    costs = "What a decision costs in written tokens; the meta RM reads but writes none."
    charts = [
        Chart("Score over samples", bands, plots.score_curves(models, chance)),
        Chart("Score over generated tokens", costs, plots.score_curves(models, chance, over_tokens=True)),
        Chart("Margins and scores", "Is a vote that leads by more more often right?", plots.calibration(models)),
    ]
    spent = {"tokens": "written tokens", "flops": "2 × weights × tokens, read and written",
             "seconds": "of the engine as measured, without the meta RM's"}  # fmt: skip
    for axis, what in spent.items():
        if front := fronts[axis]:
            told = "; ".join(f"{n}: {p['judge']}, {p['way']}" for n, p in enumerate(front, 1))
            svg = plots.pareto_front(points, front, axis)
            charts.append(Chart(f"Score over {axis}", f"Cost: {what}. Pareto front: {told}.", svg))
    if any(m.get("meta_rm", {}).get("reliability") for m in models.values()):
        svg = plots.meta_reliability(models)
        charts.append(Chart("Meta RM: reliability", "Share right over the predicted probability.", svg))
    return charts


def _training_charts(inputs: Mapping[str, str]) -> list[Chart]:
    from spct_ray.evaluation import plots
    from spct_ray.evaluation.page import Chart

    charts = []
    if "grpo" in inputs:
        rows = [
            row | {"share_unparsable": sum(v for k, v in row.items() if k.startswith("share_unparsable_"))}
            for row in read_metrics(inputs["grpo"])
        ]
        svg = plots.training_curves(rows, GRPO_PANELS, plots.colour(2))
        charts.append(Chart("GRPO", "Each step's value, and its running mean.", svg, wide=True))
    if "rft" in inputs:
        svg = plots.training_curves(read_metrics(inputs["rft"]), {"Loss": ("loss",)}, plots.colour(1))
        charts.append(Chart("Rejective fine-tuning", "Loss per judgement token, and its running mean.", svg))
    return charts


def _samples(tasks: Mapping[str, Task], judged: Mapping[str, Mapping[str, Judged]]) -> list[dict[str, Any]]:
    """One row a judgement: what was asked, written, scored, and its outcome by Eq. 10."""
    rows = []
    for name, by_label in judged.items():
        for label, found in by_label.items():
            table = found.votable
            right_IK, tied_IK = table.correct_IK, table.tied_IK
            items = {item.id: (i, item) for i, item in enumerate(tasks[label].items)}
            place: dict[str, int] = {}
            for t in sorted(found.trajectories, key=lambda t: (t.item_id, t.sample)):
                i, item = items[t.item_id]
                k = place[t.item_id] = place.get(t.item_id, -1) + 1
                logit = None if table.logits_IK is None or t.failure else float(table.logits_IK[i, k])
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
    chosen = []
    for kinds in groups.values():
        turns = [(k, r) for turn in itertools.zip_longest(*([(k, r) for r in rs] for k, rs in kinds.items()))
                 for pair in turn if pair is not None for k, r in [pair]]  # fmt: skip
        chosen += [_shown_sample(row, kind, items[row["benchmark"], row["item_id"]]) for kind, row in turns[:num]]
    return chosen


def _shown_sample(row: Mapping[str, Any], kind: str, item: Item) -> dict[str, Any]:
    several = len(item.responses) > 1
    tags = [tag for tag in (item.subset, f"n = {len(item.responses)}") if tag]
    tags += [] if row["logit"] is None else [f"meta logit {row['logit']:.2f}"]
    truth = "truth: right" if item.rewards[0] > 0.5 else "truth: wrong"
    responses = [
        {
            "text": item.responses[i],
            "score": row["scores"][i] if row["scores"] else "–",
            "mark": ("best" if item.rewards[i] == max(item.rewards) else "") if several else truth,
        }
        for i in row["order"]
    ]
    turns = [m.content if len(item.messages) == 1 else f"{m.role}: {m.content}" for m in item.messages]
    badge = row["outcome"].replace("_", " ")
    return {"benchmark": row["benchmark"], "judge": row["judge"], "outcome": kind, "badge": badge, "tags": tags,
            "query": turns, "responses": responses, "text": row["text"]}  # fmt: skip


def _examples(name: str, judged: Judged, task: Task, k: int) -> list[str]:
    """The first held-out item that the vote got right, and the first that it got wrong, of those with several responses
    where there are any; each with the first judgement that decides as the vote did, if there is one."""
    from spct_ray.evaluation.judgements import right_options
    from spct_ray.evaluation.tables import example

    assert judged.prompt is not None
    scale = scale_of(1, judged.prompt)
    by_item: dict[str, list[Trajectory]] = {item.id: [] for item in task.items}
    for t in sorted(judged.trajectories, key=lambda t: t.sample):
        by_item[t.item_id].append(t)
    found: dict[bool, str] = {}
    for item in [item for item in task.items if len(item.responses) > 1] or task.items:
        samples, seed = by_item[item.id][:k], derive_seed(0, item.id)
        verdict = vote(item.id, len(item.responses), samples)
        decision = decide(verdict, seed) if len(item.responses) > 1 else decide_single(verdict, scale, seed)
        is_right = decision is not None and right_options(item)[decision]
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
