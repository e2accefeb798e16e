"""What README shows under "Extending" works as it stands there: each of its modules, from outside the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluation import judgements
from tiny import make_tiny_model

from spct_ray.cluster.sampling import read_trajectories
from spct_ray.config import load
from spct_ray.data.builtin import BuiltinConfig, generate, requirements_of
from spct_ray.data.program import ProgramConfig, ProgramJudge, exercises, habits
from spct_ray.data.store import read_items
from spct_ray.errors import ConfigError
from spct_ray.evaluation.benchmarks import parse_spec
from spct_ray.graph.record import finished_records
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.stages import benchmarks, report
from spct_ray.stages.recipe import Recipe, build_steps
from spct_ray.stages.student import phrases

ROOT = Path(__file__).parent.parent
KINDS, PROMPT = ("my_kinds:FRUIT",), JudgeConfig(template="compact", max_tokens=96)
RECIPE = """
base: {base}
root: {root}
items:
  builtin: {{size_train: 30, size_heldout: 5, num_responses_weights: [0, 1, 0], kinds: ["my_kinds:FRUIT"]}}
sample: {{sampler: {{kind: "my_samplers:Shortest", own: {{high: 9}}}}}}
steps:
  lengths: {{stage: "my_stages:lengths", inputs: {{items: items}}, config: {{longest: 40}}}}
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on the path with the modules of README, and a recipe that names three of them."""
    for block in re.findall(r"^  ```python\n(.*?)^  ```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE):
        code = textwrap.dedent(block)
        if name := re.match(r"# (my_\w+\.py)\n", code):
            (tmp_path / name[1]).write_text(code)
            sys.modules.pop(name[1].removesuffix(".py"), None)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.yaml").write_text(RECIPE.format(base=ROOT / "conf/demo.yaml", root=tmp_path / "run"))
    return tmp_path


def spct(outside: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(outside), str(ROOT)])
    command = [sys.executable, "-m", "spct_ray.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=outside, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_a_sampler_and_a_kind_run_in_the_graph(outside: Path) -> None:
    run = ("run", "mine.yaml", "--until=sample", "--until=lengths")
    assert "of 60 are too long" in (printed := spct(outside, *run))
    assert "[lengths] 60/60 responses" in printed
    records = {record.name: record for record in finished_records(str(outside / "run"))}
    assert records.keys() == {"items", "sample", "lengths"}
    assert records["lengths"].function == "my_stages:lengths"
    assert records["lengths"].config == {"longest": 40}
    assert records["sample"].config["sampler"] | {"own": {"high": 9}} == records["sample"].config["sampler"]
    made = read_trajectories(str(next((outside / "run/steps").glob("sample-*"))))
    assert {t.model for t in made} == {"shortest"}
    assert {max(t.scores) for t in made} == {9}
    items = read_items(str(next((outside / "run/steps").glob("items-*")) / "train.parquet"))
    assert any("my_kinds:FRUIT" in json.loads(item.facts) for item in items)
    assert "fruit" in " ".join(item.messages[0].content for item in items)
    plan = spct(outside, "plan", "mine.yaml", "steps.lengths.config.longest=50")
    assert re.search(r"sample +done", plan)
    assert re.search(r"lengths +run +because lengths.longest changed from 40 to 50", plan)
    next((outside / "run/steps").glob("lengths-*/record.json")).unlink()
    assert re.search(r"lengths +resume", spct(outside, "plan", "mine.yaml"))
    assert "[lengths] resumes" in spct(outside, *run)


def test_a_plan_with_a_stage_of_ones_own_loads_nothing_heavy(outside: Path) -> None:
    code = "import sys, spct_ray.cli as c; assert c.main(['plan', 'mine.yaml']) == 0\n"
    code += "assert not {'torch', 'ray', 'vllm', 'transformers'} & sys.modules.keys()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(outside), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], cwd=outside, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"lengths +run +never ran", done.stdout)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.lengths.config.longst=1", r"steps\.lengths\.config\.longst: unknown key; did you mean"),
        ("steps.lengths.config.longest=many", r"steps\.lengths\.config\.longest: expected an integer, found 'many'"),
        ("steps.lengths.stage=my_stages:LengthsConfig", r"steps\.lengths\.stage: .* is not marked as a stage"),
        ("steps.lengths.stage=nothing", r"steps\.lengths\.stage: 'spct_ray\.stages\.nothing:run' cannot be imported"),
        ("resources.steps.lengths.num_workers=2", r"steps\.lengths: the stage has no resources"),
        ("resources.steps.other.num_workers=2", r"resources\.steps: other is no step"),
        ("steps.a/b.stage=select", r"steps: 'a/b' becomes part"),
        ("sample.sampler.kind=nobody", r"sampler\.kind is 'nobody'; it is student, model, endpoint, program or"),
        ("sample.sampler.own.low=1", r"sampler\.own\.low: unknown key"),
        ("sample.sampler.kind=my_kinds:FRUIT", r"sampler\.kind: my_kinds:FRUIT must be a dataclass with make"),
    ],
)
def test_what_cannot_be_a_step_or_sampler_is_refused(outside: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_steps(load(Recipe, str(outside / "mine.yaml"), [override]))


def test_a_built_in_stage_may_be_a_further_step(outside: Path) -> None:
    again = "steps.again={stage: meta_scores, inputs: {items: items, meta: meta, evaluate_rft: evaluate_rft}}"
    where = "resources.steps.again.num_replicas=3"
    steps = {s.name: s for s in build_steps(load(Recipe, str(outside / "mine.yaml"), [again, where]))}
    assert steps["again"].function is steps["meta_scores"].function
    assert steps["again"].cpus == 3


def test_a_kind_is_asked_for_checked_and_counted(outside: Path) -> None:
    train, heldout = generate(BuiltinConfig(200, 50, kinds=KINDS), 1)
    items = [item for item in train if "my_kinds:FRUIT" in json.loads(item.facts)]
    assert len(items) > 20
    for item in (*train, *heldout):
        asked = requirements_of(item)
        met = [all(kind.check(text) for kind in asked) for text in item.responses]
        assert met == [reward == 1 for reward in item.rewards]
    judge = ProgramJudge(ProgramConfig((0, 0, 1), alien=0, finding_error=0, format_error=0), PROMPT)
    tasks = [JudgeTask(item, tuple(range(len(item.responses))), 0, 1.0, i) for i, item in enumerate(items)]
    judged = list(zip(items, judge.judge(tasks), strict=True))
    assert any(" (fruit: yes)" in t.text for _, t in judged)
    assert habits(judged)["findings that are true"] == 1
    assert " apples" in phrases(KINDS)
    assert " apples" not in phrases()
    assert any("fruit" in row["prompt"] for row in exercises(50, PROMPT, 1, KINDS))


def test_kinds_reach_the_steps_that_teach_words(outside: Path) -> None:
    steps = {step.name: step for step in build_steps(load(Recipe, str(outside / "mine.yaml")))}
    assert steps["student"].config.kinds == steps["rft"].config.kinds == KINDS


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("X = 1", "must be a Kind with a new name and a part of number, look"),
        ("X = Kind('wing', 'wings', ('a', 'b', 'c'))", "must be a Kind"),
        ("X = Kind('who', 'pets', ('cats', 'hamsters', 'mice'))", r"taken or not single are \['cats'\]"),
        ("X = Kind('who', 'pets', ('mice',))", "needs more than 2 single words"),
    ],
)
def test_a_kind_whose_words_would_not_tell_is_refused(
    outside: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    name = f"kind_{abs(hash(code))}"
    (outside / f"{name}.py").write_text(f"from spct_ray.data.builtin import Kind\n{code}\n")
    with pytest.raises(ConfigError, match=message):
        generate(BuiltinConfig(1, 1, kinds=(f"{name}:X",)), 1)


def test_a_benchmark_is_read_judged_and_scored(outside: Path) -> None:
    file = outside / "rows.jsonl"
    rows = [{"id": i, "question": f"Which is {i}?", "right": str(i), "wrong": [f"not {i}"]} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs: dict[str, str] = {}

    def context(name: str) -> StepContext:
        inputs[name] = str(outside / name)
        Path(inputs[name]).mkdir()
        return StepContext(name, 1, inputs[name], dict(inputs), "spct evaluate")

    config = benchmarks.BenchmarksConfig((parse_spec(f"my_benchmarks:TRIVIA={file}"),))
    made = benchmarks.run(context("items"), config, benchmarks.BenchmarksResources())
    assert made["TRIVIA"]["items"] == 20
    judgements(outside / "evaluate_m", inputs["items"], 1.0, 2, 0.0, "m")
    inputs |= {"evaluate_m": str(outside / "evaluate_m"), "model_m": str(outside / "model_m")}
    make_tiny_model(outside / "model_m" / "model")
    report.run(context("report"), report.ReportConfig((1, 2)), None)
    found = json.loads((outside / "report" / "summary.json").read_text())["benchmarks"]["TRIVIA"]
    assert found["title"] == "Trivia"
    assert found["models"]["m"]["greedy"]["score"] == 1


@pytest.mark.slow
def test_an_objective_makes_a_real_update(outside: Path) -> None:
    from spct_ray.learn.policy import objective_of
    from spct_ray.learn.train_config import OptimConfig, TrainResources
    from spct_ray.stages.grpo import GrpoConfig, Phases, policy_trainer, update, with_advantages
    from spct_ray.stages.rollouts import Rollout

    make_tiny_model(outside / "model")
    settings: dict[str, Any] = {"optim": OptimConfig(lr=1e-3, dtype="float32"), "steps": 1, "beta": 0.0}
    config = GrpoConfig(objective="my_module:LeaveOneOut", prompts_per_step=1, **settings)
    groups = [
        [Rollout("i", (5, 6, 7, 8 + i), 2, (-6.0, -6.0), "correct", True, reward, "stop", 0)
         for i, reward in enumerate((1.0, -1.0, -1.0, 1.0))]
    ]  # fmt: skip
    samples = with_advantages(groups, objective_of(config, 96))
    assert [s.advantage for s in samples] == pytest.approx([4 / 3, -4 / 3, -4 / 3, 4 / 3])
    trainer = policy_trainer(str(outside / "model"), config, TrainResources(threads=1), 1)
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    numbers = update(trainer, None, groups, config, 1000, Phases())
    assert numbers["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
