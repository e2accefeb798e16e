"""`spct evaluate` without engines: what it resolves, the graph it builds, and its report on judgements made by hand."""

from __future__ import annotations

import html.parser
import json
import random
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from graph_toys import step_ids

from spct_ray.cli import main
from spct_ray.cluster.sampling import TRAJECTORY_SCHEMA
from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.config import to_plain
from spct_ray.data.store import judged_files, read_items, write_items
from spct_ray.engines.base import EngineConfig
from spct_ray.errors import ConfigError
from spct_ray.evaluation.benchmarks import BenchmarkSpec, find
from spct_ray.evaluation.compute import Rates, cost, count_weights, pareto
from spct_ray.evaluation.judgements import tabulate
from spct_ray.evaluation.results import Counting, Judged, Task, judge_block
from spct_ray.evaluation.tables import transfer
from spct_ray.graph.record import StepRecord, step_directory, write_record
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import JudgeTask, to_trajectory
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.placement import Nodes
from spct_ray.records import Item, Message, Trajectory
from spct_ray.stages import benchmarks, evaluation, scalar
from spct_ray.stages import report as report_stage
from spct_ray.stages.evaluate import EvaluateConfig, tasks_of
from spct_ray.stages.evaluation import Endpoint, Evaluation, EvaluationConfig, build_steps, on_resources, resolve
from spct_ray.stages.meta_scores import MetaScoresResources

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"
PROMPT = JudgeConfig(template="compact", single="scale")


def make_model(directory: Path, fill: int = 0, template: bool = True) -> Path:
    """A directory that passes for a model of 6 weights."""
    directory.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes([fill] * 12))
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"} if template else {}))
    return directory


def make_benchmarks(tmp_path: Path, num: int = 30) -> tuple[BenchmarkSpec, ...]:
    """Files of 30 pairs of RewardBench, and of 6 single responses of ReaLMistake."""
    subsets = ("alpacaeval-easy", "hep-go", "math-prm")
    pairs = [{"id": i, "prompt": f"Q{i}{HOSTILE}", "chosen": f"g{i}", "rejected": f"b{i}", "subset": subsets[i % 3]}
             for i in range(num)]  # fmt: skip
    singles = [{"input": f"Q{i}", "llm_response": "r", "error_label": ("error", "no_error")[i % 2]} for i in range(6)]
    for name, rows in (("rb", pairs), ("rm", singles)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluation.specs(f"rewardbench={tmp_path}/rb.jsonl,realmistake={tmp_path}/rm.jsonl")


def judgements(directory: Path, items_dir: str, skill: float, k: int, fails: float, name: str) -> None:
    """The files of a finished evaluate step whose judge is right with probability `skill`."""
    rng, made = random.Random(name), []
    for file in judged_files(items_dir).values():
        for item in read_items(str(file)):
            for task in tasks_of(item, EvaluateConfig(PROMPT, "scale", k), 1):
                made.append(judgement(task, rng.random() < skill, rng.random() < fails, name, rng))
    (directory / "trajectories").mkdir(parents=True)
    rows = [{"key": t.key, **t.to_row()} for t in made]
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAJECTORY_SCHEMA), directory / "trajectories" / "0.parquet")
    (directory / "timing.json").write_text(json.dumps({"engine_seconds": 5.0, "judgements": 100}))
    if not (directory / "record.json").exists():
        config = to_plain(EvaluateConfig(PROMPT, "scale", k))
        write_record(str(directory), StepRecord(f"evaluate_{name}", name, "f", 1, 1, config, {}, {}))


def judgement(task: JudgeTask, right: bool, fails: bool, name: str, rng: random.Random) -> Any:
    high, low = rng.randint(6, 9), rng.randint(2, 5)
    best = task.item.rewards.index(max(task.item.rewards))
    if len(task.order) == 1:
        shown = [high if right == bool(task.item.rewards[0]) else low]
    else:
        shown = [high if (i == best) == right else low for i in task.order]
    text = "nothing" if fails else f"Scores: \\boxed{{{', '.join(map(str, shown))}}}"
    made = to_trajectory(task, PROMPT, text=text, stop_reason="stop", model=name)
    return replace(made, prompt_tokens=100, completion_tokens=20)


