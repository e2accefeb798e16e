"""Weight sync and its parity gate: on a real vLLM with a tied output layer, against a transformers forward pass."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from spct_ray.cluster.sync import Parity, SentWeights, check_parity, push_weights
from spct_ray.engines.base import LORA_RANKS, EngineConfig, Request, SamplingParams
from spct_ray.engines.checksums import HeldTensor, checksum, compare
from spct_ray.errors import ParityError
from spct_ray.learn.batch import make_batch
from spct_ray.learn.lora import add_adapters, whole_weights
from spct_ray.learn.model import TokenLogprobs, load_model
from spct_ray.learn.train_config import LoraConfig
from spct_ray.records import Message
from spct_ray.stages.rollouts import adapter_rank
from tests.scripted_engine import ScriptedEngine
from tests.tiny import make_tiny_model, make_tiny_tokenizer

SEQUENCES = [[5, 60, 99, 7, 200, 3, 42, 17], [1, 87, 85, 259, 201, 42]]
TOLERANCE = Parity(0.02, 0.12)  # bf16 arithmetic in another order


class Source:
    """A trainer's rank that only has weights."""

    def __init__(self, model, rank=0):
        self.model, self.rank, self.num_given, self.dtype = model, rank, 0, torch.bfloat16

    def named_weights(self):
        for name, weight in self.model.named_parameters():
            self.num_given += 1
            yield name, weight.detach()

    def weight_shapes(self):
        return [(name, tuple(weight.shape)) for name, weight in self.model.named_parameters()]


def logprobs(model, sequences):
    """Log-probabilities of each token after the first, by transformers."""
    found = []
    for ids in sequences:
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found.append([logps[i, token].item() for i, token in enumerate(ids[1:])])
    return found


def checksums_of(model, dtype):
    return {name: (int(checksum(p, dtype)), p.numel()) for name, p in model.named_parameters()}


class RecordingPool(ScriptedEngine):
    """Takes reloads, and notes what the directory held at that moment."""

    def __init__(self):
        super().__init__(lambda request: [])
        self.seen = []

    def reload(self, weights_dir, weight_version):
        files = Path(weights_dir).glob("*.safetensors")
        self.seen.append((weight_version, {name: t for file in files for name, t in load_file(file).items()}))
        super().reload(weights_dir, weight_version)


def test_push_weights_writes_all_tensors_keeps_the_newest_and_times_phases(tmp_path, monkeypatch):
    monkeypatch.setattr("spct_ray.cluster.sync._SHARD_BYTES", 150)  # several shards
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)).to(torch.bfloat16)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])  # one buffer for all, as DeepSpeed has it
    for param, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        param.data = part.view_as(param)
    pool = RecordingPool()
    for version in (1, 2, 2):  # a resumed run pushes a version twice
        with torch.no_grad():
            model[0].bias += 1
        seconds = push_weights(Source(model), pool, str(tmp_path / "weights"), version)
        assert set(seconds) == {"gather_s", "write_s", "reload_s"}
        assert min(seconds.values()) > 0
        seen_version, weights = pool.seen[-1]
        assert seen_version == version == pool.weight_version
        expected = dict(model.named_parameters())
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert [p.name for p in (tmp_path / "weights").iterdir()] == [f"v{version}"]
    assert len(list((tmp_path / "weights" / "v2").iterdir())) > 1


def test_other_ranks_only_iterate(tmp_path):
    source = Source(torch.nn.Linear(4, 4), rank=1)
    seconds = push_weights(source, None, str(tmp_path / "weights"), 1)
    assert source.num_given == 2
    assert seconds["write_s"] == seconds["reload_s"] == 0.0
    assert not (tmp_path / "weights").exists()


