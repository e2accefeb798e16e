"""Packed rows with shared prompts against one transformers pass a sequence: log-probs, scores, gradients, plans."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spct_ray.errors import ConfigError
from spct_ray.learn import attention
from spct_ray.learn.batch import Batch, Tokens, Tree, make_batch, plan_rows
from spct_ray.learn.model import LastTokenScore, TokenLogprobs, load_model

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(  # both soft-caps, and a window shorter than the sequences in every other layer
        Gemma2Config(**SMALL, sliding_window=5, attn_logit_softcapping=1.0, final_logit_softcapping=3.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=5, sliding_window_pattern=2)),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        found[name] = str(tmp_path_factory.mktemp(name))
        make().save_pretrained(found[name])
    return found


def make_sequences(groups: Sequence[tuple[int, Sequence[int]]], seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """For each group a prompt and completions of the given lengths, the groups' sequences dealt out in turn."""
    rng = torch.Generator().manual_seed(seed)

    def draw(num: int) -> list[int]:
        return torch.randint(3, 96, (num,), generator=rng).tolist()

    prompts = [draw(length) for length, _ in groups]
    dealt = itertools.zip_longest(
        *[[(p, draw(n)) for n in lengths] for p, (_, lengths) in zip(prompts, groups, strict=True)]
    )
    pairs = [pair for deal in dealt for pair in deal if pair]
    return [p + c for p, c in pairs], [len(p) for p, _ in pairs]


GROUPS = [(7, [4, 9, 1, 6]), (3, [5]), (1, [2, 8]), (6, [12, 12])]


def logprobs_one_by_one(model: PreTrainedModel, sequences: list[list[int]], prompts: list[int]) -> list[torch.Tensor]:
    found = []
    for ids, prompt in zip(sequences, prompts, strict=True):
        logp = model(torch.tensor([ids])).logits[0, prompt - 1 : -1].float().log_softmax(-1)
        found.append(logp.gather(1, torch.tensor(ids[prompt:])[:, None])[:, 0])
    return found


def packed_run(
    policy: TokenLogprobs, sequences: list[list[int]], prompts: list[int], micro_tokens: int, share: bool
) -> list[torch.Tensor]:
    """Log-probs by sequence from all rows of two ranks; leaves the gradient of their weighted sum in the policy."""
    found: dict[int, torch.Tensor] = {}
    for rows in plan_rows(sequences, prompts, micro_tokens=micro_tokens, num_ranks=2, share_prompts=share):
        for row in rows:
            batch = make_batch([sequences[i] for i in row], [prompts[i] for i in row], share)
            parts = batch.split(policy(batch))
            found.update(zip(row, parts, strict=True))
            torch.stack([weighted_sum([p], start=i) for i, p in zip(row, parts, strict=True)]).sum().backward()
    return [found[i] for i in range(len(sequences))]


def weighted_sum(logps: list[torch.Tensor], start: int = 0) -> torch.Tensor:
    """Every token counts differently, so that no two can be mistaken for each other."""
    return torch.stack(
        [(lp * torch.linspace(0.5 + i, 1.7 - i, len(lp))).sum() for i, lp in enumerate(logps, start)]
    ).sum()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("micro_tokens", "share"), [(10_000, True), (10_000, False), (20, True), (1, True)])
def test_packing_and_sharing_change_neither_logprobs_nor_gradients(
    directories: dict[str, str], name: str, micro_tokens: int, share: bool
) -> None:
    sequences, prompts = make_sequences(GROUPS)
    plain = AutoModelForCausalLM.from_pretrained(directories[name], dtype=torch.float32, attn_implementation="eager")
    expected = logprobs_one_by_one(plain, sequences, prompts)
    weighted_sum(expected).backward()
    policy = TokenLogprobs(load_model(directories[name], "lm", torch.float32, on_gpu=False))
    for logp, logp_expected in zip(packed_run(policy, sequences, prompts, micro_tokens, share), expected, strict=True):
        torch.testing.assert_close(logp, logp_expected, atol=2e-5, rtol=1e-5)
    got = gradients(policy.model)
    for parameter, gradient in gradients(plain).items():
        torch.testing.assert_close(got[parameter], gradient, atol=1e-3 * float(gradient.abs().max()), rtol=1e-3)


LLAMA_GROUPS = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=4
)


