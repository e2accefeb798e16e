"""The experiments over seeds: what the table reads from runs, against the judgements it reads."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import experiments
from jobs.experiments import DEMO, EXPERIMENTS, interval, measures, table
from spct_ray.cluster.sampling import TRAJECTORY_SCHEMA
from spct_ray.config import load
from spct_ray.data.builtin import BuiltinConfig, generate
from spct_ray.data.program import ProgramConfig, ProgramJudge
from spct_ray.data.store import write_items
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.judge.rule import is_correct
from spct_ray.records import Item, Trajectory
from spct_ray.stages.evaluate import EvaluateConfig, tasks_of
from spct_ray.stages.recipe import Recipe, build_steps

JUDGE = JudgeConfig(template="compact", single="binary")


def make_run(root: Path, seed: int, judges: dict[str, ProgramConfig]) -> tuple[list[Item], dict[str, list[Trajectory]]]:
    """A run with finished items and evaluations by programs, as far as the table reads it."""
    items = generate(BuiltinConfig(size_train=0, size_heldout=40), seed)[1]
    evaluate = EvaluateConfig(JUDGE, single="binary", k_max=8, temperature=0.7)
    written = {}
    for name in ["items", *(f"evaluate_{judge}" for judge in judges)]:
        (root / "steps" / f"{name}-0123456789ab" / "trajectories").mkdir(parents=True)
        (root / "steps" / f"{name}-0123456789ab" / "record.json").write_text("{}")
    write_items(str(root / "steps" / "items-0123456789ab" / "heldout.parquet"), items)
    for judge, config in judges.items():
        tasks = [task for item in items for task in tasks_of(item, evaluate, seed)]
        made = written[judge] = ProgramJudge(config, JUDGE).judge(tasks)
        rows = [{"key": t.key, **t.to_row()} for t in made]
        place = root / "steps" / f"evaluate_{judge}-0123456789ab" / "trajectories" / "0.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=TRAJECTORY_SCHEMA), place)
    return items, written


def test_the_table_says_what_the_judgements_say(tmp_path: Path) -> None:
    poor, good = ProgramConfig(num_stated_weights=(1.0,), alien=0.5), ProgramConfig(num_stated_weights=(0, 0, 1, 1))
    differences = []
    for seed in (1, 2, 3):
        items, made = make_run(tmp_path / str(seed) / DEMO, seed, {"rft": poor, "grpo": good})
        by_id = {item.id: item for item in items}
        share = {}
        for judge, trajectories in made.items():
            sampled = [t for t in trajectories if t.temperature]
            found = measures(tmp_path / str(seed) / DEMO, judge, "heldout")
            assert found["parsed"] == pytest.approx(fmean(not t.failure for t in sampled))
            right = [0.0 if t.failure else _credit(t, by_id[t.item_id]) for t in sampled]
            assert found["one sample"] == pytest.approx(fmean(right))
            share[judge] = found["one sample"]
        differences.append(100 * (share["grpo"] - share["rft"]))
    text = table(tmp_path)
    mean, low, high = interval(differences)
    assert (
        f"| GRPO - RFT, one sample | {mean:+.1f} | [{low:+.1f}, {high:+.1f}] | {min(differences):+.1f} | 3 | yes |"
        in text
    )
    assert "meta" not in text  # no run has a meta RM


def _credit(t: Trajectory, item: Item) -> float:
    if len(t.scores) == 1 or is_correct(t.scores, item.rewards):
        return float(is_correct(t.scores, item.rewards))
    winners = [i for i, score in enumerate(t.scores) if score == max(t.scores)]
    return (item.best in winners) / len(winners)


def test_a_measure_of_zero_is_a_value_and_one_that_is_not_defined_is_none() -> None:
    assert experiments._or_nan(0.0) == 0.0
    assert math.isnan(experiments._or_nan(None))


def test_an_interval_is_students() -> None:
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-4)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != DEMO])
def test_each_experiment_is_a_recipe_that_reaches_the_steps_it_reads(name: str) -> None:
    recipe = load(Recipe, f"conf/experiments/{name}.yaml", [])
    steps = {step.name for step in build_steps(replace(recipe, reuse=""))}
    assert set(EXPERIMENTS[name].until) <= steps
    assert set(experiments.EXPERIMENTS) >= {file.stem for file in Path("conf/experiments").glob("*.yaml")}
