"""Memory and time on paper: shapes against real models, plans that fit and plans that are refused with what helps."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen3Config

from jobs.capacity import checkpoints, grpo_seconds, on_gpus, tables
from spct_ray.cli import main
from spct_ray.config import load
from spct_ray.errors import ConfigError
from spct_ray.learn.lora import add_adapters
from spct_ray.learn.train_config import LoraConfig, OptimConfig, TrainResources
from spct_ray.stages.plan_check import KNOWN, Training, check, engine_memory, shape_of, trainings
from spct_ray.stages.recipe import Recipe
from spct_ray.stages.student import StudentConfig

ROOT = Path(__file__).parent.parent
PAPER = str(ROOT / "conf" / "paper.yaml")
GEMMA = KNOWN["google/gemma-2-27b"]
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def test_settings_that_the_paper_recipe_shows_in_comments_exist(tmp_path: Path) -> None:
    text, num = re.subn(r"^( +)# ([a-z_]+: )", r"\1\2", Path(PAPER).read_text(), flags=re.MULTILINE)
    assert num == 2
    (tmp_path / "paper.yaml").write_text(text)
    assert load(Recipe, str(tmp_path / "paper.yaml")).rft.general_shares == (0.85,)


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES, tie_word_embeddings=False), Gemma2Config(**SIZES), Qwen3Config(**SIZES)],
    ids=lambda config: config.model_type,
)
def test_weights_and_adapters_are_those_of_the_model(config: PretrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    shape = shape_of(StudentConfig(model=str(tmp_path)))
    assert shape is not None
    model = AutoModelForCausalLM.from_config(config)
    assert shape.weights == sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
    for lora in (LoraConfig(rank=4), LoraConfig(rank=2, target_modules=("q_proj", "down_proj"))):
        model = AutoModelForCausalLM.from_config(config)
        add_adapters(model, lora)
        assert shape.adapters(lora) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_shapes_that_are_not_known_are_not_guessed(tmp_path: Path) -> None:
    assert shape_of(StudentConfig(model=str(tmp_path / "nothing"))) is None
    assert shape_of(StudentConfig("nano")) is None
    MixtralConfig().save_pretrained(tmp_path)
    assert shape_of(StudentConfig(model=str(tmp_path))) is None


def test_gemma_27b_has_27_b_weights_and_the_state_that_adamw_needs() -> None:
    assert pytest.approx(27.2e9, rel=0.01) == GEMMA.weights
    one = Training(TrainResources(gpus_per_worker=1), LoraConfig(), OptimConfig()).memory(GEMMA)
    state = (one["weights"] + one["gradients"] + one["optimizer"]) * 2**30
    assert state == pytest.approx(18 * GEMMA.weights)  # bf16 weights, fp32 gradients, masters and two moments
    assert one["reference"] == one["gathered"] == 0


def test_each_setting_changes_the_part_that_it_is_about() -> None:
    base = TrainResources(num_workers=16, gpus_per_worker=1, micro_tokens=8192)
    lora, optim = LoraConfig(), OptimConfig()

    def memory(**values: Any) -> dict[str, float]:
        return Training(replace(base, **values), lora, optim, has_reference=True).memory(GEMMA)

    plain, two, three = memory(), memory(zero_stage=2), memory(zero_stage=3)
    assert two["gradients"] == plain["gradients"] / 16
    assert two["weights"] == plain["weights"] == 16 * three["weights"]
    assert three["reference"] == plain["reference"] / 16
    assert memory(offload_optimizer=True)["optimizer"] == 0
    assert memory(micro_tokens=4096)["activations"] == plain["activations"] / 2
    assert memory(gradient_checkpointing=True)["activations"] < plain["activations"] / 10
    adapted = Training(base, LoraConfig(rank=32), optim, has_reference=True).memory(GEMMA)
    assert adapted["reference"] == 0
    assert adapted["optimizer"] < 0.02 * plain["optimizer"]


def test_more_gpus_are_faster_and_the_parts_of_a_step_are_there() -> None:
    recipe = load(Recipe, PAPER)
    steps = [grpo_seconds(on_gpus(recipe, num), GEMMA) for num in (16, 64)]
    assert steps[0].keys() == {"sync", "rollout", "reference", "train", "checkpoint", "step"}
    assert all(value > 0 for value in steps[0].values())
    for phase in ("rollout", "reference", "train", "checkpoint", "step"):
        assert steps[1][phase] < steps[0][phase]
    assert steps[0]["sync"] == steps[1]["sync"]  # one sender, all receive at once


def test_engines_that_sample_ahead_hide_the_shorter_side_and_other_ways_of_sync_take_longer() -> None:
    ahead = grpo_seconds(load(Recipe, PAPER), GEMMA)
    taking_turns = grpo_seconds(load(Recipe, PAPER, ["grpo.max_staleness=0"]), GEMMA)
    parts = ("sync", "rollout", "reference", "train", "checkpoint")
    assert taking_turns["step"] == pytest.approx(sum(taking_turns[part] for part in parts))
    hidden = min(ahead["rollout"], ahead["reference"] + ahead["train"])
    assert ahead["step"] == pytest.approx(taking_turns["step"] - hidden)
    by_file = grpo_seconds(load(Recipe, PAPER, ["resources.grpo.engine.transfer=directory"]), GEMMA)
    assert by_file["sync"] == pytest.approx(54.5, abs=0.1)  # 54.5 GB written at 2 GB/s, then read
    assert ahead["sync"] < 3


def test_checkpoints_hold_masters_and_moments_and_ranks_share_the_writing() -> None:
    found = checkpoints(load(Recipe, PAPER), GEMMA)
    assert found["grpo, GB"] == found["rft, GB"] == pytest.approx(12 * GEMMA.weights / 1e9)
    assert found["grpo, seconds"] == pytest.approx(found["rft, seconds"] * 24 / 16)
    assert found["grpo, every"] == 50
    adapted = checkpoints(load(Recipe, PAPER, ["grpo.lora.rank=32"]), GEMMA)
    assert adapted["grpo, GB"] < found["grpo, GB"] / 100


def test_an_embedding_larger_than_the_bucket_is_reduced_as_a_whole() -> None:
    where = TrainResources(num_workers=64, gpus_per_worker=1, zero_stage=3, gradient_checkpointing=True)
    embedding = GEMMA.embedding / 2**30
    long, short = (
        Training(replace(where, micro_tokens=tokens), LoraConfig(), OptimConfig()).memory(GEMMA)
        for tokens in (16384, 512)
    )
    assert long["embedding"] == pytest.approx(2 * embedding)  # the output layer's gradient
    assert short["embedding"] + short["activations"] == pytest.approx(8 * embedding)  # two, and a copy in fp32
    assert Training(where, LoraConfig(rank=8), OptimConfig()).memory(GEMMA)["embedding"] == 0


def test_an_engine_that_sleeps_takes_the_memory_in_turn_with_the_trainer() -> None:
    single = str(ROOT / "conf" / "single_gpu.yaml")
    recipe = load(Recipe, single)
    assert recipe.resources.grpo.engine.transfer == "ipc"
    assert trainings(recipe)["grpo.train"].beside_gib == 3.0
    half = ["resources.grpo.engine.transfer=directory", "resources.grpo.engine.gpu_memory_utilization=0.5"]
    awake = load(Recipe, single, half)
    assert trainings(awake)["grpo.train"].beside_gib == pytest.approx(0.5 * 79)
    with pytest.raises(ConfigError, match=r"resources\.grpo\.train: a GPU needs 79\.\d GiB \(engine beside it 40, "):
        check(awake)
    utilization = "resources.grpo.engine.gpu_memory_utilization"
    with pytest.raises(ConfigError, match=r"engine awake 71, the trainer's state 15\) and has 79\.0; .*=0\.8$"):
        check(load(Recipe, single, [f"{utilization}=0.9"]))
    check(load(Recipe, single, [f"{utilization}=0.8"]))


def test_gpus_are_shared_out_in_whole_engines() -> None:
    where = on_gpus(load(Recipe, PAPER), 8).resources
    assert (where.grpo.train.num_workers, where.grpo.rollout.num_replicas) == (6, 1)
    assert where.rft.num_workers == where.meta.num_workers == 8
    with pytest.raises(ConfigError, match="2 GPUs are too few for an engine on 2"):
        on_gpus(load(Recipe, PAPER), 2)


@pytest.mark.parametrize("name", ["paper.yaml", "single_gpu.yaml", "demo.yaml", "smollm2.yaml"])
def test_the_given_recipes_fit(name: str) -> None:
    check(load(Recipe, str(ROOT / "conf" / name)))


def test_offloading_is_offered_with_adamw_and_not_with_muon_which_refuses_it() -> None:
    for optim, offered in (([], True), (["grpo.optim.muon_lr=0.02", "grpo.optim.grad_clip=0"], False)):
        with pytest.raises(ConfigError, match=r"resources\.grpo\.train: a GPU needs") as refused:
            check(load(Recipe, PAPER, ["resources.grpo.train.num_workers=8", *optim]))
        assert ("offload_optimizer" in str(refused.value)) == offered


@pytest.mark.parametrize(
    "overrides",
    [
        ["resources.rft.zero_stage=1"],
        ["resources.grpo.train.num_workers=8"],
        ["resources.rft.gradient_checkpointing=false"],
        ["resources.meta.micro_tokens=200000"],
        ["resources.rft.num_workers=2"],
    ],
)
def test_a_plan_that_cannot_fit_is_refused_and_what_helps_does_help(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"resources\.[a-z.]+: a GPU needs [\d.]+ GiB .* what helps: ") as refused:
        check(load(Recipe, PAPER, overrides))
    for line in str(refused.value).splitlines()[1:]:
        name = line.split(":")[0].strip()
        offered = line.partition("what helps: ")[2]
        assert "=" in offered
        for choice in offered.split(" or "):
            settings = choice.split(" with ")
            recipe = load(Recipe, PAPER, [*overrides, *settings])
            training = trainings(recipe)[name.removeprefix("resources.")]
            assert sum(training.memory(GEMMA).values()) <= recipe.resources.cluster.gpu_gib


def test_an_engine_without_room_for_a_sequence_is_refused() -> None:
    engine = load(Recipe, PAPER).resources.grpo.engine
    assert sum(engine_memory(GEMMA, engine).values()) < 79 * engine.gpu_memory_utilization
    recipe = load(
        Recipe,
        PAPER,
        [
            "resources.evaluate.engine.tensor_parallel=1",
            "resources.evaluate.gpus_per_replica=1",
            "resources.evaluate.engine.gpu_memory_utilization=0.6",
        ],
    )
    with pytest.raises(
        ConfigError,
        match=r"resources.evaluate.engine: a GPU needs [\d.]+ GiB \(weights 51, .* and has 47\.4; .*tensor_parallel=2",
    ):
        check(recipe)


def test_the_command_plan_refuses_it_and_shows_what_would_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", PAPER, f"root={tmp_path}", "resources.rft.num_workers=2"]) == 2
    printed = capsys.readouterr()
    assert "grpo" in printed.out
    assert re.search(r"error: this plan cannot fit.*\n  resources.rft: a GPU needs", printed.err)


def test_the_tool_prints_the_tables() -> None:
    command = [sys.executable, "-m", "jobs.capacity", PAPER, "--gpus", "8", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| grpo.train, GiB | 8 GPUs: 6 ranks | 64 GPUs: 42 ranks |" in done.stdout
    assert "8 GPUs do not fit; what helps: resources.grpo.train." in done.stdout
    assert "| GRPO step, seconds | 8 GPUs | 64 GPUs |" in done.stdout


def test_the_tables_of_the_documentation_are_those_of_the_command() -> None:
    written = (ROOT / "docs" / "scaling.md").read_text()
    named = {block.split("|")[1].strip(): block.strip() for block in written.split("\n\n") if block.startswith("|")}
    computed = [block.strip() for block in tables(load(Recipe, PAPER), [8, 16, 24, 64]).split("\n\n")]
    computed = [block for block in computed if block.startswith("|") and not block.startswith("| meta,")]
    assert len(computed) == 5
    for block in computed:
        assert named[block.split("|")[1].strip()] == block