def context(out: Path, name: str, inputs: dict[str, str]) -> StepContext:
    out.mkdir(parents=True, exist_ok=True)
    return StepContext(name, 1, str(out), inputs, "spct")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """Two judges, one with a meta RM that knows what is right; its summary, directory and metrics."""
    tmp_path = tmp_path_factory.mktemp("report")
    specs = make_benchmarks(tmp_path)
    benchmarks.run(
        context(tmp_path / "items", "benchmarks", {}),
        benchmarks.BenchmarksConfig(specs),
        benchmarks.BenchmarksResources(),
    )
    inputs = {"items": str(tmp_path / "items")}
    for name, skill, fails in (("weak", 0.55, 0.2), ("strong", 0.75, 0.0)):
        directory = tmp_path / f"evaluate_{name}"
        judgements(directory, inputs["items"], skill, 8, fails, name)
        make_model(tmp_path / f"model_{name}" / "model")
        inputs |= {f"evaluate_{name}": str(directory), f"model_{name}": str(tmp_path / f"model_{name}")}
    table = pq.read_table(tmp_path / "evaluate_strong" / "trajectories").to_pylist()
    items = {i.id: i for f in judged_files(inputs["items"]).values() for i in read_items(str(f))}
    rows = [
        {"model": "strong", "key": r["key"], "logit": 3.0 if is_right(r, items[r["item_id"]]) else -3.0} for r in table
    ]
    (tmp_path / "meta_scores_strong").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "meta_scores_strong" / "logits.parquet")
    make_model(tmp_path / "meta_strong" / "model")
    inputs |= {f"{role}_strong": str(tmp_path / f"{role}_strong") for role in ("meta_scores", "meta")}
    config = report_stage.ReportConfig((1, 2, 4, 8), resamples=100)
    metrics = report_stage.run(context(tmp_path / "out", "report", inputs), config, None)
    return json.loads((tmp_path / "out" / "summary.json").read_text()), tmp_path / "out", metrics


def is_right(row: dict[str, Any], item: Any) -> bool:
    scores = row["scores"]
    if len(scores) == 1:
        return bool((scores[0] > 5.5) == bool(item.rewards[0]))
    return bool(scores.index(max(scores)) == item.best)


def test_more_samples_help_and_the_meta_rm_that_knows_is_right(report: Any) -> None:
    summary, _, _ = report
    block = summary["benchmarks"]["rewardbench"]
    strong = block["models"]["strong"]
    assert strong["vote"]["8"]["score"] > strong["vote"]["1"]["score"]
    assert strong["meta_vote"]["8"]["score"] >= strong["vote"]["8"]["score"]
    assert strong["aggregators"]["best_by_meta"]["score"] == pytest.approx(1, abs=0.05)
    assert strong["meta_rm"]["auc"] == 1
    assert block["chance"] == pytest.approx(0.5, abs=0.05)
    low, high = strong["vote"]["8"]["ci"]
    assert low <= strong["vote"]["8"]["score"] <= high
    assert set(strong["vote"]["8"]["parts"]) == {"Chat", "Reasoning"}
    assert block["models"]["weak"]["meta_vote"] == {}
    assert set(strong["aggregators"]) == {
        "sum", "mean", "median", "majority", "best_by_meta", "meta_top", "meta_weighted",
    }  # fmt: skip


def test_failures_are_named_and_differences_paired(report: Any) -> None:
    block = report[0]["benchmarks"]["rewardbench"]
    assert set(block["models"]["weak"]["failures"]) == {"no_box"}
    assert block["models"]["strong"]["failures"] == {}
    found = block["paired"]["strong - weak, vote@8"]
    weak, strong = (block["models"][name]["vote"]["8"]["score"] for name in ("weak", "strong"))
    assert found["difference"] == pytest.approx(strong - weak)
    assert found["won"] + found["lost"] + found["equal"] + found["undecided"] == 30
    greedy = block["paired"]["strong - weak, greedy"]  # undecided in either of the two orders
    rate = block["models"]["weak"]["greedy"]["undecided_rate"]
    assert 30 * rate <= greedy["undecided"] <= 60 * rate
    assert block["models"]["weak"]["greedy"]["k"] == 1