@given(st.lists(st.lists(st.floats(-20, 0), max_size=60), min_size=1, max_size=5), st.floats(0.01, 3), st.data())
def test_parity_finds_the_tokens_that_differ(trainer, shift, data):
    places = [(s, t) for s, row in enumerate(trainer) for t in range(len(row))]
    if not places:
        with pytest.raises(ParityError, match="different tokens"):
            check_parity(trainer, trainer, TOLERANCE)
        return
    num_moved = data.draw(st.integers(1, len(places)))
    moved = set(data.draw(st.permutations(places))[:num_moved])
    engine = [[v - shift * ((s, t) in moved) for t, v in enumerate(row)] for s, row in enumerate(trainer)]
    mean, above = shift * num_moved / len(places), num_moved > len(places) // 100
    found = check_parity(trainer, engine, Parity(mean * 1.01, shift * 1.01))
    assert found.mean == pytest.approx(mean)
    assert found.p99 == pytest.approx(shift if above else 0.0, abs=1e-6)
    with pytest.raises(ParityError, match=r"mean .* at token \d+ of sequence \d+: "):
        check_parity(trainer, engine, Parity(mean * 0.99, math.inf))
    if above:
        with pytest.raises(ParityError, match="99th percentile"):
            check_parity(trainer, engine, Parity(math.inf, shift * 0.99))


@pytest.mark.parametrize("engine", [[[-1.0, math.nan]], [[-1.0, -math.inf]], [[-1.0]], [[-1.0, -2.0], [-1.0]]])
def test_parity_never_passes_what_it_cannot_compare(engine):
    with pytest.raises(ParityError):
        check_parity([[-1.0, -2.0]], engine, Parity(10.0, 10.0))


DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@given(DTYPES, st.integers(1, 5), st.integers(1, 6).map(lambda n: 4 * n), st.integers(0, 99), st.data())
def test_a_checksum_adds_up_over_shards_and_notices_any_one_bit(dtype, rows, columns, seed, data):
    tensor = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    whole = checksum(tensor, dtype)
    cut, across = data.draw(st.integers(0, rows)), 4 * data.draw(st.integers(0, columns // 4))
    assert checksum(tensor[:cut], dtype) + checksum(tensor[cut:], dtype) == whole
    assert checksum(tensor[:, :across], dtype) + checksum(tensor[:, across:], dtype) == whole
    assert checksum(torch.cat([tensor, torch.zeros(3, columns, dtype=dtype)]), dtype) == whole  # padding
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bit = data.draw(st.integers(0, bits.itemsize * 8 - 2))
    changed = tensor.clone()
    changed.view(bits)[row, column] ^= 1 << bit
    assert checksum(changed, dtype) != whole
    assert checksum(tensor.float(), dtype) == whole  # in the engine's dtype


def test_changes_in_opposite_directions_do_not_cancel_out():
    tensor = torch.randn(256, 256).to(torch.bfloat16)
    found = set()
    for seed in range(100):
        places = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(seed))[:20]
        changed = tensor.clone()
        changed.view(-1).view(torch.int16)[places[:10]] += 1
        changed.view(-1).view(torch.int16)[places[10:]] -= 1
        found.add(int(checksum(changed, torch.bfloat16)))
    assert len(found | {int(checksum(tensor, torch.bfloat16))}) == 101


def test_tensors_are_compared_over_workers_whole_cut_and_with_copied_key_heads():
    model = {name: torch.randn(*shape) for name, shape in {"q": (8, 8), "k": (4, 8), "v": (4, 8), "n": (8,)}.items()}
    model["head"] = torch.randn(6, 8)
    sent = {name: (int(checksum(t, torch.float32)), t.numel()) for name, t in model.items()}
    padded_head = torch.cat([model["head"], torch.zeros(2, 8)])

    def worker(half, copies):
        part = [slice(None)] if half is None else [slice(None, 4), slice(4, None)][half : half + 1]
        keys = slice(None) if half is None or copies else slice(2 * half, 2 * half + 2)
        qkv = torch.cat([model["q"][part[0]], model["k"][keys], model["v"][keys]])
        tensors = {"qkv": (("q", "k", "v"), qkv), "n": (("n",), model["n"]), "head": (("head",), padded_head[part[0]])}
        return [
            HeldTensor(place, parts, int(checksum(t, torch.float32)), t.numel())
            for place, (parts, t) in tensors.items()
        ]

    engines = [[worker(None, False)], [worker(0, False), worker(1, False)], [worker(0, True), worker(1, True)]]
    assert compare(sent, engines) == []
    for engine, name in [(e, n) for e in range(3) for n in model]:
        right = model[name]
        model[name] = right + 1e-6
        stale = {**sent, name: (int(checksum(model[name], torch.float32)), right.numel())}
        model[name] = right
        with pytest.raises(ParityError, match=rf"engine 0 .* 1 of 3 tensors differ in their bits \(.*{name}"):
            compare(stale, [engines[engine]])
    unmatched = HeldTensor("scale", (), 5, 1)
    assert compare({**sent, "new": (1, 1)}, [[[*worker(None, False), unmatched]]]) == ["new", "scale"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    from spct_ray.engines.vllm import VllmEngine

    directory = tmp_path_factory.mktemp("old")
    make_tiny_model(directory, tied=True, seed=1)
    engine = VllmEngine(str(directory), EngineConfig(max_model_len=256, kv_cache_gib=0.1, max_num_seqs=8))
    yield engine
    engine.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_engine_holds_the_pushed_weights_and_a_stale_head_is_caught(engine, tmp_path, monkeypatch):
    old = AutoModelForCausalLM.from_pretrained(engine._model_dir, dtype=torch.bfloat16)
    assert check_parity(logprobs(old, SEQUENCES), engine.prompt_logprobs(SEQUENCES), TOLERANCE).mean > 0
    make_tiny_model(tmp_path / "new", tied=True, seed=2)
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    with pytest.raises(ParityError):
        check_parity(logprobs(new, SEQUENCES), engine.prompt_logprobs(SEQUENCES), TOLERANCE)

    request = Request((Message("user", "Name a prime"),), SamplingParams(max_tokens=8, temperature=0.0, logprobs=True))
    engine.generate([request])  # its prefix is cached now, with the old weights
    monkeypatch.setattr("spct_ray.cluster.sync._SHARD_BYTES", 60_000)  # several shards
    sent = SentWeights(Source(new), torch.bfloat16)
    push_weights(sent, engine, str(tmp_path / "weights"), 1)
    assert compare(sent.checksums(), [engine.held_tensors(list(sent.checksums()))]) == []
    check_parity(logprobs(new, SEQUENCES), engine.prompt_logprobs(SEQUENCES), TOLERANCE)
    ((completion,),) = engine.generate([request])
    assert completion.weight_version == 1
    ids = [*completion.prompt_token_ids, *completion.token_ids]
    sampled = logprobs(new, [ids])[0][-len(completion.token_ids) :]
    check_parity([sampled], [completion.logprobs], TOLERANCE)

    # vLLM's own CPU reload, without our repair of the tied head: the body is new, the head stale
    monkeypatch.setattr("spct_ray.engines.vllm._repack_kept_weights", lambda worker: None)
    engine.reload(engine._model_dir, 2)
    with pytest.raises(ParityError, match=r".dlogp. between trainer and engine"):
        check_parity(logprobs(old, SEQUENCES), engine.prompt_logprobs(SEQUENCES), TOLERANCE)
    given = checksums_of(old, torch.bfloat16)
    with pytest.raises(ParityError, match=r"1 of \d+ tensors differ in their bits \(lm_head.weight \(packed\)\)"):
        compare(given, [engine.held_tensors(list(given))])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_engine_holds_adapters_after_an_update(engine, tmp_path):
    """LoRA: the policy computes with base and adapters apart, the engine with their sum."""
    policy = TokenLogprobs(load_model(engine._model_dir, "lm", torch.bfloat16, on_gpu=False))
    add_adapters(policy.model, LoraConfig(rank=4))
    batch = make_batch(SEQUENCES, [1] * len(SEQUENCES))

    class Adapted(Source):
        def named_weights(self):
            return [(whole.name, whole.value()) for whole in whole_weights(self.model)]

    def parity():
        with torch.no_grad():
            logps = [values.tolist() for values in batch.split(policy(batch))]
        return check_parity(logps, engine.prompt_logprobs(SEQUENCES), TOLERANCE)

    push_weights(Adapted(policy.model), engine, str(tmp_path / "weights"), 3)
    parity()
    optimiser = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-2)
    (-policy(batch).mean()).backward()
    optimiser.step()
    with pytest.raises(ParityError):
        parity()
    push_weights(Adapted(policy.model), engine, str(tmp_path / "weights"), 4)
    parity()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "lora", [LoraConfig(rank=3, alpha=6.0), LoraConfig(rank=8, target_modules=("q_proj", "down_proj"))]
)
def test_an_engine_takes_adapters_beside_its_weights(lora, tmp_path):
    from spct_ray.engines.vllm import VllmEngine

    make_tiny_model(tmp_path / "model", seed=3)
    policy = TokenLogprobs(load_model(str(tmp_path / "model"), "lm", torch.bfloat16, on_gpu=False))
    add_adapters(policy.model, lora)
    optimiser = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=5e-2)
    config = EngineConfig(256, 8, kv_cache_gib=0.1, dtype="bfloat16")
    rank = adapter_rank(lora, policy.model, config, on_gpu=True)
    assert rank == 8

    class Adapted(Source):
        def named_weights(self, with_adapters=True):
            return [(whole.name, whole.value(with_adapters)) for whole in whole_weights(self.model)]

        def named_adapters(self):
            return [named for whole in whole_weights(self.model) for named in whole.adapter().items()]

    engine = VllmEngine(str(tmp_path / "model"), replace(config, lora_rank=rank))
    sent = SentWeights(Adapted(policy.model), torch.bfloat16, rank)

    def push(version):
        push_weights(sent, engine, str(tmp_path / "weights"), version, rank)

    def unlike():
        return compare(sent.checksums(), [engine.held_tensors(list(sent.checksums()))])

    def parity(sequences=SEQUENCES):
        batch = make_batch(sequences, [1] * len(sequences))
        with torch.no_grad():
            logps = [values.tolist() for values in batch.split(policy(batch))]
        return check_parity(logps, engine.prompt_logprobs(sequences), TOLERANCE)

    def update():
        (-policy(make_batch(SEQUENCES, [1, 1])).mean()).backward()
        optimiser.step()

    request = Request((Message("user", "Name a prime"),), SamplingParams(max_tokens=8, temperature=0.0, logprobs=True))
    try:
        for version in (1, 2, 2):  # a resumed run pushes a version twice
            update()
            push(version)
            written = load_file(tmp_path / "weights" / f"v{version}" / "adapter_model.safetensors")
            assert all(".lora_" in name for name in written)
            assert unlike() == []
            parity()
            ((completion,),) = engine.generate([request])  # its prefix was cached with the adapter before
            assert completion.weight_version == version
            whole = make_batch(
                [[*completion.prompt_token_ids, *completion.token_ids]], [len(completion.prompt_token_ids)]
            )
            with torch.no_grad():
                check_parity([policy(whole).tolist()], [completion.logprobs], TOLERANCE)
        for half in ("lora_A", "lora_B"):
            _, parameter = next((n, p) for n, p in policy.named_parameters() if half in n)
            with torch.no_grad():
                parameter[0, 0] += 1.0
            for _ in sent.named_weights():
                pass
            with pytest.raises(ParityError, match=rf" 1 of \d+ tensors differ in their bits \(model\..*{half}\)"):
                unlike()
            push(3)
            assert unlike() == []
    finally:
        engine.close()