@pytest.fixture(scope="module")
def llama(directories: dict[str, str]) -> tuple[PreTrainedModel, TokenLogprobs]:
    plain = AutoModelForCausalLM.from_pretrained(directories["llama"], dtype=torch.float32)
    return plain, TokenLogprobs(load_model(directories["llama"], "lm", torch.float32, on_gpu=False))


@settings(max_examples=25)
@given(groups=LLAMA_GROUPS, micro_tokens=st.integers(1, 60), seed=st.integers(0, 99))
def test_any_shapes_in_rows_of_any_size_learn_the_same(
    llama: tuple[PreTrainedModel, TokenLogprobs], groups: list[tuple[int, list[int]]], micro_tokens: int, seed: int
) -> None:
    plain, policy = llama
    plain.zero_grad()
    policy.zero_grad()
    sequences, prompts = make_sequences(groups, seed)
    expected = logprobs_one_by_one(plain, sequences, prompts)
    weighted_sum(expected).backward()
    got = packed_run(policy, sequences, prompts, micro_tokens, True)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
    expected_gradients, got_gradients = gradients(plain), gradients(policy.model)
    whole = torch.stack([g.norm() for g in expected_gradients.values()]).norm()
    for name, gradient in expected_gradients.items():
        assert (got_gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5 * whole, name


def test_bf16_rows_agree_with_one_pass_a_sequence_up_to_rounding(directories: dict[str, str]) -> None:
    """No further from fp32 than transformers' own bf16 pass is, with room for chance."""
    sequences, prompts = make_sequences(GROUPS)

    def run(dtype: torch.dtype, packed: bool) -> dict[str, torch.Tensor]:
        if packed:
            policy = TokenLogprobs(load_model(directories["llama"], "lm", dtype, on_gpu=False))
            packed_run(policy, sequences, prompts, 10_000, True)
            return gradients(policy.model)
        plain = AutoModelForCausalLM.from_pretrained(directories["llama"], dtype=dtype)
        weighted_sum(logprobs_one_by_one(plain, sequences, prompts)).backward()
        return gradients(plain)

    exact, plain, packed = run(torch.float32, False), run(torch.bfloat16, False), run(torch.bfloat16, True)
    for name, gradient in exact.items():
        error_plain, error_packed = ((g[name].float() - gradient).norm() / gradient.norm() for g in (plain, packed))
        assert error_packed < 1.5 * error_plain + 0.01, name


@pytest.mark.parametrize("share", [True, False])
def test_scores_are_read_at_each_sequences_last_token(directories: dict[str, str], share: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = load_model(directories["llama"], "scalar", torch.float32, on_gpu=False)
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    sequences, prompts = make_sequences(GROUPS)
    sequences, prompts = [*sequences, sequences[0], sequences[0][: prompts[0]]], [*prompts, prompts[0], prompts[0]]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    expected = torch.stack([plain(torch.tensor([ids])).logits[0, 0] for ids in sequences])
    module = LastTokenScore(load_model(str(tmp_path), "scalar", torch.float32, on_gpu=False))
    torch.testing.assert_close(module(make_batch(sequences, prompts, share)), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [list, tuple, lambda ids: np.array(ids, np.int32)], ids=["list", "tuple", "array"])
def test_a_row_by_hand(kind: Callable[[list[int]], Tokens]) -> None:
    batch = make_batch([kind(ids) for ids in ([1, 2, 3, 4], [8, 9], [1, 2, 5], [1, 2])], [2, 1, 2, 2])
    tensors = (batch.input_ids, batch.position_ids, batch.source_N, batch.target_N, batch.sequence_N, batch.last_B)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert batch.trees == (Tree(2, (2, 1, 0)), Tree(2))
    assert batch.source_N.tolist() == [1, 2, 5, 1]
    assert batch.target_N.tolist() == [3, 4, 9, 5]
    assert batch.sequence_N.tolist() == [0, 0, 1, 2]
    assert batch.last_B.tolist() == [3, 6, 4, 1]
    assert (batch.num_trained, batch.num_tokens, batch.num_naive) == ((2, 1, 1, 0), 7, 11)


@given(groups=LLAMA_GROUPS, micro_tokens=st.integers(1, 60), num_ranks=st.integers(1, 4), share=st.booleans())
def test_rows_hold_every_sequence_once_within_the_budget_and_ranks_are_balanced(
    groups: list[tuple[int, list[int]]], micro_tokens: int, num_ranks: int, share: bool
) -> None:
    sequences, prompts = make_sequences(groups)
    plan = plan_rows(sequences, prompts, micro_tokens=micro_tokens, num_ranks=num_ranks, share_prompts=share)
    assert len(plan) == num_ranks
    rows = [row for rank in plan for row in rank]
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(sequences)))

    def batch_of(row: list[int]) -> Batch:
        return make_batch([sequences[i] for i in row], [prompts[i] for i in row], share)

    assert all(batch_of(row).num_tokens <= micro_tokens or len(row) == 1 for row in rows)
    lengths = [[batch_of(row).num_tokens for row in rank] for rank in plan]
    assert all(of_rank == sorted(of_rank, reverse=True) for of_rank in lengths)
    loads = list(map(sum, lengths))
    assert max(loads) - min(loads) <= max(p + sum(c) for p, c in groups)


