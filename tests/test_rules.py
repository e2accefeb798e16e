"""The repository's own rules, as tests: sizes, imports, safety, and that every file of conf/ stands for a graph."""

import ast
import functools
import importlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from graph_toys import step_ids
from hypothesis import given, settings
from hypothesis import strategies as st

from spct_ray.config import load
from spct_ray.records import Record

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("spct_ray/**/*.py"), *ROOT.glob("jobs/*.py")])
NAMES = [str(path.relative_to(ROOT)) for path in SOURCES]
UNSAFE = re.compile(r"torch\.load\(|\bpickle\.loads?\(|trust_remote_code\s*=\s*True|(?<![\w.])(eval|exec)\(")
HOMES = {
    "ray": ("spct_ray/graph/runner.py", "spct_ray/cluster/", "spct_ray/stages/", "spct_ray/serve/"),
    "vllm": ("spct_ray/engines/vllm", "jobs/gpu_check_vllm.py"),
}  # fmt: skip
RECIPES = sorted(str(p.relative_to(ROOT / "conf")) for p in ROOT.glob("conf/**/*.yaml") if p.name != "serve.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_source_file_is_safe_explained_and_at_home(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not UNSAFE.search(text)
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "a file opens with why it exists"
    for package, homes in HOMES.items():
        if not name.startswith(homes):
            assert package not in imported_packages(tree)


def imported_packages(tree: ast.AST) -> set[str]:
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@functools.cache
def graph_of(name: str) -> tuple[Any, dict[str, str]]:
    """A recipe of conf/, and the ids of its steps."""
    from spct_ray.stages.recipe import Recipe, build_steps

    recipe = load(Recipe, str(ROOT / "conf" / name))
    return recipe, step_ids(build_steps(recipe), recipe.seed)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_stands_for_a_graph(name: str) -> None:
    assert {"items", "rft", "grpo", "meta", "report"} <= graph_of(name)[1].keys()


FROM_GRPO = {"grpo", "onpolicy", "evaluate_grpo", "meta", "meta_scores", "report"}
FROM_META = {"meta", "meta_scores", "report"}
CHANGES = {  # what an experiment runs beside the run whose finished steps it takes over; of the others, all but these
    "beta_0": FROM_GRPO, "beta_high": FROM_GRPO, "both_orders": FROM_GRPO, "format_reward": FROM_GRPO,
    "out_of_distribution": {"unseen", "evaluate_base", "evaluate_rft", "evaluate_grpo", "meta_scores", "report"},
    "reward_order": FROM_GRPO, "meta_off_policy": FROM_META, "meta_on_policy": FROM_META,
    "meta_ties": FROM_META, "reward_best": FROM_GRPO,
    "votes_32": {"evaluate_rft", "evaluate_grpo", "meta_scores", "report"},
}  # fmt: skip
KEEPS = {
    "no_hinted": {"items", "student", "evaluate_base"},
    "no_easy_rejection": {"items", "student", "sample", "evaluate_base"},
    "no_principles": {"items", "student"},
}


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("conf/experiments/*.yaml")))
def test_an_experiment_runs_only_what_it_changes(name: str) -> None:
    recipe, ids = graph_of(f"experiments/{name}.yaml")
    assert recipe.root == f"runs/{name}"  # its report, and what is served from it, are its own
    if name == "graded":
        assert not recipe.reuse
        return
    beside, others = graph_of("experiments/graded.yaml" if name == "reward_order" else "demo.yaml")
    assert recipe.reuse == beside.root
    changed = {step for step in ids if ids[step] != others.get(step)}
    assert changed == (CHANGES[name] if name in CHANGES else ids.keys() - KEEPS[name])


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("conf/experiments/*.yaml")))
def test_an_experiment_can_be_done_on_data_of_ones_own(name: str, tmp_path: Path) -> None:
    """The command of docs/evaluation.md: the same change, to a run on a file of real preferences."""
    from spct_ray.graph.step import StepContext
    from spct_ray.stages.items import run
    from spct_ray.stages.recipe import Recipe, build_steps

    file = tmp_path / "mine.jsonl"
    pairs = [{"prompt": f"Question {i}?", "chosen": "yes", "rejected": "no"} for i in range(8)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    mine = tmp_path / "mine.yaml"
    items = f"items: {{builtin: null, sources: [{{name: mine, path: {file}}}]}}"
    mine.write_text(f"base: {ROOT}/conf/smollm2.yaml\nroot: runs/mine\n{items}\n")
    others = step_ids(build_steps(load(Recipe, str(mine))), 1)
    overrides = [f"base={mine}", "root=runs/new", "reuse=runs/mine", "items.builtin=null"]
    recipe = load(Recipe, str(ROOT / "conf" / "experiments" / f"{name}.yaml"), overrides)
    steps = build_steps(recipe)
    ids = step_ids(steps, recipe.seed)
    changed = {step for step in ids if ids[step] != others.get(step)}
    keeps = KEEPS.get(name, set()) | {"items", "student"}
    assert changed == (CHANGES[name] if name in CHANGES else ids.keys() - keeps)
    run(StepContext("items", 1, str(tmp_path), {}, ""), steps[0].config, steps[0].resources)
    assert json.loads((tmp_path / "data_report.json").read_text())["kept"]["train"] > 0


def test_the_order_experiment_can_be_made_at_four_responses() -> None:
    from spct_ray.data.builtin import generate
    from spct_ray.stages.recipe import Recipe

    overrides = ["items.builtin.num_responses=[3,4]", "items.builtin.num_requirements=[3]"]
    builtin = load(Recipe, str(ROOT / "conf/experiments/graded.yaml"), [*overrides, "items.builtin.size_train=0"])
    assert builtin.items.builtin is not None
    items = generate(builtin.items.builtin, 1)[1]
    assert {len(item.responses) for item in items} == {3, 4}
    assert all(len(set(item.rewards)) == len(item.rewards) for item in items)


def test_the_serving_example_loads() -> None:
    from spct_ray.serve.deployment import ServeConfig

    load(ServeConfig, str(ROOT / "conf" / "serve.yaml"))


def all_records() -> list[type[Record]]:
    """Every subclass of Record in the package, found by its source text so that nothing else is imported."""
    found = []
    for name in NAMES:
        for class_name in re.findall(r"^class (\w+)\(Record\)", (ROOT / name).read_text(), re.MULTILINE):
            module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
            found.append(getattr(module, class_name))
    return found


@settings(max_examples=5)
@given(st.data())
def test_every_record_pickles(data: Any) -> None:
    for kind in all_records():
        record = data.draw(st.builds(kind))
        again = pickle.loads(pickle.dumps(record))
        assert repr(again) == repr(record)  # not ==: a drawn NaN equals nothing
        assert type(again) is kind
        with pytest.raises((AttributeError, TypeError)):
            record.surprise = 1  # frozen and slotted