def test_adapters_go_out_alone_where_vllm_takes_them(tmp_path):
    make_tiny_model(tmp_path)

    def rank(lora, on_gpu=True, **engine):
        model = load_model(str(tmp_path), "lm", torch.bfloat16, on_gpu=False)
        if lora.rank:
            add_adapters(model, lora)
        return adapter_rank(lora, model, EngineConfig(**engine), on_gpu)

    assert rank(LoraConfig()) == 0
    assert [rank(LoraConfig(rank=r)) for r in (1, 8, 9, 200, 513)] == [8, 8, 16, 256, 0]
    assert rank(LoraConfig(rank=4), on_gpu=False) == 0
    assert rank(LoraConfig(rank=4), on_gpu=False, lora_rank=16) == 16
    assert rank(LoraConfig(rank=4), transfer="nccl") == 0


@pytest.mark.slow
def test_the_ranks_of_adapters_are_vllms():
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert set(LORA_RANKS) == set(get_args(MaxLoRARanks)) - {1}


FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
}


def make_family(directory, family, dtype):
    """A tiny model of a family with its own kinds of tensors, norms and biases away from 1 and 0."""
    tokenizer = make_tiny_tokenizer()
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, pad_token_id=0, bos_token_id=None,
        eos_token_id=2, **{"tie_word_embeddings": True, **FAMILIES[family]},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def after_one_update(model, dtype):
    """The weights after one AdamW update of fp32 masters at lr 4e-7, rounded to `dtype` again."""
    masters = {name: torch.nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    logits = torch.func.functional_call(model.float(), masters, (torch.tensor(SEQUENCES[:1]),)).logits
    logits.log_softmax(-1)[0, :-1].gather(1, torch.tensor(SEQUENCES[0])[1:, None]).mean().neg().backward()
    torch.optim.AdamW(masters.values(), lr=4e-7).step()
    return {name: master.detach().to(dtype) for name, master in masters.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "dtype"), [*((family, "float32") for family in FAMILIES), ("llama", "bfloat16")])
