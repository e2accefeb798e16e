"""The bench of training: both sides compute the same, and a comparison of unequal work is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench import compare
from spct_ray.benchmarks.training_speed import Repeat, Side, Sizes, head_naive, head_ours
from spct_ray.errors import SpctError
from spct_ray.learn import model

ROOT = Path(__file__).parent.parent


def slow_side() -> Side:
    return lambda: Repeat(2.0, 10)


def fast_side() -> Side:
    return lambda: Repeat(2.001, 5)


def other_side() -> Side:
    return lambda: Repeat(2.1, 5)


def broken_side() -> Side:
    raise RuntimeError("no such model")


def test_sides_of_equal_work_are_compared_and_others_refused() -> None:
    result = compare("toy", fast_side, slow_side, 3, 1)
    assert (result.tokens_ours, result.tokens_theirs, result.runs) == (5, 10, 2)
    assert result.ratio == result.theirs / result.ours
    with pytest.raises(SpctError, match=r"toy: the two sides find losses 2\.10000 and 2\.00000 for the same samples"):
        compare("toy", other_side, slow_side, 2, 1)
    with pytest.raises(SpctError, match="broken_side failed; its traceback is above"):
        compare("toy", fast_side, broken_side, 2, 1)


def test_chunked_and_naive_log_probs_are_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_MAX_LOGITS", 1000)  # 10 tokens a chunk
    sizes = Sizes(1, 2, 8, 4, 64, head_tokens=35, head_vocab=100, head_hidden=8)
    assert head_ours("", sizes)().loss == pytest.approx(head_naive("", sizes)().loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_bench_runs_and_both_sides_find_the_same_losses(tmp_path: Path) -> None:
    options = {
        "layers": 1,
        "repeats": 2,
        "prompts": 2,
        "group-size": 3,
        "prompt-tokens": 24,
        "completion-tokens": 12,
        "threads": 1,
    }
    words = [f"--{name}={value}" for name, value in {**options, "micro-tokens": 90, "head-tokens": 8}.items()]
    command = [sys.executable, "jobs/bench.py", "train", f"--json={tmp_path / 'bench.json'}", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "bench.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == content
    grpo, head, sft = content["results"]
    assert [grpo["name"], head["name"], sft["name"]] == ["grpo update", "log-probs 256k", "sft update"]
    assert grpo["tokens_ours"] < 0.75 * grpo["tokens_theirs"]
    assert sft["tokens_ours"] < sft["tokens_theirs"]
    assert all(result["peak_gib_ours"] > 0 and result["ratio"] > 0 for result in content["results"])
