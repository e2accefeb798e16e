"""Training without DeepSpeed: batches, log-probs and scores against plain transformers, schedules, files."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_model, make_tiny_tokenizer, same
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

from spct_ray.errors import ConfigError, DataError
from spct_ray.learn import attention, checkpoint
from spct_ray.learn import model as learn_model
from spct_ray.learn.batch import make_batch
from spct_ray.learn.checkpoint import Fragment
from spct_ray.learn.examples import Example, ExampleFiles, MixedOrder, make_example, write_examples
from spct_ray.learn.metrics_file import MetricsFile
from spct_ray.learn.model import TokenLogprobs, load_model
from spct_ray.learn.scorers import MetaScorer, encode_judgement
from spct_ray.learn.train_config import OptimConfig, lr_factor
from spct_ray.records import Message
from spct_ray.serve.backends import LocalMeta
from spct_ray.stages.supervised import one_ahead


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = str(tmp_path_factory.mktemp("tiny") / "model")
    make_tiny_model(directory, hidden=32, layers=1)
    return directory


SEQUENCES = [[5, 9, 11, 200, 3, 40], [7, 8, 9], [30, 31, 32, 33, 34, 35, 36, 37, 38]]
PROMPTS = [2, 1, 4]


def reference_logprobs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0].double()
    return torch.stack([logits[t].log_softmax(-1)[ids[t + 1]] for t in range(len(ids) - 1)])


@pytest.mark.parametrize("max_logits", [1 << 26, 384 * 2])  # one slice of the vocabulary, many
def test_logprobs_and_gradients_equal_plain_transformers(
    tiny: str, max_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learn_model, "_MAX_LOGITS", {"cpu": max_logits})
    policy = TokenLogprobs(load_model(tiny, "lm", torch.float32, on_gpu=False))
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    batch = make_batch(SEQUENCES, PROMPTS)
    logp_N = policy(batch)
    expected_N = torch.cat(
        [reference_logprobs(plain, ids)[prompt - 1 :] for ids, prompt in zip(SEQUENCES, PROMPTS, strict=True)]
    )
    torch.testing.assert_close(logp_N.double(), expected_N, atol=1e-5, rtol=0)
    logp_N.sum().backward()
    expected_N.sum().backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])  # as under LoRA: the hidden states' gradient alone is wanted
def test_output_layer_by_slices_equals_all_logits_at_once(
    dtype: torch.dtype, softcap: float | None, bias: bool, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(16, 101, bias=bias, dtype=dtype).requires_grad_(not frozen)
    hidden_NH = torch.randn(7, 16, dtype=dtype, requires_grad=True)
    targets_N, weights_N = torch.tensor([0, 100, 3, 3, 50, 99, 12]), torch.linspace(-1, 2, 7)
    inputs = [hidden_NH, *([] if frozen else lm_head.parameters())]

    def results(logp_N: torch.Tensor) -> list[torch.Tensor]:
        return [logp_N.detach(), *torch.autograd.grad((logp_N * weights_N).sum(), inputs)]

    logits_NV = lm_head(hidden_NH).float()
    logits_NV = softcap * torch.tanh(logits_NV / softcap) if softcap else logits_NV
    expected = results(logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0])
    for max_logits in (7 * 10, 7 * 101, 1):
        monkeypatch.setattr(learn_model, "_MAX_LOGITS", {"cpu": max_logits})
        found = results(
            learn_model.LogprobHead(lm_head, SimpleNamespace(final_logit_softcapping=softcap))(hidden_NH, targets_N)
        )
        for value, right in zip(found, expected, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(value, right, atol=tolerance * float(right.float().abs().max()), rtol=0)


def test_logprobs_of_nothing_still_reach_every_weight(tiny: str) -> None:
    policy = TokenLogprobs(load_model(tiny, "lm", torch.float32, on_gpu=False))
    policy(make_batch([[5, 6, 7]], [3])).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_models_that_scale_their_logits_are_refused(tmp_path: Path) -> None:
    GraniteForCausalLM(
        GraniteConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
                      num_key_value_heads=1, logits_scaling=8.0)
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ConfigError, match="logits_scaling"):
        load_model(str(tmp_path), "lm", torch.float32, on_gpu=False)


def test_meta_scores_do_not_depend_on_batching(tiny: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load_model(tiny, "scalar", torch.bfloat16, on_gpu=False)
    model.save_pretrained(tmp_path)
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    talks = [(Message("user", f"Score {i}"), Message("assistant", "Analysis: " + "good " * i)) for i in range(6)]
    together = MetaScorer(str(tmp_path)).score(talks)
    alone = MetaScorer(str(tmp_path), micro_tokens=1)
    assert together == pytest.approx([alone.score([talk])[0] for talk in talks], abs=0.02)
    ids, prompt_length = encode_judgement(tokenizer, talks[2])
    assert tokenizer.decode(ids[prompt_length:]) == "Analysis: good good <|im_end|>"


@pytest.mark.slow  # compiles
def test_a_meta_rm_is_warm_when_it_is_ready(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention through the function that CUDA compiles: no vote waits for it, whatever its rows hold."""
    load_model(tiny, "scalar", torch.bfloat16, on_gpu=False).save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    monkeypatch.setitem(attention.FLEX_BACKENDS, "cpu", "aot_eager")
    meta = LocalMeta(str(tmp_path))
    assert graphs["unique_graphs"] == 1
    for num_judgements, num_words in ((1, 1), (8, 60), (3, 300)):
        query, judgement = (Message(role, "good " * num_words) for role in ("user", "assistant"))
        assert len(asyncio.run(meta.score([(query, judgement)] * num_judgements))) == num_judgements
    assert graphs["unique_graphs"] == 1


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    cosine = OptimConfig(warmup_steps=4)
    assert [lr_factor(cosine, s, 12) for s in (0, 3, 4, 8, 12)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0])
    assert lr_factor(cosine, 6, 12) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    linear = OptimConfig(schedule="linear")
    assert [lr_factor(linear, s, 4) for s in range(6)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    assert lr_factor(OptimConfig(schedule="constant"), 99, 10) == 1.0


def test_learning_rate_stays_and_then_falls_over_the_last_share_of_the_steps() -> None:
    linear = OptimConfig(warmup_steps=2, schedule="linear", decay_share=0.5)
    assert [lr_factor(linear, s, 10) for s in range(11)] == pytest.approx(
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    )
    cosine = OptimConfig(schedule="cosine", decay_share=0.25)
    assert [lr_factor(cosine, s, 8) for s in (0, 6, 7, 8)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(("wrong", "message"), [
    ({"decay_share": 0.0}, "decay_share is 0.0"), ({"decay_share": 1.5}, "decay_share is 1.5"),
    ({"muon_lr": -0.1}, "muon_lr is -0.1"), ({"muon_lr": 0.02}, "muon_lr is 0.02 and grad_clip 1.0.*set grad_clip"),
])  # fmt: skip
def test_optimizer_settings_that_cannot_be_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**wrong)  # type: ignore[arg-type]


@given(st.integers(1, 30), st.integers(1, 90), st.integers(1, 12), st.integers(0, 3))
def test_every_epoch_draws_every_example_once(num: int, drawn: int, batch_size: int, seed: int) -> None:
    order = MixedOrder((num,), drawn, batch_size, seed)
    batches = [order.batch(step) for step in range(order.num_steps)]
    stream = list(itertools.chain.from_iterable(batches))
    assert len(stream) == drawn
    assert all(len(batch) == batch_size for batch in batches[:-1])
    for start in range(0, drawn - num + 1, num):
        assert sorted(stream[start : start + num]) == list(range(num))
    assert max(Counter(stream).values()) == -(-drawn // num)


def test_epochs_and_seeds_differ_in_order() -> None:
    orders = [MixedOrder((50,), 150, 50, seed) for seed in (0, 1)]
    assert len({tuple(order.batch(step)) for order in orders for step in range(3)}) == 6


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 90), st.integers(1, 12), st.integers(0, 3))
def test_a_second_kind_of_examples_has_its_share_of_each_part(
    first: int, second: int, drawn: int, batch_size: int, seed: int
) -> None:
    shares = (0.75, 0.3, 0.0)
    order = MixedOrder((first, second), drawn, batch_size, seed, shares)
    kinds: tuple[list[int], list[int]] = [], []
    for step in range(order.num_steps):
        batch = order.batch(step)
        assert sum(i >= first for i in batch) == round(shares[3 * step // order.num_steps] * len(batch))
        for i in batch:
            kinds[i >= first].append(i)
    assert sum(map(len, kinds)) == drawn
    for drawn_of_kind, size, start in zip(kinds, (first, second), (0, first), strict=True):
        for epoch in range(len(drawn_of_kind) // size):
            assert sorted(drawn_of_kind[epoch * size : (epoch + 1) * size]) == list(range(start, start + size))


def test_examples_come_back_from_disk_as_views_of_the_file(tmp_path: Path) -> None:
    examples = [Example(list(range(2 + n % 50)), n % 7, float(n % 2)) for n in range(9000)]  # three blocks of the file
    path = str(tmp_path / "examples.arrow")
    assert write_examples(path, iter(examples)) == len(examples)
    file = ExampleFiles(path)
    for example, found in zip(examples, map(file.__getitem__, range(len(file))), strict=True):
        assert isinstance(found.ids, np.ndarray)
        assert not found.ids.flags.owndata
        assert same(found, example)
    with pytest.raises(IndexError, match="example 9000 of 9000"):
        file[9000]
    write_examples(str(tmp_path / "more.arrow"), examples[:3])
    files = ExampleFiles(path, str(tmp_path / "more.arrow"))
    assert files.sizes == [9000, 3]
    assert all(same(files[i], example) for i, example in enumerate([*examples, *examples[:3]]))


def test_rows_are_made_one_step_ahead_and_in_order() -> None:
    made: list[int] = []
    begun = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 4:
            begun.set()
        return step * 10

    stream = one_ahead(make, range(3, 6))
    assert next(stream) == 30
    assert begun.wait(60)  # beside the caller's work on the first
    assert made == [3, 4]
    assert list(stream) == [40, 50]
    assert list(one_ahead(make, range(5, 5))) == []


def test_a_step_whose_rows_cannot_be_made_fails_when_its_turn_comes() -> None:
    stream = one_ahead(lambda step: 1 // (2 - step), range(4))
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_an_example_ends_with_the_assistant_s_turn() -> None:
    tokenizer = make_tiny_tokenizer()
    example = make_example(tokenizer, [Message("user", "Hi")], "word ", 1.0)
    assert tokenizer.decode(example.ids[example.prompt_length :]) == "word <|im_end|>"
    assert (example.ids.dtype, example.label) == (np.int32, 1.0)


def test_metrics_file_forgets_steps_that_are_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.5}\n{"step": 2, "lo')
    file = MetricsFile(tmp_path, 1)
    file.append({"step": 1, "loss": 1.4})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "loss": 2.0},
        {"step": 1, "loss": 1.4},
    ]
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.append({"step": 2, "loss": math.nan})


def split_fragments(values: dict[str, torch.Tensor], cuts: list[float], rank: int) -> list[Fragment]:
    """Each parameter cut at the same shares of its length; rank r owns the r-th piece."""
    found = []
    for name, flat in values.items():
        bounds = [0, *sorted(int(c * len(flat)) for c in cuts), len(flat)]
        low, high = bounds[rank], bounds[rank + 1]
        if low < high:
            found.append(Fragment(name, low, dict.fromkeys(("fp32", "exp_avg"), flat[low:high])))
    return found


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=4), st.lists(st.floats(0, 1), max_size=4))
def test_checkpoint_is_read_under_any_other_partitioning(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[float], other_cuts: list[float]
) -> None:
    directory = str(tmp_path_factory.mktemp("checkpoint"))
    values = {"a.weight": torch.randn(37), "b.weight": torch.randn(5)}
    path = checkpoint.checkpoint_dir(directory, 3)
    for rank in range(len(cuts) + 1):
        checkpoint.write_fragments(path, rank, iter(split_fragments(values, cuts, rank)))
    assert checkpoint.newest_step(directory) is None
    checkpoint.complete(directory, 3, {"state": {"x": 1}})
    content = checkpoint.read_content(path)
    restored = {name: torch.zeros_like(value) for name, value in values.items()}
    for rank in range(len(other_cuts) + 1):
        checkpoint.read_fragments(path, content["files"], iter(split_fragments(restored, other_cuts, rank)))
    assert content["state"] == {"x": 1}
    assert all(torch.equal(restored[name], value) for name, value in values.items())


