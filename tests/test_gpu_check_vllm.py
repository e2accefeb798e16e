"""The engine's check for a GPU machine, on a tiny model and CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_phase_passes_on_cpu(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    command = [sys.executable, ROOT / "jobs" / "gpu_check_vllm.py", "--tiny", "--device", "cpu", "--dtype", "float32"]
    done = subprocess.run([*command, "--out", out], cwd=ROOT, check=False)
    lines = {line["phase"].removeprefix("engine_"): line for line in map(json.loads, out.read_text().splitlines())}
    assert {name: line.get("error") for name, line in lines.items()} == dict.fromkeys(lines)
    assert done.returncode == 0
    assert set(lines) >= {"start", "generate", "logprobs", "reload", "speed", "limits", "trainer", "peer"}
    assert lines["generate"]["greedy_equal"]
    for gaps in (
        lines["logprobs"]["engine_to_float32"],
        lines["reload"]["parity"]["engine_to_float32"],
        lines["trainer"],
    ):
        assert gaps["max"] < 1e-3
        assert gaps["tokens"] == 198