def test_one_stale_tensor_of_any_kind_and_a_skipped_sync_are_caught_after_one_tiny_update(family, dtype, tmp_path):
    from spct_ray.engines.vllm import VllmEngine

    kind = getattr(torch, dtype)
    model = make_family(tmp_path / "model", family, kind)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    new = after_one_update(model, kind)
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert len(changed) == len(old) or dtype == "bfloat16"
    assert any("_proj" in name for name in changed)

    class Given(Source):
        def __init__(self, weights):
            super().__init__(None)
            self.weights = weights

        def named_weights(self):
            return iter(self.weights.items())

    engine = VllmEngine(str(tmp_path / "model"), EngineConfig(256, 4, dtype=dtype, kv_cache_gib=0.05))
    sent = SentWeights(Given(new), kind)

    def push(weights):
        push_weights(Given(weights), engine, str(tmp_path / "weights"), 1)
        for _ in sent.named_weights():
            pass

    def unlike():
        return compare(sent.checksums(), [engine.held_tensors(list(new))])

    try:
        push(new)
        assert unlike() == []
        push(old)
        with pytest.raises(ParityError, match="engine 0 does not hold the trainer's weights"):
            unlike()  # as where a sync was left out
        for name in old:  # both layers, so that each kind of tensor is tried twice
            push({**new, name: old[name]})
            if name in changed:
                leaf = ".".join(name.split(".")[:-2])
                with pytest.raises(ParityError, match=rf" [1-3] of \d+ tensors differ in their bits .*{leaf}"):
                    unlike()
            else:
                assert unlike() == []
    finally:
        engine.close()


def test_an_engine_of_which_nothing_can_be_compared_is_refused() -> None:
    held = HeldTensor("other.weight", (), 7, 4)
    with pytest.raises(ParityError, match="engine 0: none of its 1 tensors could be matched to the 1 that were sent"):
        compare({"model.weight": (7, 4)}, [[[held]]])
