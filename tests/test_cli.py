"""The command `spct`, without Ray: what it loads, what it prints, how it fails."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from graph_toys import toy_steps
from test_graph import run_all

import spct_ray
from spct_ray.cli import guarded, main, run_graph
from spct_ray.cluster.session import ClusterResources, _start_local
from spct_ray.errors import SpctError
from spct_ray.graph.lock import hold

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed")


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh process has loaded after the code."""
    report = f"\nimport sys, json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_help_and_plan_load_nothing_heavy(tmp_path: Path) -> None:
    assert (
        loaded_by("import contextlib, spct_ray.cli as c\nwith contextlib.suppress(SystemExit): c.main(['--help'])")
        == set()
    )
    plan = f"import spct_ray.cli as c\nassert c.main(['plan', 'conf/demo.yaml', 'root={tmp_path}/run']) == 0"
    assert loaded_by(plan) == set()


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"spct-ray {spct_ray.__version__}\n"
    assert spct_ray.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_a_wrong_command_line_is_refused_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["rn"], "Did you mean 'run'?"), (["plan"], "Missing argument"), (["plan", "-x"], "-x")):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def test_a_recipe_goes_by_its_name_and_a_file_of_that_name_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "experiments/beta_0"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/runs/")
    (tmp_path / "demo").write_text("root: elsewhere")
    assert main(["plan", "demo"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/elsewhere\n")
    assert main(["plan", "dmo"]) == 2
    assert "Try `spct plan demo`; the recipes are demo, experiments/beta_0," in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_installed_wheel_plans_every_recipe_from_another_directory(tmp_path: Path) -> None:
    """Built from tracked files alone; the environment sees the packages of this one, but not its spct_ray."""
    source, environment, elsewhere = tmp_path / "source", tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "--python", str(environment / "bin/python"), "install", "--no-deps", str(wheel)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "those-of-the-tests.pth").write_text(sysconfig.get_path("purelib"))
    code = "import spct_ray, spct_ray.cli as c; print(spct_ray.__file__); names = c.recipe_names(); print(len(names))\n"
    code += "assert all(c.main(['plan', name]) == 0 for name in names)"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [environment / "bin/python", "-c", code], cwd=elsewhere, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    where, number, *_ = done.stdout.splitlines()
    assert where.startswith(str(environment))
    assert int(number) == len(list((ROOT / "conf").rglob("*.yaml"))) - 1  # all but that of `spct serve`


def test_plan_of_a_new_root_runs_everything_and_names_who_works_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    with hold(str(root / ".lock"), "spct run demo", print):
        assert main(["plan", str(ROOT / "conf" / "demo.yaml"), f"root={root}"]) == 0
    out = capsys.readouterr().out
    assert "grpo" in out
    assert "never ran" in out
    assert "now running: process" in out
    assert "(spct run demo, since" in out


def test_a_plan_until_a_step_has_what_that_step_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(ROOT / "conf" / "demo.yaml"), f"root={tmp_path}", "--until=evaluate_rft", "--until=select"]
    assert main(arguments) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "never ran" in line]
    assert listed == ["items", "student", "sample", "select", "rft", "evaluate_rft"]


def test_a_finished_graph_is_not_run_again_but_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_all(tmp_path, toy_steps())
    before = (tmp_path / "calls").read_text()
    run_graph(toy_steps(), str(tmp_path), 7, ClusterResources(), "spct run toy")
    out = capsys.readouterr().out
    assert out.count(" done") == 3
    assert out.count("the total is") == 1
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert f"the total is {summary['total']}" in out
    assert str(tmp_path / "report" / "summary.json") in out
    assert (tmp_path / "calls").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nowhere.yaml"], "error: nowhere.yaml: no such configuration file"),
        (["plan", str(ROOT / "conf/demo.yaml"), "grpo.betta=1"], "grpo.betta: unknown key; did you mean 'grpo.beta'?"),
        (["plan", str(ROOT / "conf/demo.yaml"), "--until=rtf"], "--until rtf: no such step; there are items, student,"),
        (["run", str(ROOT / "conf/demo.yaml"), "root=s3://bucket/x"], "root: 's3://bucket/x' is a URL"),
    ],
)
def test_errors_for_a_person_have_no_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_corrupt_record_stops_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_all(tmp_path, toy_steps())
    [record] = (tmp_path / "steps").glob("right-*/record.json")
    record.write_text("{")
    code = guarded(lambda: run_graph(toy_steps(), str(tmp_path), 7, ClusterResources(), "x"), "x")
    assert code == 2
    assert str(record) in capsys.readouterr().err


def test_interrupts_say_that_work_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert guarded(interrupted, "spct run x.yaml") == 130
    assert "the same command goes on: spct run x.yaml" in capsys.readouterr().err


def test_other_exceptions_are_bugs_and_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0, "x")


def test_a_ray_that_does_not_start_in_time_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    asked: list[str] = []

    def init(address: str, failures: int, message: str = "The current node timed out during startup.") -> None:
        asked.append(address)
        if len(asked) <= failures:
            raise Exception(message)

    monkeypatch.setattr(ray, "init", init)
    _start_local(failures=2)
    assert asked == ["local"] * 3
    asked.clear()
    with pytest.raises(SpctError, match="did not start on this machine within 30 s, three times"):
        _start_local(failures=3)
    asked.clear()
    with pytest.raises(Exception, match="no such directory"):
        _start_local(failures=1, message="no such directory")
    assert len(asked) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_warnings_that_nobody_can_act_on_do_not_show_and_errors_do(tmp_path: Path) -> None:
    from tests.tiny import make_tiny_model

    make_tiny_model(tmp_path)
    words = ["judge", str(tmp_path), "--query", "Name a prime.", "--response", "4", "--response", "7", "-k", "1"]
    small = ["judge.max_tokens=32", "resources.engine.kv_cache_gib=0.1"]
    code = (
        f"import sys, spct_ray.cli as c; c.main({words + small}); import logging; logging.getLogger('vllm').error('!')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "no verdict" in done.stdout or "winner" in done.stdout, done.stderr
    assert done.stderr.splitlines() == [f"loading judge {tmp_path}", "!"]


@pytest.mark.slow
def test_that_ray_counts_its_workers_does_not_show_and_other_messages_do() -> None:
    code = """
from spct_ray.cluster import session
with session.start(session.ClusterResources(num_cpus=1, object_store_gib=0.1)):
    import ray
    for line in ("WARNING: 8 PYTHON worker processes have been started on node: x", "A worker died"):
        ray._private.worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "A worker died" in done.stdout, done.stderr
    assert "worker processes" not in done.stdout + done.stderr
