"""The bench of training: both sides compute the same, and a comparison of unequal work is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.bench.compare import Repeat, Side, compare
from jobs.bench.train import Sizes, head_naive, head_ours
from jobs.bench.trl import Driven, require_trl
from spct_ray.errors import ConfigError, SpctError
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


@pytest.mark.parametrize("cuda", [None, pytest.param("13.0", marks=pytest.mark.slow)])  # forked, started anew
def test_sides_of_equal_work_are_compared_and_others_refused(cuda: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    result = compare("toy", fast_side, slow_side, 3, 1)
    assert (result.tokens_ours, result.tokens_theirs, result.runs) == (5, 10, 2)
    assert result.ratio == result.theirs / result.ours
    with pytest.raises(SpctError, match=r"toy: the two sides find losses 2\.10000 and 2\.00000 for the same samples"):
        compare("toy", other_side, slow_side, 2, 1)
    with pytest.raises(SpctError, match="broken_side failed; its traceback is above"):
        compare("toy", fast_side, broken_side, 2, 1)


def test_sliced_and_naive_log_probs_are_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_MAX_LOGITS", {"cpu": 1000})  # four slices of the vocabulary
    sizes = Sizes(1, 2, 8, 4, 64, head_tokens=35, head_vocab=100, head_hidden=8)
    ours, naive = head_ours("", sizes)(), head_naive("", sizes)()
    assert ours.loss == pytest.approx(naive.loss, rel=1e-5)
    assert ours.flops == 4 / 3 * naive.flops  # logits are computed twice, beside two gradients


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
    command = [sys.executable, "-m", "jobs.bench", "train", f"--json={tmp_path / 'bench.json'}", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "bench.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == content
    grpo, head, sft = content["results"]
    assert [grpo["name"], head["name"], sft["name"]] == ["grpo update", "log-probs 256k", "sft update"]
    assert grpo["tokens_ours"] < 0.75 * grpo["tokens_theirs"]
    assert sft["tokens_ours"] < sft["tokens_theirs"]
    assert 0 < grpo["flops_ours"] < grpo["flops_theirs"]
    assert all(result["peak_gib_ours"] > 0 and result["ratio"] > 0 for result in content["results"])


class LoopingTrainer:
    """Calls its callback as transformers' Trainer does."""

    def __init__(self, callback: Driven, losses: list[float]) -> None:
        self.callback, self.losses, self.updates = callback, losses, 0

    def train(self) -> None:
        for loss in self.losses:
            self.callback.on_step_begin(None, None, None)
            self.updates += 1
            self.callback.on_log(None, None, None, logs={"loss": loss})
        raise ValueError("out of data")


def test_a_peer_trainer_makes_one_update_a_call() -> None:
    driven = Driven()
    trainer = LoopingTrainer(driven, [3.0, 2.0])
    driven.attach(trainer)
    assert (driven.update(), trainer.updates) == (3.0, 1)
    assert (driven.update(), trainer.updates) == (2.0, 2)
    with pytest.raises(SpctError, match="TRL's trainer stopped: out of data"):
        driven.update()


def test_a_bench_without_trl_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ConfigError, match=r"needs TRL, .* pip install 'spct-ray\[bench\]'"):
        require_trl()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_bench_against_trl_runs_and_both_sides_do_the_same_work(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    options = {"layers": 1, "repeats": 2, "prompts": 2, "group-size": 2, "prompt-tokens": 48, "completion-tokens": 12}
    options |= {"examples": 4, "threads": 1, "micro-tokens": 2048}
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "jobs.bench", "trl", *words, "--only", "grpo-kl", "sft"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    grpo, sft = json.loads(done.stdout.splitlines()[-1])["results"]
    assert grpo["tokens_ours"] == pytest.approx(2 * 2 * 12, abs=12)  # a random model seldom ends of itself
    assert sft["tokens_ours"] == sft["tokens_theirs"]
    for result in (grpo, sft):
        ours, theirs = result["tokens_per_second"]
        assert result["ratio"] == pytest.approx(ours / theirs)
        assert min(result["peak_gib_ours"], result["peak_gib_theirs"]) > 0
