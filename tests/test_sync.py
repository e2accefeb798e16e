"""Weight sync and its parity gate: on a real vLLM with a tied output layer, against a transformers forward pass."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spct_ray.cluster.sync import check_parity, push_weights
from spct_ray.engines.base import EngineConfig, Request, SamplingParams
from spct_ray.engines.scripted import ScriptedEngine
from spct_ray.errors import ParityError
from spct_ray.learn.batch import make_batch
from spct_ray.learn.config import LoraConfig
from spct_ray.learn.lora import add_adapters, whole_weights
from spct_ray.learn.model import TokenLogprobs, load_model
from spct_ray.records import Message
from tests.tiny import make_tiny_model

SEQUENCES = [[5, 60, 99, 7, 200, 3, 42, 17], [1, 87, 85, 259, 201, 42]]
TOLERANCE = 0.1  # bf16 arithmetic in another order


class Source:
    """A trainer's rank that only has weights."""

    def __init__(self, model, rank=0):
        self.model, self.rank, self.num_given = model, rank, 0

    def named_weights(self):
        for name, weight in self.model.named_parameters():
            self.num_given += 1
            yield name, weight.detach()


def logprobs(model, sequences):
    """Log-probabilities of each token after the first, by transformers."""
    found = []
    for ids in sequences:
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found.append([logps[i, token].item() for i, token in enumerate(ids[1:])])
    return found


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


@given(st.lists(st.lists(st.floats(-20, 0), max_size=6), min_size=1, max_size=5), st.floats(0.01, 3), st.data())
def test_parity_finds_the_one_token_that_differs(trainer, shift, data):
    places = [(s, t) for s, row in enumerate(trainer) for t in range(len(row))]
    if not places:
        with pytest.raises(ParityError, match="different tokens"):
            check_parity(trainer, trainer, 1.0)
        return
    sequence, token = data.draw(st.sampled_from(places))
    engine = [list(row) for row in trainer]
    engine[sequence][token] -= shift
    assert check_parity(trainer, engine, shift * 1.01) == pytest.approx(shift)
    with pytest.raises(ParityError, match=f"token {token} of sequence {sequence}: "):
        check_parity(trainer, engine, shift * 0.99)


@pytest.mark.parametrize("engine", [[[-1.0, math.nan]], [[-1.0, -math.inf]], [[-1.0]], [[-1.0, -2.0], [-1.0]]])
def test_parity_never_passes_what_it_cannot_compare(engine):
    with pytest.raises(ParityError):
        check_parity([[-1.0, -2.0]], engine, 10.0)


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
    assert check_parity(logprobs(old, SEQUENCES), engine.prompt_logprobs(SEQUENCES), TOLERANCE) > 0
    make_tiny_model(tmp_path / "new", tied=True, seed=2)
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.bfloat16)
    with pytest.raises(ParityError):
        check_parity(logprobs(new, SEQUENCES), engine.prompt_logprobs(SEQUENCES), TOLERANCE)

    request = Request((Message("user", "Name a prime"),), SamplingParams(max_tokens=8, temperature=0.0, logprobs=True))
    engine.generate([request])  # its prefix is cached now, with the old weights
    monkeypatch.setattr("spct_ray.cluster.sync._SHARD_BYTES", 60_000)  # several shards
    push_weights(Source(new), engine, str(tmp_path / "weights"), 1)
    check_parity(logprobs(new, SEQUENCES), engine.prompt_logprobs(SEQUENCES), TOLERANCE)
    ((completion,),) = engine.generate([request])
    assert completion.weight_version == 1
    ids = [*completion.prompt_token_ids, *completion.token_ids]
    sampled = logprobs(new, [ids])[0][-len(completion.token_ids) :]
    check_parity([sampled], [completion.logprobs], TOLERANCE)

    # vLLM's own CPU reload, without our repair of the tied head: the body is new, the head stale
    monkeypatch.setattr("spct_ray.engines.vllm._repack_kept_weights", lambda worker: None)
    engine.reload(engine._model_dir, 2)
    with pytest.raises(ParityError, match=r"max .dlogp. between trainer and engine"):
        check_parity(logprobs(old, SEQUENCES), engine.prompt_logprobs(SEQUENCES), TOLERANCE)


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