def test_a_group_costs_its_prompt_once_and_is_split_only_where_it_does_not_fit() -> None:
    sequences, prompts = make_sequences([(100, [10, 10, 10, 10])])
    (rows,) = plan_rows(sequences, prompts, micro_tokens=140)
    assert rows == [[0, 1, 2, 3]]
    assert make_batch(sequences, prompts).num_tokens == 140
    (rows,) = plan_rows(sequences, prompts, micro_tokens=139)
    assert sorted(map(len, rows)) == [1, 3]
    (rows,) = plan_rows(sequences, prompts, micro_tokens=330, share_prompts=False)
    assert sorted(map(len, rows)) == [1, 3]


TREES = (Tree(5, (3, 4)), Tree(6), Tree(2, (1, 0, 7)), Tree(9, (2, 3, 4, 8, 1)), Tree(3, (0, 0)))


def dense_mask(trees: Sequence[Tree], window: int | None) -> torch.Tensor:
    """The mask by what it means: a token sees its own sequence's earlier tokens, at most `window` of them."""
    owners: list[set[tuple[int, int]]] = []  # the sequences (tree, branch) that each token of the row belongs to
    positions: list[int] = []
    for t, tree in enumerate(trees):
        owners += [{(t, b) for b in range(max(1, len(tree.branches)))}] * tree.trunk
        positions += range(tree.trunk)
        for b, length in enumerate(tree.branches):
            owners += [{(t, b)}] * length
            positions += range(tree.trunk, tree.trunk + length)
    num = len(owners)
    return torch.tensor([
        [bool(owners[q] & owners[k]) and k <= q and positions[q] - positions[k] < (window or num) for k in range(num)]
        for q in range(num)
    ])  # fmt: skip


@pytest.fixture
def compiled_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention through the function that CUDA compiles, traced and differentiated alike, its operators run eagerly."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setitem(attention.FLEX_BACKENDS, "cpu", "aot_eager")
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # refuses gradients on CPU


def num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.usefixtures("compiled_on_cpu")
def test_both_ways_of_attention_equal_a_dense_mask(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    trees = (*TREES, Tree(256 - sum(tree.trunk + sum(tree.branches) for tree in TREES)))
    inputs = [torch.randn(1, heads, 256, 16, requires_grad=True) for heads in (4, 2, 2)]
    query, key, value = inputs
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~dense_mask(trees, window), -torch.inf)
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    slope = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, slope)
    arguments = ((query, key, value), trees, 0.3, window, softcap)
    for output in (attention._attend_tree_by_tree(*arguments), attention._attend_flex(*arguments, "aot_eager")):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        for ours, dense in zip(torch.autograd.grad(output, inputs, slope), expected_grads, strict=True):
            torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)


