"""Scalar baselines: a foreign reward model's scores against the model called by hand, and Bradley-Terry training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from test_rft import RESOURCES, ray_session  # noqa: F401
from tiny import make_tiny_model, make_tiny_tokenizer, same
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from spct_ray.data.store import write_items
from spct_ray.errors import ConfigError, DataError
from spct_ray.graph.step import StepContext
from spct_ray.learn.batch import BatchSize
from spct_ray.learn.examples import ExampleFiles, make_pair
from spct_ray.learn.losses import bradley_terry_loss, pair_rows
from spct_ray.learn.model import LastTokenScore, load_model
from spct_ray.learn.scorers import RewardModel
from spct_ray.learn.train_config import OptimConfig
from spct_ray.records import Item, Message
from spct_ray.stages import bradley_terry, scalar
from spct_ray.stages.meta_scores import MetaScoresResources
from spct_ray.stages.recipe import Recipe, build_steps

ASKED = (Message("user", "Name a prime number."),)
RESPONSES = ("8 is short", "Response 2 is right: 7", "9")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random sequence classifier with one output, as its authors would publish it."""
    directory = str(tmp_path_factory.mktemp("rm") / "model")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 384}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


def test_scores_are_the_model_s_own(model_dir: str) -> None:
    found = RewardModel(model_dir).score([(ASKED, response) for response in RESPONSES])
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(model_dir), make_tiny_tokenizer()
    for response, (score, num_tokens) in zip(RESPONSES, found, strict=True):
        talk = [{"role": "user", "content": ASKED[0].content}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(talk, tokenize=False).removesuffix("\n")
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        assert num_tokens == ids.shape[1]
        assert score == pytest.approx(model(input_ids=ids).logits.item(), abs=0.02)  # bf16 where there is some


def test_a_classifier_of_several_classes_is_refused(tmp_path: Path, model_dir: str) -> None:
    config = json.loads(Path(model_dir, "config.json").read_text())
    config.update(id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="3 outputs"):
        RewardModel(str(tmp_path))


class FakeTrainer:
    """The scores of a model without an optimizer."""

    def __init__(self, directory: str) -> None:
        self.module = LastTokenScore(load_model(directory, "scalar", torch.float32, on_gpu=False))

    def scores(self, batch: Any) -> Any:
        return self.module(batch)


@pytest.mark.parametrize("micro_tokens", [40, 4000])
def test_the_loss_is_bradley_terry_s_whatever_the_rows(model_dir: str, micro_tokens: int) -> None:
    """Against -log(1 / (1 + exp(b - a))) of scores computed one sequence at a time; two pairs share their query."""
    tokenizer = make_tiny_tokenizer()
    pairs = [(RESPONSES[1], RESPONSES[0]), (RESPONSES[1], RESPONSES[2]), (RESPONSES[2], RESPONSES[0])]
    examples = [make_pair(tokenizer, ASKED, *pair) for pair in pairs]
    rows = [row for rank in range(2) for row in pair_rows(examples, rank, 2, micro_tokens)]
    trainer: Any = FakeTrainer(model_dir)
    loss = sum(bradley_terry_loss(trainer, row, BatchSize(3, 0)).item() for row in rows)
    model, expected = RewardModel(model_dir), 0.0
    model._model.float()
    for pair in pairs:
        (a, _), (b, _) = model.score([(ASKED, response) for response in pair])
        expected += math.log1p(math.exp(b - a)) / 3
    assert loss == pytest.approx(expected, rel=0.02)


def test_pairs_are_the_best_with_each_other(tmp_path: Path) -> None:
    make_tiny_model(str(tmp_path / "student" / "model"), hidden=32, layers=1)
    (tmp_path / "items").mkdir()
    items = [
        Item("a", ASKED, RESPONSES, (0.0, 1.0, 0.5)),
        Item("b", ASKED, ("7",), (1.0,)),
        Item("c", ASKED, ("7" * 500, "9"), (0.0, 1.0)),
    ]
    write_items(str(tmp_path / "items" / "train.parquet"), items)
    inputs = {"items": str(tmp_path / "items"), "init": str(tmp_path / "student")}
    here = StepContext("bradley_terry", 1, str(tmp_path), inputs, "spct run x")
    counts = bradley_terry.write_training_file(here, bradley_terry.BradleyTerryConfig(max_tokens=300))
    assert counts == {"pairs": 2, "single_responses": 1, "too_long": 1}
    tokenizer, file = make_tiny_tokenizer(), ExampleFiles(str(tmp_path / "pairs.arrow"))
    for pair, other in zip([file[0], file[1]], (RESPONSES[0], RESPONSES[2]), strict=True):
        assert same(pair, make_pair(tokenizer, ASKED, RESPONSES[1], other))
    write_items(str(tmp_path / "items" / "train.parquet"), items[1:2])
    with pytest.raises(DataError, match="no pair of responses"):
        bradley_terry.write_training_file(here, bradley_terry.BradleyTerryConfig())


def test_one_line_of_a_recipe_adds_the_baseline() -> None:
    plain, more = (
        {step.name for step in build_steps(Recipe("x", bradley_terry=config))}
        for config in (None, bradley_terry.BradleyTerryConfig())
    )
    assert more - plain == {"bradley_terry"}


@pytest.mark.slow
def test_a_baseline_is_trained_on_ranks_and_scores_items(tmp_path: Path, ray_session: None) -> None:  # noqa: F811
    make_tiny_model(str(tmp_path / "student" / "model"), hidden=32, layers=1)
    words = ("short", "right")
    items = [
        Item(f"i{i}", ASKED, tuple(f"{i} {w}" for w in words[:: (-1) ** i]), (i % 2, 1 - i % 2)) for i in range(24)
    ]
    for name, part in (("train", items[:16]), ("heldout", items[16:])):
        (tmp_path / "items").mkdir(exist_ok=True)
        write_items(str(tmp_path / "items" / f"{name}.parquet"), part)
    inputs = {"items": str(tmp_path / "items"), "init": str(tmp_path / "student")}
    for name in ("bradley_terry", "scalar"):
        (tmp_path / name).mkdir()
    config = bradley_terry.BradleyTerryConfig(OptimConfig(lr=1e-2), batch_size=8, max_steps=12, max_tokens=200)
    here = StepContext("bradley_terry", 1, str(tmp_path / "bradley_terry"), inputs, "spct run x", str(tmp_path / "log"))
    assert bradley_terry.run(here, config, RESOURCES)["pairs"] == 16
    losses = [json.loads(line)["loss"] for line in (tmp_path / "bradley_terry/metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(2), abs=0.2)
    assert losses[-1] < 0.2
    inputs = {"items": str(tmp_path / "items"), "judge": str(tmp_path / "bradley_terry")}
    there = StepContext("scalar", 1, str(tmp_path / "scalar"), inputs, "spct evaluate x", str(tmp_path / "log"))
    assert scalar.run(there, {}, MetaScoresResources(num_replicas=2)) == {
        "items": 8,
        "responses": 16,
    }
    scores = {row["item_id"]: row["scores"] for row in pq.read_table(tmp_path / "scalar/scores.parquet").to_pylist()}
    assert all(scores[item.id][item.best] > min(scores[item.id]) for item in items[16:])
