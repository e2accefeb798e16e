"""RFT on a real Ray Train with DeepSpeed: undisturbed, killed in the middle, failing; and what goes into training."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from tiny import make_tiny_model

from spct_ray.errors import ConfigError, DataError
from spct_ray.graph.step import StepContext
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.learn.examples import ExampleFiles
from spct_ray.learn.train_config import OptimConfig, TrainResources
from spct_ray.stages import rft
from spct_ray.stages.select import SFT_SCHEMA
from spct_ray.stages.supervised import SupervisedConfig, data_order

CONFIG = rft.RftConfig(OptimConfig(lr=3e-3), batch_size=8, max_steps=6, max_tokens=200, checkpoint_every=2)


def make_inputs(root: Path, num: int = 20) -> dict[str, str]:
    make_tiny_model(str(root / "student" / "model"), hidden=32, layers=1)
    rows = [
        {
            "item_id": f"item-{i}",
            "key": f"item-{i}/s0",
            "num_responses": 2,
            "prompt": [{"role": "user", "content": f"Name a prime number {i}"}],
            "completion": f"Analysis: Response 1 is right. Scores: \\boxed{{8, {i % 5 + 1}}}",
        }
        for i in range(num)
    ]
    (root / "select").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=SFT_SCHEMA), root / "select" / "sft.parquet")
    return {"student": str(root / "student"), "select": str(root / "select")}


def make_context(root: Path, name: str, inputs: dict[str, str]) -> StepContext:
    (root / name).mkdir()
    return StepContext(name, 7, str(root / name), inputs, "spct run x.yaml", str(root / f"{name}.log"))


class KilledOnce(StepContext):
    """Kills the rank that reports step 3, the first time it is reached (not a multiple of checkpoint_every)."""

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        marker = Path(self.out, "was_killed")
        if done == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Failing(StepContext):
    """Raises an error of ours inside a rank."""

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        raise DataError(f"{self.name}: step {done} met a row that it cannot use")


def test_only_short_examples_are_kept_and_general_ones_are_mixed_in(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    general = tmp_path / "general.jsonl"
    long = {"prompt": "Hi", "completion": "word " * 1500}
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    general.write_text("\n".join(json.dumps(row) for row in [talk, long] * 20))
    context = make_context(tmp_path, "rft", inputs)
    config = replace(CONFIG, general_paths=(str(general),), general_builtin=5, general_shares=(0.5, 0.0))
    config = replace(config, judge=JudgeConfig(template="compact"), max_tokens=900)
    counts = rft.write_training_file(context, config)
    assert counts == {"judgements": 20, "general": 25, "general_too_long": 20}
    files = [tmp_path / "rft" / name for name in ("examples.arrow", "general.arrow")]
    assert [len(ExampleFiles(str(file))) for file in files] == [20, 25]
    first = [file.read_bytes() for file in files]
    assert rft.write_training_file(context, config) == counts
    assert [file.read_bytes() for file in files] == first


@pytest.mark.parametrize(
    "changes", [{"general_paths": ("a.jsonl",)}, {"general_builtin": 5}, {"general_shares": (0.85,)}]
)
def test_general_instructions_without_a_share_or_a_share_of_none_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"rft\.general_shares is .*give files"):
        replace(CONFIG, **changes)


def test_unusable_training_data_is_refused_by_name(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    context = make_context(tmp_path, "rft", inputs)
    with pytest.raises(DataError, match="none of 20 judgements has at most 5 tokens"):
        rft.write_training_file(context, replace(CONFIG, max_tokens=5))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"question": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, row 2: needs messages.*question"):
        rft.write_training_file(context, replace(CONFIG, general_paths=(str(bad),), general_shares=(0.5,)))
    bad.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(DataError, match="end with an assistant"):
        rft.write_training_file(context, replace(CONFIG, general_paths=(str(bad),), general_shares=(0.5,)))


def test_number_of_steps_follows_epochs_or_max_steps() -> None:
    assert data_order([100], SupervisedConfig(batch_size=8, epochs=1.0, max_steps=0), 0).num_steps == 13
    assert data_order([100], SupervisedConfig(batch_size=8, epochs=0.5, max_steps=0), 0).num_steps == 7
    assert data_order([100], SupervisedConfig(batch_size=8, epochs=1.0, max_steps=3), 0).num_steps == 3
    mixed = data_order([100, 900], SupervisedConfig(batch_size=8, epochs=1.0, max_steps=0), 0, (0.75, 0.25))
    assert mixed.num_steps == 25  # half of the examples are judgements
    with pytest.raises(ConfigError, match="nothing to train on"):
        data_order([100], SupervisedConfig(batch_size=8, epochs=0.0, max_steps=0), 0)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=int(300e6),
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.path.dirname(__file__)}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("rft")
    context = make_context(root, "calm", make_inputs(root))
    return root, rft.run(context, CONFIG, RESOURCES)


RESOURCES = TrainResources(num_workers=2, zero_stage=2, micro_tokens=256, threads=1, max_failures=1)


def steps_and_losses(directory: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["lr"]) for line in lines]


@pytest.mark.slow
def test_rft_learns_and_writes_a_model(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    root, metrics = undisturbed
    losses = [loss for _, loss, _ in steps_and_losses(root / "calm")]
    assert len(losses) == metrics["steps"] == 6
    assert losses[-1] < losses[0] - 0.3
    assert metrics["judgements"] == 20
    assert (root / "calm" / "model" / "chat_template.jinja").exists()
    assert "6/6 steps" in (root / "calm.log").read_text()
    before, after = (load_file(root / d / "model" / "model.safetensors") for d in ("student", "calm"))
    assert before.keys() == after.keys()


@pytest.mark.slow
def test_run_with_a_killed_rank_equals_the_undisturbed_one(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    root, _ = undisturbed
    calm = StepContext(
        "calm", 7, str(root / "calm"), {"student": str(root / "student"), "select": str(root / "select")}, ""
    )
    (root / "killed").mkdir()
    rft.run(KilledOnce("killed", 7, str(root / "killed"), calm.inputs, ""), CONFIG, RESOURCES)
    assert (root / "killed" / "was_killed").exists()
    assert steps_and_losses(root / "killed") == steps_and_losses(root / "calm")
    weights, expected = (load_file(root / d / "model" / "model.safetensors") for d in ("killed", "calm"))
    assert all(weights[name].equal(value) for name, value in expected.items())


@pytest.mark.slow
def test_error_of_ours_in_a_rank_comes_out_as_it_was(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    root, _ = undisturbed
    inputs = {"student": str(root / "student"), "select": str(root / "select")}
    (root / "failing").mkdir()
    context = Failing("failing", 7, str(root / "failing"), inputs, "")
    with pytest.raises(DataError, match="failing: step 1 met a row that it cannot use"):
        rft.run(context, CONFIG, replace(RESOURCES, num_workers=1, max_failures=0))