@settings(max_examples=15)
@given(
    pieces=st.lists(st.tuples(st.integers(1, 150), st.lists(st.integers(0, 90), max_size=4)), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 200),
)
def test_intervals_and_blocks_follow_from_lengths_as_from_every_pair(
    pieces: list[tuple[int, list[int]]], window: int | None
) -> None:
    trees = tuple(Tree(trunk, tuple(branches)) for trunk, branches in pieces)
    padding = attention.num_padding(sum(trunk + sum(b) for trunk, b in pieces), torch.device("cuda"))
    trees = (*trees, Tree(padding)) if padding else trees
    own, start, stop = intervals = attention.intervals(trees, window)
    place = torch.arange(len(own))
    query, key = place[:, None], place[None]
    seen = ((key >= own[:, None]) & (key <= query)) | ((key >= start[:, None]) & (key < stop[:, None]))
    expected = dense_mask(trees, window)
    assert torch.equal(seen, expected)
    size = attention.BLOCK
    blocks = expected.view(len(own) // size, size, -1, size)
    partial, full = attention._seen_blocks(intervals)
    assert torch.equal(full, blocks.all(3).all(1))
    assert torch.equal(partial, blocks.any(3).any(1) & ~full)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("compiled_on_cpu")
def test_a_model_is_compiled_once_with_gradients_and_once_without(directories: dict[str, str], name: str) -> None:
    """Over rows of other lengths, trees and masks; windows and soft-caps included. And it computes the same."""
    plain = AutoModelForCausalLM.from_pretrained(directories[name], dtype=torch.float32, attn_implementation="eager")
    policy = TokenLogprobs(load_model(directories[name], "lm", torch.float32, on_gpu=False))
    for seed, groups in enumerate((GROUPS, [(40, [9, 30])], [(200, [90, 3, 41]), (7, [60])], [(2, [1])])):
        sequences, prompts = make_sequences(groups, seed)
        expected = logprobs_one_by_one(plain, sequences, prompts)
        plain.zero_grad()
        policy.zero_grad()
        weighted_sum(expected).backward()
        packed = packed_run(policy, sequences, prompts, 10_000, True)
        for logp, logp_expected in zip(packed, expected, strict=True):
            torch.testing.assert_close(logp, logp_expected, atol=2e-5, rtol=1e-5)
        got = gradients(policy.model)
        for parameter, gradient in gradients(plain).items():
            torch.testing.assert_close(got[parameter], gradient, atol=1e-3 * float(gradient.abs().max()), rtol=1e-3)
        with torch.no_grad():
            again = policy(make_batch(sequences, prompts))
        assert len(again) == sum(map(len, packed))
    assert num_graphs() == 2


@pytest.mark.usefixtures("compiled_on_cpu")
def test_more_graphs_than_expected_are_an_error_not_eager_attention() -> None:
    inputs = tuple(torch.randn(1, heads, 256, 16) for heads in (4, 2, 2))
    attention._attend_flex(inputs, (Tree(256),), 0.3, None, None, "aot_eager")
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit),
    ):
        attention._attend_flex(inputs, (Tree(256),), 0.3, None, 1.5, "aot_eager")


def test_models_that_packed_rows_would_falsify_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="layers of kind linear_attention"):
        attention.check_model("m", config)
    config = LlamaConfig(**SMALL, attention_dropout=0.1)
    with pytest.raises(ConfigError, match=r"attention_dropout is 0\.1; set it to 0"):
        attention.check_model("m", config)
    AutoModelForCausalLM.from_config(GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)).save_pretrained(
        tmp_path
    )
    policy = TokenLogprobs(load_model(str(tmp_path), "lm", torch.float32, on_gpu=False))
    with pytest.raises(ConfigError, match=r"unsupported options: .*s_aux"):
        policy(make_batch([[5, 6, 7]], [1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled attention and Liger's kernels need a GPU")
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_fused_layers_and_compiled_attention_compute_what_transformers_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    wide = type(model)(type(model.config)(**{**model.config.to_dict(), "hidden_size": 128, "head_dim": 32}))
    wide.save_pretrained(tmp_path)
    sequences, prompts = make_sequences([(200, [90, 3, 41]), (7, [60])])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    expected = logprobs_one_by_one(plain, sequences, prompts)
    weighted_sum(expected).backward()
    policy = TokenLogprobs(load_model(str(tmp_path), "lm", torch.float32, on_gpu=True)).to("cuda")
    batch = make_batch(sequences, prompts).to("cuda")
    parts = [part.cpu() for part in batch.split(policy(batch))]
    weighted_sum(parts).backward()
    for logp, logp_expected in zip(parts, expected, strict=True):
        torch.testing.assert_close(logp, logp_expected, atol=1e-4, rtol=1e-4)
    got = gradients(policy.model)
    for parameter, gradient in gradients(plain).items():
        torch.testing.assert_close(got[parameter].cpu(), gradient, atol=2e-3 * float(gradient.abs().max()), rtol=2e-3)