def test_adaptive_voting_is_the_service_s_and_says_what_it_saves() -> None:
    """One pair that the first four samples settle (9 : 1 always), one that no look settles (even), one that four
    samples give to the wrong side, one that nobody could judge: by hand 4, 8, 4 and 8 of 8 samples, and the third of
    four decisions differs."""
    scores = [[(9, 1)] * 8, [(9, 1), (1, 9)] * 4, [(1, 9)] * 4 + [(10, 1)] * 4, [()] * 8]
    items = [Item(f"i{i}", (Message("user", "Q"),), ("a", "b"), (1.0, 0.0)) for i in range(4)]
    made = [
        Trajectory(item.id, k, (0, 1), "t", s, "" if s else "no_box", False, False, 0.5, k, "m", 0, 10, 10 + k, "stop")
        for item, rows in zip(items, scores, strict=True)
        for k, s in enumerate(rows)
    ]
    table = tabulate(items, made, 5.5, {t.key: float(-t.sample) for t in made})
    judged = Judged(tuple(made[::-1]), table, table, Rates(10, 0, 10, 10, 1.0), PROMPT)
    task = Task.of(find("own"), items, Counting((1, 8), 0.5, 4, 50), 0)
    block = judge_block(task, judged)[0]["adaptive"]
    assert [*block] == ["error 0.01", "error 0.05", "meta, error 0.01", "meta, error 0.05"]
    found = block["error 0.05"]
    assert found["k"] == pytest.approx((4 + 8 + 4 + 8) / 4)
    assert found["differ_from_k_max"] == pytest.approx(1 / 4)
    assert found["differ_ci"][0] == 0  # a resample without the third item
    assert 1 / 4 < found["differ_ci"][1] <= 1
    four, eight = sum(range(10, 14)), sum(range(10, 18))
    assert found["share_of_tokens"] == pytest.approx((2 * four + 2 * eight) / (4 * eight))
    assert found["score"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert found["cost"]["tokens"] == pytest.approx(found["k"] * 10)
    # the meta RM keeps the first half: of the third item both halves say the same, of the first too
    assert block["meta, error 0.05"]["differ_from_k_max"] == 0


def test_the_meta_rm_stands_side_by_side_in_and_out_of_its_distribution(report: Any) -> None:
    summary, out, _ = report
    for label in ("rewardbench", "realmistake"):
        models = summary["benchmarks"][label]["models"]
        assert models["strong"]["meta_rm"]["auc"] == 1  # it knows what is right
        assert "meta_rm" not in models["weak"]
        assert summary["benchmarks"][label]["in_distribution"] is False
    assert "never trained on" in (out / "index.html").read_text()
    meta = {"auc": 0.5, "auc_within_item": 0.5, "ece": 0.5}
    blocks = {
        label: {"models": {"m": {"meta_rm": meta}}, "in_distribution": trained}
        for label, trained in (("llmbar", False), ("heldout", True))
    }
    assert [row[:2] for row in transfer(blocks).rows] == [
        ("m, heldout", "in distribution"), ("m, llmbar", "never trained on"),
    ]  # fmt: skip


def test_held_out_items_of_a_run_are_a_benchmark(tmp_path: Path) -> None:
    fake_run(tmp_path / "run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    made = [Item(f"vif-{i}", (Message("user", f"Q{i}"),), ("a", "b"), (1.0, 0.0), facts="[1]") for i in range(3)]
    write_items(step_directory(str(tmp_path / "run"), "items", "items".ljust(12, "0")) + "/heldout.parquet", made)
    for target in (f"{tmp_path}/run", f"{tmp_path}/run:rft", f"{tmp_path}/run:base@best"):
        (spec,) = evaluation.specs("heldout", [str(tmp_path / "model"), target])
        assert [item.id for item in evaluation_items(spec)] == ["heldout:vif-0", "heldout:vif-1", "heldout:vif-2"]
    assert evaluation_items(spec)[0].responses == ("a", "b")
    with pytest.raises(ConfigError, match="no target is a run"):
        evaluation.specs("heldout", [str(tmp_path / "model")])


def test_single_responses_are_scored_by_area(report: Any) -> None:
    strong = report[0]["benchmarks"]["realmistake"]["models"]["strong"]
    assert {"error F1", "rated"} <= set(strong["vote"]["8"]["parts"])
    assert strong["vote"]["8"]["score"] > 0.5


def test_costs_grow_with_samples_and_the_front_is_one(report: Any) -> None:
    summary = report[0]
    votes = summary["benchmarks"]["rewardbench"]["models"]["strong"]["vote"]
    assert votes["8"]["cost"]["tokens"] == pytest.approx(8 * votes["1"]["cost"]["tokens"])
    assert votes["1"]["cost"]["prefill_flops"] == pytest.approx(2 * 6 * 100)
    assert votes["1"]["cost"]["seconds"] == pytest.approx(0.05)
    page = (report[1] / "index.html").read_text()
    for axis, title in (("tokens", "tokens"), ("flops", "flops"), ("seconds", "seconds")):
        front = summary["benchmarks"]["rewardbench"]["pareto"][axis]
        assert [p[axis] for p in front] == sorted(p[axis] for p in front)
        assert [p["score"] for p in front] == sorted(p["score"] for p in front)
        assert f"Score over {title}" in page


def test_every_sample_is_kept_and_the_table_is_printed(report: Any) -> None:
    _, out, metrics = report
    rows = pq.read_table(out / "samples.parquet").to_pylist()
    assert len(rows) == 2 * 36 * 8
    assert sum(r["logit"] is not None for r in rows) == 36 * 8
    assert {r["outcome"] for r in rows if r["failure"]} == {"no_box"}
    assert {r["outcome"] for r in rows if not r["failure"]} == {"right", "wrong"}
    text = metrics["summary_text"]
    assert "RewardBench (rewardbench): official score in % of 30 questions" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "best by meta" in text
    assert "strong - weak, vote@8" in text


class Tags(html.parser.HTMLParser):
    """Every element, what it loads, and event handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.events: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.events += [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_self_contained_and_escapes_what_it_shows(report: Any) -> None:
    page, tags = (report[1] / "index.html").read_text(), Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.tags.count("script") == 1
    assert tags.events == []
    assert all(source.startswith("data:image/svg+xml;base64,") for source in tags.sources)
    assert "&lt;script&gt;alert" in page
    for words in ('data-outcome="failure"', 'data-outcome="right"', "sortable", "Meta RM", "By kind", "Adaptive"):
        assert words in page


def test_costs_by_hand() -> None:
    rates = Rates(params=10, meta_params=4, prompt_tokens=100, completion_tokens=20, seconds=0.5)
    # decode 2 * 10 * 20 * 3 = 1200; prefill 2 * 10 * 100 * 3 = 6000, with meta + 2 * 4 * 120 * 3 = 2880
    plain, guided = cost(rates, 3, False), cost(rates, 3, True)
    assert plain == {"tokens": 60, "prefill_flops": 6000, "decode_flops": 1200, "seconds": 1.5, "flops": 7200}
    assert (guided["prefill_flops"], guided["flops"]) == (8880, 10080)
    points = [{"x": 2, "score": 0.6}, {"x": 1, "score": 0.5}, {"x": 3, "score": 0.55}, {"x": 2, "score": 0.4}]
    assert pareto(points, "x") == [points[1], points[0]]


def test_weights_are_counted_from_headers(tmp_path: Path) -> None:
    assert count_weights(str(make_model(tmp_path / "m"))) == 6


def fake_run(root: Path, gpus: int = 0, scoring_gpus: float = 0) -> dict[str, str]:
    """Records of a run with base and rft judges, evaluated, and a meta RM; returns model directories by step."""
    models = {}

    def record(name: str, inputs: dict[str, str], config: dict[str, Any], resources: Any = None) -> None:
        sources = {role: {"step": step, "id": f"{step}".ljust(12, "0")} for role, step in inputs.items()}
        directory = Path(step_directory(str(root), name, name.ljust(12, "0")))
        if name in ("student", "rft", "meta"):
            models[name] = str(make_model(directory / "model", fill=len(models)))
        directory.mkdir(parents=True, exist_ok=True)
        write_record(str(directory), StepRecord(name, name.ljust(12, "0"), "f", 1, 1, config, sources, resources))

    how = to_plain(EvaluateConfig(PROMPT, "binary", 8, 0.7))
    engine = EngineConfig(max_model_len=640, tensor_parallel=max(1, gpus))
    where = to_plain(SamplingResources(gpus_per_replica=gpus, block_size=99, engine=engine))
    scoring = MetaScoresResources(gpus_per_replica=scoring_gpus)
    record("items", {}, {})
    record("student", {}, {})
    record("rft", {"items": "items"}, {})
    record("meta", {"items": "items"}, {})
    record("evaluate_base", {"items": "items", "judge": "student"}, how, where)
    record("evaluate_rft", {"items": "items", "judge": "rft"}, how, where)
    record("meta_scores", {"meta": "meta", "evaluate_rft": "evaluate_rft"}, {}, to_plain(scoring))
    return models


def test_a_run_stands_for_its_last_judge_as_it_was_evaluated(tmp_path: Path) -> None:
    root = tmp_path / "my run"
    models = fake_run(root)
    judge = resolve(str(root), EvaluationConfig())
    assert (judge.name, judge.model, judge.meta) == ("my-run_rft", models["rft"], models["meta"])
    assert judge.config == EvaluateConfig(PROMPT, "binary", 8, 0.7)
    assert judge.resources.block_size == 99
    assert list(judge.train) == ["items0000000"]
    base = resolve(f"{root}:base", EvaluationConfig())
    assert (base.model, base.meta, base.train) == (models["student"], None, {})
    with pytest.raises(ConfigError, match="no finished evaluation of grpo"):
        resolve(f"{root}:grpo", EvaluationConfig())
    with pytest.raises(ConfigError, match="not 'sft'"):
        resolve(f"{root}:sft", EvaluationConfig())


@pytest.mark.parametrize(
    ("step", "section", "message"),
    [
        (
            "evaluate_rft",
            "config",
            r"evaluate_rft-evaluate_rft/record\.json: config\.old_name: unknown key; known keys: judge,",
        ),
        ("evaluate_rft", "resources", r"evaluate_rft-evaluate_rft/record\.json: resources\.old_name: unknown key"),
        ("meta_scores", "resources", r"meta_scores-meta_scores0/record\.json: resources\.old_name: unknown key"),
    ],
)
def test_a_run_of_another_version_is_refused_by_file_and_field(
    tmp_path: Path, step: str, section: str, message: str
) -> None:
    fake_run(tmp_path)
    path = Path(step_directory(str(tmp_path), step, step.ljust(12, "0")), "record.json")
    record = json.loads(path.read_text())
    record[section]["old_name"] = 1
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=message):
        resolve(str(tmp_path), EvaluationConfig())


def test_judges_run_on_what_they_ran_on_in_the_run_and_else_on_gpus_if_there_are_any(tmp_path: Path) -> None:
    fake_run(tmp_path / "gpus", gpus=2, scoring_gpus=0.5)
    fake_run(tmp_path / "cpus")
    specs = make_benchmarks(tmp_path)
    targets = [tmp_path / "gpus", tmp_path / "cpus", make_model(tmp_path / "alone")]

    def resources(*overrides: str, nodes: Nodes = ({"CPU": 8.0, "GPU": 4.0},), **config: Any) -> dict[str, Any]:
        said = EvaluationConfig(**config)
        judges = [on_resources(resolve(str(target), said), said, overrides) for target in targets]
        return {step.name: step.placed(nodes).resources for step in build_steps(judges, Evaluation(specs, (1,)))}

    found = resources()
    gpus = {name: where.gpus_per_replica for name, where in found.items() if "evaluate" in name or "scores" in name}
    assert gpus == {
        "evaluate_gpus_rft": 2, "evaluate_cpus_rft": 1, "evaluate_alone": 1,
        "meta_scores_gpus_rft": 0.5, "meta_scores_cpus_rft": 1,
    }  # fmt: skip
    assert found["evaluate_gpus_rft"].engine == EngineConfig(max_model_len=640, tensor_parallel=2)
    none = resources(nodes=[{"CPU": 8.0}])
    for name in ("evaluate_cpus_rft", "evaluate_alone", "meta_scores_cpus_rft"):
        assert none[name].gpus_per_replica == 0
    both = ("evaluate.engine.tensor_parallel=4", "evaluate.gpus_per_replica=4", "meta_scores.gpus_per_replica=0.25")
    changed = resources(*both)
    assert changed["evaluate_gpus_rft"].engine == EngineConfig(max_model_len=640, tensor_parallel=4)
    assert changed["evaluate_alone"].engine == EngineConfig(max_model_len=512, tensor_parallel=4)
    assert changed["meta_scores_gpus_rft"].gpus_per_replica == 0.25
    own = resources("evaluate.block_size=7", evaluate=SamplingResources(num_replicas=3))
    assert own["evaluate_gpus_rft"] == SamplingResources(num_replicas=3, gpus_per_replica=1, block_size=7)
    assert (
        resources("evaluate.gpus_per_replica=0", evaluate=SamplingResources())["evaluate_gpus_rft"]
        == SamplingResources()
    )
    with pytest.raises(ConfigError, match="tensor_parallel 4 takes 4 GPUs, but 2 are asked for"):
        resources(both[0])
    with pytest.raises(ConfigError, match="did you mean 'num_replicas'"):
        resources("evaluate.num_replica=2")


def test_the_command_takes_overrides_among_its_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_benchmarks(tmp_path)
    model, benchmark = str(make_model(tmp_path / "m")), f"--benchmarks=rewardbench={tmp_path}/rb.jsonl"
    for words, told in (
        (
            [model, "evaluate.gpus_per_replica=1", "evaluate.engine.tensor_parallel=2"],
            "takes 2 GPUs, but 1 are asked for",
        ),
        ([model, "evalute.num_replicas=2"], "did you mean 'evaluate'"),
        (["evaluate.num_replicas=2"], "name at least one run"),
    ):
        assert main(["evaluate", *words, benchmark, f"--root={tmp_path}/out"]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_graph_and_its_ids(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    specs = make_benchmarks(tmp_path / "data")
    fake_run(tmp_path / "run")
    judges = [resolve(str(tmp_path / "run"), EvaluationConfig())]
    judges += [resolve(str(make_model(tmp_path / place / "same")), EvaluationConfig()) for place in "ab"]
    steps = build_steps(judges, Evaluation(specs, (1, 4)))
    names = [step.name for step in steps]
    assert names[0] == "benchmarks"
    assert {"evaluate_run_rft", "meta_scores_run_rft", "evaluate_same", "evaluate_same-2"} <= set(names)
    assert all(s.config.k_max == 4 for s in steps if s.name.startswith("evaluate_"))
    ids = step_ids(steps, 1)
    alone, moved = (
        step_ids(build_steps([replace(judges[1], model=model)], Evaluation(specs, (1, 4))), 1)
        for model in (judges[1].model, judges[2].model)
    )
    assert alone == moved  # the same model at another place
    Path(specs[0].path).write_text(Path(specs[0].path).read_text().replace("Q1", "R1"))
    changed = evaluation.specs(",".join(f"{s.name}={s.path}" for s in specs))
    again = step_ids(build_steps(judges, Evaluation(changed, (1, 4))), 1)
    assert again["benchmarks"] != ids["benchmarks"]


def test_an_endpoint_is_a_judge_without_a_model_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRM_KEY", "sk-very-secret")
    specs = make_benchmarks(tmp_path)
    url, named = "http://127.0.0.1:9/v1", Endpoint("org/grm-1", "GRM_KEY")

    def steps(target: str = url, endpoint: Endpoint = named, **changes: Any) -> Any:
        config = EvaluationConfig(**changes)
        return build_steps([resolve(target, config, endpoint)], Evaluation(specs, (1, 4)))

    found = {step.name: step for step in steps()}
    assert list(found) == ["benchmarks", "evaluate_org-grm-1", "report"]
    asked = found["evaluate_org-grm-1"]
    assert asked.resources.endpoint.base_url == url
    assert asked.inputs == {"items": "benchmarks"}
    assert "secret" not in json.dumps(to_plain(asked.resources)) + json.dumps(to_plain(asked.config))
    ids = step_ids(steps(), 1)["evaluate_org-grm-1"]
    assert step_ids(steps(concurrency=2), 1)["evaluate_org-grm-1"] == ids
    assert step_ids(steps(url + "2"), 1)["evaluate_org-grm-1"] != ids
    (best,) = [s for s in steps(url + "@best") if s.name.startswith("evaluate_")]
    assert (best.name, best.config.prompt.mode) == ("evaluate_org-grm-1-best", "best")
    assert best.resources.endpoint.base_url == url
    with pytest.raises(ConfigError, match="--model NAME"):
        steps(endpoint=Endpoint())


def test_a_scalar_reward_model_is_compared_on_the_same_items(tmp_path: Path, report: Any) -> None:
    """Scores 2 for the best response of every second pair and 1 for all else: half of the pairs are ties, 3/4 right."""
    _, out, _ = report
    inputs = {role: str(out.parent / role) for role in ("items", "evaluate_weak", "model_weak")}
    rows = []
    for number, item in enumerate(i for f in judged_files(inputs["items"]).values() for i in read_items(str(f))):
        scores = [1.0 + (reward == 1 and number % 2) for reward in item.rewards]
        rows.append({"item_id": item.id, "scores": scores, "tokens": 50})
    (tmp_path / "evaluate_rm").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "evaluate_rm" / "scores.parquet")
    (tmp_path / "evaluate_rm" / "timing.json").write_text(json.dumps({"engine_seconds": 3.6, "items": 36}))
    make_model(tmp_path / "model_rm" / "model")
    inputs |= {f"{role}_rm": str(tmp_path / f"{role}_rm") for role in ("evaluate", "model")}
    config = report_stage.ReportConfig((1, 2), resamples=50)
    out = context(tmp_path / "out", "report", inputs)
    text = report_stage.run(out, config, None)["summary_text"]
    assert "rm - weak, vote@2" in text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    model = summary["benchmarks"]["rewardbench"]["models"]["rm"]
    assert model["greedy"]["score"] == pytest.approx(0.75)
    assert model["greedy"]["tie_rate"] == pytest.approx(0.5)
    assert (model["vote"], model["aggregators"]) == ({}, {})
    assert model["greedy"]["cost"] == {
        "tokens": 0, "prefill_flops": 2 * 6 * 50, "decode_flops": 0, "flops": 600, "seconds": pytest.approx(0.1),
    }  # fmt: skip
    front = summary["benchmarks"]["rewardbench"]["pareto"]
    assert "rm" in {p["judge"] for p in front["flops"]}
    assert "rm" not in {p["judge"] for p in front["tokens"]}
    assert {r["judge"] for r in pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()} == {"weak"}
    Tags().feed((tmp_path / "out" / "index.html").read_text())


def test_a_classifier_is_a_scalar_reward_model(tmp_path: Path) -> None:
    specs = make_benchmarks(tmp_path)
    model = make_model(tmp_path / "rm", template=False)
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    judge = resolve(str(model), EvaluationConfig())
    steps = {step.name: step for step in build_steps([judge], Evaluation(specs, (1, 4)))}
    assert steps["evaluate_rm"].function is scalar.run
    with pytest.raises(ConfigError, match="no judge modes"):
        resolve(f"{model}@best", EvaluationConfig())
    with pytest.raises(ConfigError, match="robustness suite"):
        build_steps([judge], Evaluation(specs, (1,), "robustness"))
    fake_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="no finished step bradley_terry"):
        resolve(f"{tmp_path}/run:bradley_terry", EvaluationConfig())


def test_costs_of_unknown_weights_are_unknown() -> None:
    spent = cost(Rates(None, 0, 100, 20, 0.5), 3, False)
    assert spent == {"tokens": 60, "prefill_flops": None, "decode_flops": None, "seconds": 1.5, "flops": None}


def test_contamination_is_counted(tmp_path: Path) -> None:
    long = " ".join(f"word{i}" for i in range(20))
    row = {"id": 1, "prompt": long, "chosen": "g", "rejected": "b", "subset": "hep-go"}
    (tmp_path / "rb.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": 2, "prompt": "else"}) + "\n")
    specs = evaluation.specs(f"rewardbench={tmp_path}/rb.jsonl")
    config = benchmarks.BenchmarksConfig(specs)
    benchmarks.run(context(tmp_path / "a", "benchmarks", {}), config, benchmarks.BenchmarksResources())
    assert json.loads((tmp_path / "a/data_report.json").read_text())["rewardbench"]["contaminated"] is None
    (tmp_path / "a/bench_rewardbench.parquet").rename(tmp_path / "a/train.parquet")
    where = benchmarks.BenchmarksResources((str(tmp_path / "a"),))
    benchmarks.run(context(tmp_path / "b", "benchmarks", {}), config, where)
    found = json.loads((tmp_path / "b/data_report.json").read_text())["rewardbench"]["contaminated"]
    assert found == ["rewardbench:1", "rewardbench:2"]


def test_greedy_judgements_come_in_both_orders(tmp_path: Path) -> None:
    (item, *_) = (i for f in [make_benchmarks(tmp_path)[0]] for i in evaluation_items(f))
    greedy = [t for t in tasks_of(item, EvaluateConfig(k_max=4), 1) if not t.temperature]
    assert sorted(t.order for t in greedy) == [(0, 1), (1, 0)]


def evaluation_items(spec: BenchmarkSpec) -> Any:
    from spct_ray.data.validate import Limits
    from spct_ray.evaluation.benchmarks import read_benchmark

    return read_benchmark(spec, Limits(), None, 0)[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{model}", "--benchmarks", "rewardbnch"], "did you mean 'rewardbench'"),
        (["{model}", "--benchmarks", "llmbar"], "llmbar=PATH"),
        (["{model}", "--benchmarks", "rewardbench,rewardbench"], "none twice"),
        (["{model}", "--benchmarks", "rewardbench", "--k", "1,two"], "--k 1,2,4,8"),
        (["{model}", "--benchmarks", "rewardbench", "--k", "0"], "at least 1"),
        (["nowhere", "--benchmarks", "rewardbench"], "no run (no steps/ in it), no model directory"),
        (["{bare}", "--benchmarks", "rewardbench"], "no chat template"),
        (["{model}@bst", "--benchmarks", "rewardbench"], "did you mean 'best'"),
        (["http://127.0.0.1:9/v1", "--benchmarks", "rewardbench"], "--model NAME"),
    ],
)
def test_errors_say_what_to_do(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path / "model")
    make_model(tmp_path / "bare", template=False)
    filled = [a.format(model=tmp_path / "model", bare=tmp_path / "bare") for a in arguments]
    assert main(["evaluate", *filled]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_judges_on_one_real_engine_and_a_command_that_is_killed(tmp_path: Path) -> None:
    from tiny import make_tiny_model

    for name, seed in (("one", 1), ("two", 2)):
        make_tiny_model(tmp_path / name, seed=seed)
    make_benchmarks(tmp_path, 6)
    (tmp_path / "c.yaml").write_text(
        "judge: {template: compact, max_tokens: 8}\ncluster: {num_cpus: 2, object_store_gib: 0.2}\n"
        "evaluate: {block_size: 4, engine: {max_model_len: 512, max_num_seqs: 16, kv_cache_gib: 0.1}}\n"
    )
    command = [
        sys.executable, "-m", "spct_ray.cli", "evaluate", f"{tmp_path}/one", f"{tmp_path}/two",
        f"--root={tmp_path}/out", "--k=1,2",
        f"--benchmarks=rewardbench={tmp_path}/rb.jsonl", f"--config={tmp_path}/c.yaml",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        said = []
        for line in first.stdout or ():
            said.append(line)
            if "loads its weights into the engines of the judge before" in line:
                break
        first.kill()
    (done,) = [line.split()[0] for line in said if line.startswith("[evaluate_") and "] done" in line]
    resumed = {"[evaluate_one]": "[evaluate_two]", "[evaluate_two]": "[evaluate_one]"}[done]
    assert said[-1].startswith(resumed)
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{done} " not in again.stdout
    assert f"{resumed} starts engines\n" in again.stdout
    assert "official score in % of 6 questions" in again.stdout
    summary = json.loads((tmp_path / "out/report/summary.json").read_text())
    assert summary["judges"]["two"]["params"] > 1000
    failures = summary["benchmarks"]["rewardbench"]["models"]["two"]["failures"]
    assert sum(failures.values()) <= 12
    assert pq.read_table(tmp_path / "out/report/samples.parquet").num_rows == 2 * 12
