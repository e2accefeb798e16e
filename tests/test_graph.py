"""Ids, plans, records, locks and a step's process, without Ray."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_toys import PartsConfig, PartsResources, left, step_ids, toy_steps, wait_until
from hypothesis import given
from hypothesis import strategies as st

from spct_ray.config import to_plain
from spct_ray.errors import ConfigError, StepError
from spct_ray.graph.explain import link_reused, plan
from spct_ray.graph.lock import hold, holder
from spct_ray.graph.record import (
    describe,
    fingerprint,
    finished_records,
    local_root,
    read_record,
    step_directory,
    write_record,
)
from spct_ray.graph.step import Step, StepContext, format_seconds
from spct_ray.graph.worker import execute

numbers = st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none() | st.text(max_size=4)
values = st.recursive(
    numbers,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Equality of JSON values, written without JSON: numbers by value, lists and tuples alike, true is not 1."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return a == b


def run_all(root: Path, steps: list[Step], seed: int = 7) -> None:
    """Finish the steps in this process."""
    by_name, known = {step.name: step for step in steps}, describe(steps, seed)
    for name, record in known.items():
        directories = {role: known[source].directory(str(root)) for role, source in by_name[name].inputs.items()}
        log = str(root / "logs" / f"{name}.log")
        execute(by_name[name], StepContext(name, seed, record.directory(str(root)), directories, "", log), record)


def reasons(root: Path, steps: list[Step], seed: int = 7) -> dict[str, tuple[str, str]]:
    return {planned.name: (planned.state, planned.reason) for planned in plan(steps, str(root), seed)}


@given(values, values)
def test_equal_fingerprint_means_equal_value(a: Any, b: Any) -> None:
    assert (fingerprint(a) == fingerprint(b)) == same(a, b)


@given(st.dictionaries(st.text(max_size=3), values, max_size=4), st.randoms())
def test_fingerprint_ignores_key_order_and_survives_json(value: dict[str, Any], random: Any) -> None:
    keys = list(value)
    random.shuffle(keys)
    shuffled = {key: value[key] for key in keys}
    assert fingerprint(shuffled) == fingerprint(value)
    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value)


def test_fingerprint_tells_neighbouring_floats_apart_and_not_zero_from_minus_zero() -> None:
    assert fingerprint(0.1) != fingerprint(math.nextafter(0.1, 1))
    assert fingerprint(0.0) == fingerprint(-0.0)
    assert fingerprint(4e-7) == fingerprint(float("0.0000004"))
    with pytest.raises(ConfigError, match="NaN"):
        fingerprint(float("nan"))


def test_ids_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = "from graph_toys import step_ids, toy_steps; import json;"
    code += "print(json.dumps(step_ids(toy_steps(), 7)))"
    env = {**os.environ, "PYTHONHASHSEED": "123"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, capture_output=True, check=True
    )
    assert json.loads(out.stdout) == step_ids(toy_steps(), 7)


def test_ids_know_what_a_step_is_and_not_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = step_ids(toy_steps(), 7)
    assert step_ids(toy_steps(gate="/elsewhere", fail=True), 7) == ids
    assert step_ids(list(reversed(toy_steps())), 7) == ids
    assert not set(ids.values()) & set(step_ids(toy_steps(), 8).values())
    assert ids["left"] != ids["right"]
    changed = [step_ids(toy_steps(config=PartsConfig(factor=1.25)), 7)]
    monkeypatch.setattr(left, "version", 2)
    for other in (*changed, step_ids(toy_steps(), 7)):
        assert {name for name in ids if other[name] != ids[name]} == {"left", "total"}


def test_graphs_that_are_none_are_refused() -> None:
    one, two, three = toy_steps()
    with pytest.raises(ConfigError, match="two steps are named 'left'"):
        describe([one, one], 7)
    with pytest.raises(ConfigError, match="step 'total': input 'left' names step 'left', which does not exist"):
        describe([two, three], 7)
    with pytest.raises(ConfigError, match="circle: left, total"):
        describe([replace(one, inputs={"x": "total"}), two, three], 7)


def test_plan_says_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = toy_steps()
    assert set(reasons(tmp_path, steps).values()) == {("run", "never ran")}
    run_all(tmp_path, steps)
    assert set(reasons(tmp_path, steps).values()) == {("done", "")}
    changed = reasons(tmp_path, toy_steps(config=PartsConfig(num_parts=6)))
    assert changed["left"] == ("run", "because left.num_parts changed from 5 to 6")
    assert changed["right"] == ("done", "")
    assert changed["total"] == ("run", "because input left changed")
    with monkeypatch.context() as patch:
        patch.setattr(left, "version", 2)
        assert reasons(tmp_path, toy_steps())["left"] == ("run", "because version changed from 1 to 2")
    assert reasons(tmp_path, steps, seed=8)["right"] == ("run", "because seed changed from 7 to 8")
    moved = [steps[0], steps[1], replace(steps[2], inputs={"left": "right", "both": "left"})]
    assert reasons(tmp_path, moved)["total"] == (
        "run",
        "because inputs.left changed from 'left' to 'right', inputs.both was added ('left'), inputs.right was removed",
    )


@dataclass(frozen=True)
class WiderConfig:
    num_parts: int = 5
    factor: float = 1.5
    start: int = 0


def test_plan_names_new_fields_and_unfinished_directories(tmp_path: Path) -> None:
    steps = toy_steps()
    run_all(tmp_path, steps)
    wider = [Step("left", left, WiderConfig(), PartsResources())]
    assert reasons(tmp_path, wider)["left"] == ("run", "because left.start was added (0)")
    os.makedirs(step_directory(str(tmp_path), "left", step_ids(wider, 7)["left"]))
    assert reasons(tmp_path, wider)["left"][0] == "resume"


def test_steps_that_another_root_has_finished_are_linked_and_not_run_again(tmp_path: Path) -> None:
    there, root, steps = tmp_path / "there", tmp_path / "root", toy_steps()
    run_all(there, steps)
    changed = toy_steps(config=PartsConfig(num_parts=6))
    planned = {step.name: step for step in plan(changed, str(root), 7, str(there))}
    assert {name: step.state for name, step in planned.items()} == {"left": "run", "right": "done", "total": "run"}
    assert planned["right"].reason == f"in {there}"
    assert planned["left"].reason == "because left.num_parts changed from 5 to 6"
    assert not root.exists()  # a plan changes nothing
    link_reused(list(planned.values()), str(root))
    assert reasons(root, changed)["right"] == ("done", "")
    assert [record.name for record in finished_records(str(root))] == ["right"]
    shutil.rmtree(planned["right"].directory)
    assert reasons(root, changed)["right"] == ("run", "never ran")
    link_reused(plan(changed, str(root), 7, str(there)), str(root))  # takes the dead link away
    run_all(root, changed)
    assert reasons(root, changed)["total"] == ("done", "")


def test_a_killed_step_finds_its_parts_and_a_finished_one_is_left_alone(tmp_path: Path) -> None:
    run_all(tmp_path / "whole", toy_steps())
    with pytest.raises(ValueError, match="part went wrong"):
        run_all(tmp_path / "run", toy_steps(fail=True))
    right = step_directory(str(tmp_path / "run"), "right", step_ids(toy_steps(), 7)["right"])
    assert read_record(right) is None
    Path(right, "part-0.json").write_text("14.0")
    run_all(tmp_path / "run", toy_steps())
    run_all(tmp_path / "run", toy_steps())
    record = read_record(right)
    assert record is not None
    assert record.metrics == {"num_parts": 5}
    calls = (tmp_path / "run" / "calls").read_text().splitlines()
    assert calls.count("left call") == 1
    assert calls.count("right call") == 2
    assert "right part 0" not in calls
    files = {path.relative_to(right).name for path in Path(right).iterdir()}
    assert files == {".lock", "record.json", *(f"part-{i}.json" for i in range(5))}
    log = (tmp_path / "run" / "logs" / "right.log").read_text()
    assert "ValueError: part went wrong" in log


def test_records_keep_numpy_metrics_and_refuse_to_be_tampered_with(tmp_path: Path) -> None:
    steps = toy_steps()
    record = describe(steps, 7)["total"]
    write_record(str(tmp_path), replace(record, metrics={"a": np.float32(0.5), "b": np.arange(2)}))
    assert read_record(str(tmp_path)) == replace(record, metrics={"a": 0.5, "b": [0, 1]})
    path = tmp_path / "record.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(StepError, match=rf"{path}: not a step's record .*Delete"):
        read_record(str(tmp_path))
    path.write_text('{"name": "left"}')
    with pytest.raises(StepError, match="Delete"):
        read_record(str(tmp_path))


def test_urls_are_refused_as_roots() -> None:
    with pytest.raises(ConfigError, match="Mount the bucket"):
        local_root("s3://bucket/run")


def test_lock_waits_names_its_holder_and_gives_up_after_its_limit(tmp_path: Path) -> None:
    path, said, order = str(tmp_path / "run" / ".lock"), list[str](), list[str]()

    def second() -> None:
        with hold(path, "second", said.append):
            order.append("second")

    thread = threading.Thread(target=second)
    with hold(path, "first", print):
        assert f"process {os.getpid()} on" in holder(path)
        assert {file.name for file in (tmp_path / "run").iterdir()} == {".lock", ".lock.holder"}
        thread.start()
        wait_until(lambda: said)
        with (
            pytest.raises(StepError, match=r"still held after 0 s by process .*first"),
            hold(path, "x", print, limit=0.1),
        ):
            pass
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert "(first, since" in said[0]
    assert holder(path) == ""
    assert {file.name for file in (tmp_path / "run").iterdir()} == {".lock"}
    assert holder(str(tmp_path / "none" / ".lock")) == ""
    assert not (tmp_path / "none").exists()


def test_a_process_that_dies_leaves_no_lock(tmp_path: Path) -> None:
    path = str(tmp_path / ".lock")
    code = f"import os; from spct_ray.graph.lock import hold\nwith hold({path!r}, 'dies', print): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert Path(f"{path}.holder").exists()  # what it left behind names nobody
    assert holder(path) == ""
    with hold(path, "next", lambda line: pytest.fail(line)):
        pass


def test_progress_prints_the_first_and_the_last_line_of_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    context = StepContext("rft", 0, "", {}, "")
    for phase in range(2):
        for done in range(0, 101, 10):
            context.progress(done, 100, "steps", f"phase {phase}")
    context.progress(100, 100, "steps")
    context.log("two\nlines")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "[rft] 0/100 steps; phase 0",
        "[rft] 100/100 steps; phase 0",
        "[rft] 0/100 steps; phase 1",
        "[rft] 100/100 steps; phase 1",
        "[rft] two",
        "[rft] lines",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"), [(42, "42 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_seconds_in_words(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words


def test_configs_must_be_plain() -> None:
    assert to_plain(PartsConfig()) == {"num_parts": 5, "factor": 1.5}
    with pytest.raises(ConfigError, match="set"):
        to_plain({"a": {1}})