def test_what_several_ranks_hold_is_read_as_a_whole_and_in_part(tmp_path: Path) -> None:
    """Muon's momentum: of whole matrices under ZeRO-1 and 2, of the rank's part under ZeRO-3."""
    whole = torch.randn(10)
    for rank, (low, high) in enumerate(((0, 6), (2, 4), (3, 10))):
        momentum = Fragment("a", low, {"momentum_buffer": whole[low:high]})
        checkpoint.write_fragments(tmp_path, rank, iter([momentum, Fragment("a", rank, {"fp32": torch.zeros(1)})]))
    files = sorted(f.name for f in tmp_path.iterdir())
    for low, high in ((0, 10), (1, 9), (4, 5)):
        view = torch.zeros(high - low)
        checkpoint.read_fragments(tmp_path, files, iter([Fragment("a", low, {"momentum_buffer": view})]))
        assert torch.equal(view, whole[low:high])
    with pytest.raises(DataError, match="exp_avg of parameter a has 0 of the 3"):
        checkpoint.read_fragments(tmp_path, files, iter([Fragment("a", 0, {"exp_avg": torch.zeros(3)})]))


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = checkpoint.checkpoint_dir(str(tmp_path), 1)
    checkpoint.write_fragments(path, 0, iter(split_fragments({"a": torch.randn(4)}, [], 0)))
    checkpoint.complete(str(tmp_path), 1, {})
    files = checkpoint.read_content(path)["files"]
    with pytest.raises(DataError, match="fp32 of parameter a has 4 of the 6 elements"):
        checkpoint.read_fragments(path, files, iter(split_fragments({"a": torch.zeros(6)}, [], 0)))


def test_newest_two_checkpoints_are_kept_and_half_written_ones_never_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = checkpoint.checkpoint_dir(str(tmp_path), step)
        checkpoint.write_fragments(path, 0, iter(split_fragments({"a": torch.randn(4)}, [], 0)))
        checkpoint.complete(str(tmp_path), step, {})
    checkpoint.write_fragments(
        checkpoint.checkpoint_dir(str(tmp_path), 4), 0, iter(split_fragments({"a": torch.randn(4)}, [], 0))
    )
    assert checkpoint.newest_step(str(tmp_path)) == 3
    checkpoint.remove_incomplete(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
