"""The check for a machine with a GPU, run without one: every phase, on no more than such a machine has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import gpu_check

ROOT = Path(__file__).parent.parent
# Python runs it in every process: packages of ours that such a machine lacks are not there.
STAND_IN = """
import importlib.machinery

ABSENT = ("ray", "vllm", "datasets", "fastapi", "gguf", "tensorboardX", "starlette")
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name in ABSENT else find(name, *rest)
"""


def run(tmp_path: Path, *arguments: str) -> tuple[list[dict[str, object]], str]:
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)
    out = tmp_path / "lines.jsonl"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(ROOT / "jobs/gpu_check.py"), "--device", "cpu", "--tiny", "--out", str(out)]
    # Deadlines are for a GPU; here other tests share the cores.
    done = subprocess.run([*command, "--patience", "20", *arguments], env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.stdout.splitlines() == out.read_text().splitlines()
    return lines, done.stderr


@pytest.mark.slow
def test_every_phase_holds_at_toy_size_and_fills_the_table(tmp_path: Path) -> None:
    lines, errors = run(tmp_path, "--traces", str(tmp_path))
    assert [line["phase"] for line in lines] == list(gpu_check.PHASES)
    assert all(line["ok"] for line in lines), (lines, errors[-3000:])
    assert (tmp_path / "trace.json.gz").stat().st_size > 0
    table = gpu_check.table([str(tmp_path / "lines.jsonl")])
    shown = list(zip(gpu_check.ROWS, table.splitlines()[4:], strict=False))
    assert len(shown) == len(gpu_check.ROWS)
    assert all(row.says in line for row, line in shown)
    keys = ("gemma_both_ratio", "mask_16384_ms", "peak_to_plan")  # with those of bf16 and GiB, of a GPU only
    gpu_only = [
        row
        for row in gpu_check.ROWS
        if row.key in keys or row.phase == "ipc" or row.phase.startswith("engine_") or "bfloat16" in row.key
        or "gib" in row.key
    ]  # fmt: skip
    assert [row for row, line in shown if "| open |" in line] == gpu_only


@pytest.mark.slow
def test_a_phase_that_hangs_or_dies_costs_only_itself(tmp_path: Path) -> None:
    """`kill` and `hang` are phases of the file below; the phases after them still run."""
    script = tmp_path / "check.py"
    script.write_text(
        "import os, sys, time\nfrom jobs import gpu_check\n\n"
        "@gpu_check.phase(1)\ndef hang(case, result):\n    time.sleep(3600)\n\n"
        "@gpu_check.phase(60)\ndef kill(case, result):\n    os._exit(3)\n\n"
        "@gpu_check.phase(60)\ndef wrong(case, result):\n    result['kept'] = 1\n    gpu_check.check(False, 'no')\n\n"
        "@gpu_check.phase(60)\ndef right(case, result):\n    result['figure'] = 2.0\n\n"
        "gpu_check.__file__ = __file__\ngpu_check.START_S = 60.0\ngpu_check.main()\n"
    )
    out = tmp_path / "lines.jsonl"
    command = [sys.executable, str(script), "--device", "cpu", "--tiny", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--only", "kill", "hang", "wrong", "right"], env=environment)
    killed, hung, wrong, right = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.returncode == 1
    assert killed == {"phase": "kill", "ok": False, "error": "its process ended with exit code 3"}
    assert not hung["ok"]
    assert "not done within" in hung["error"]
    assert (wrong["ok"], wrong["kept"], wrong["error"]) == (False, 1, "CheckError: no")
    assert (right["ok"], right["figure"]) == (True, 2.0)


def test_the_table_says_what_is_open_and_what_failed(tmp_path: Path) -> None:
    assert gpu_check.table([]).startswith("No card has been at hand yet.")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"phase": "zero", "ok": false, "error": "it broke", "resumed_zero3": 0.5}\n')
    told = gpu_check.table([str(lines)])
    assert "0.5 (the phase failed)" in told
    assert told.endswith("* `zero` failed: it broke")
