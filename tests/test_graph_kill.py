"""Real Ray, real kills: whatever dies in mid-step, the same command finishes and repeats no finished work."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from graph_toys import step_ids, toy_steps, wait_until
from test_graph import run_all

from spct_ray.graph.record import read_record, step_directory

pytestmark = pytest.mark.slow
StartDriver = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_driver() -> Iterator[StartDriver]:
    """Starts drivers; ends those that a failed test leaves behind (their Ray ends with them)."""
    drivers = []

    def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
        driver = subprocess.Popen(
            [sys.executable, "-m", "graph_toys", str(root), *arguments],
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        drivers.append(driver)
        return driver

    yield start
    for driver in drivers:
        driver.kill()
        driver.communicate()


def finish(driver: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = driver.communicate(timeout=240)
    return driver.returncode, out, err


def reached(root: Path, driver: subprocess.Popen[str]) -> dict[str, int]:
    """Wait until `left` stands at its gate; the ids of its worker and of the worker's raylet."""
    path = Path(f"{root}.gate.reached")
    wait_until(lambda: path.exists() or driver.poll() is not None)
    assert path.exists(), finish(driver)
    return json.loads(path.read_text())


def undisturbed(root: Path) -> float:
    """The result without Ray, without kills: the same functions, one after the other in this process."""
    run_all(root, toy_steps())
    return result(root)


def result(root: Path) -> float:
    record = read_record(step_directory(str(root), "total", step_ids(toy_steps(), 7)["total"]))
    assert record is not None
    return record.metrics["total"]


def calls(root: Path) -> Counter[str]:
    return Counter((root / "calls").read_text().splitlines())


@pytest.mark.parametrize(
    ("victim", "number"),
    [("worker", signal.SIGKILL), ("raylet", signal.SIGKILL), ("driver", signal.SIGKILL), ("driver", signal.SIGTERM)],
)
def test_killed_in_mid_step_the_same_command_goes_on(
    tmp_path: Path, start_driver: StartDriver, victim: str, number: signal.Signals
) -> None:
    root = tmp_path / "run"
    driver = start_driver(root)
    pids = {**reached(root, driver), "driver": driver.pid}
    right = step_directory(str(root), "right", step_ids(toy_steps(), 7)["right"])
    wait_until(lambda: os.path.exists(os.path.join(right, "record.json")))  # it ran beside `left`
    os.kill(pids[victim], number)
    if victim == "worker":  # Ray lives: the driver itself tries again
        wait_until(lambda: calls(root)["left call"] == 2)
        Path(f"{root}.gate").touch()
        code, out, err = finish(driver)
        assert "[left] the step's worker process died" in out
        assert "attempt 2 of 3" in out
    else:
        code, out, err = finish(driver)
        if victim == "raylet":
            assert code == 2
            assert re.search("step left failed: the Ray node .*died", err)
            assert "retry: spct run toy.yaml" in err
        else:
            assert code == (130 if number == signal.SIGTERM else -signal.SIGKILL), err
        wait_until(lambda: not Path(f"/proc/{pids['worker']}").exists())  # an orphan ends itself, gate or no gate
        Path(f"{root}.gate").touch()
        code, out, err = finish(start_driver(root))
        assert "resume  started but not finished" in out
    assert code == 0, err
    assert result(root) == undisturbed(tmp_path / "undisturbed")
    assert json.loads((root / "report" / "summary.json").read_text()) == {"total": result(root)}
    assert f"the total is {result(root)}" in out
    expected = {f"{name} part {i}": 1 for name in ("left", "right") for i in range(5)}
    assert calls(root) == {**expected, "left call": 2, "right call": 1, "total call": 1}
    assert finish(start_driver(root))[0] == 0  # all done: Ray is not even started
    assert calls(root)["total call"] == 1


def test_second_driver_on_one_root_waits_and_says_for_whom(tmp_path: Path, start_driver: StartDriver) -> None:
    root = tmp_path / "run"
    first = start_driver(root)
    reached(root, first)
    second = start_driver(root)
    assert second.stdout is not None
    line = second.stdout.readline()
    assert f"waiting for process {first.pid} on" in line
    assert "spct run toy.yaml" in line
    Path(f"{root}.gate").touch()
    assert finish(first)[0] == 0
    assert finish(second)[0] == 0
    assert max(calls(root).values()) == 1


def test_failing_step_lets_others_finish_and_its_error_says_what_to_do(
    tmp_path: Path, start_driver: StartDriver
) -> None:
    root = tmp_path / "run"
    driver = start_driver(root, "fail")
    reached(root, driver)
    Path(f"{root}.gate").touch()
    code, out, err = finish(driver)
    assert code == 2
    assert "step right failed: ValueError: part went wrong ... badly" in err
    assert f"log:   {root}/logs/right.log" in err
    assert "retry: spct run toy.yaml" in err
    assert "Traceback" not in err
    log = (root / "logs" / "right.log").read_text()
    assert "printed by the step" in log
    assert "Traceback" in log
    assert calls(root) == {"left call": 1, "right call": 1} | {f"left part {i}": 1 for i in range(5)}
    assert "[left] 5/5 parts" in out
    assert "printed by the step" not in out
