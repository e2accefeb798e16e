"""Weights from GPU to GPU: what vLLM asks of us, on fakes; and, where there is a GPU, the way by IPC with sleeping."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_grpo_stage import make_context
from tiny import make_tiny_model

from spct_ray.engines.base import EngineConfig, EngineResources
from spct_ray.engines.vllm_transfer import PoolClient, WeightTransfer, ipc_buffer_bytes, weight_source
from spct_ray.errors import ConfigError, EngineError
from spct_ray.learn.train_config import OptimConfig, TrainResources
from spct_ray.stages.grpo import GrpoConfig, GrpoResources, run


class TwoEngines:
    """Notes what each of two engines is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[object], int]] = []

    def transfer(self, method, info_of, weight_version):
        self.asked.append((method, [info_of(number) for number in range(2)], weight_version))


class Rank:
    rank, dtype = 0, torch.float32

    def __init__(self) -> None:
        self.layer = torch.nn.Linear(3, 2)

    def named_weights(self):
        return ((name, weight.detach()) for name, weight in self.layer.named_parameters())

    def weight_shapes(self):
        return [("weight", (2, 3)), ("bias", (2,))]


@pytest.mark.slow  # vLLM takes long to import
def test_each_engines_workers_have_their_own_place_in_the_group_and_every_step_reaches_all() -> None:
    from vllm.distributed.weight_transfer import VLLMWeightSyncClient

    pool = TwoEngines()
    client = PoolClient(pool, workers_per_engine=4)
    assert isinstance(client, VLLMWeightSyncClient)
    client.init_weight_transfer_engine({"master_port": 5, "rank_offset": 1})
    client.version = 7
    client.start_weight_update()
    client.update_weights({"names": ["w"]})
    client.finish_weight_update()
    assert pool.asked == [
        (
            "init_weight_transfer_engine",
            [{"master_port": 5, "rank_offset": 1}, {"master_port": 5, "rank_offset": 5}],
            0,
        ),
        ("start_weight_update", [None, None], 7),
        ("update_weights", [{"names": ["w"]}] * 2, 7),
        ("finish_weight_update", [None, None], 7),
    ]
    client.init_weight_transfer_engine({"packed": True})  # IPC has no group
    assert pool.asked[-1][1] == [{"packed": True}] * 2


@pytest.mark.slow
def test_shapes_are_those_of_what_is_given_and_every_pass_is_a_fresh_one() -> None:
    source = weight_source(Rank())
    for _ in range(2):
        given = [(name, weight.dtype, tuple(weight.shape)) for name, weight in source]
        assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == given
    assert [names for names, _ in source.iter_groups()] == [["weight", "bias"]]


class Large(Rank):
    """Its largest tensor is Gemma-2-9B's embedding."""

    dtype = torch.bfloat16

    def weight_shapes(self):
        return [("model.embed_tokens.weight", (256_000, 3584)), ("model.norm.weight", (3584,))]


@pytest.mark.slow
def test_the_buffer_that_ipc_shares_takes_the_largest_tensor() -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    assert ipc_buffer_bytes(Large()) == 256_000 * 3584 * 2 > 2**30
    assert ipc_buffer_bytes(Rank()) == IPCTrainerInitInfo(rank=0).packed_buffer_size_bytes == 2**30
    assert "packed_buffer_size_bytes" in inspect.signature(IPCTrainerInitInfo).parameters


@pytest.mark.slow
def test_what_ipc_shares_is_no_expandable_segment_and_the_trainers_stay_so() -> None:
    settings, current = torch._C._accelerator_setAllocatorSettings, torch._C._accelerator_getAllocatorSettings
    seen = []

    class Sender:
        def send_weights(self):
            seen.append(current())
            raise EngineError("died within")

    transfer = WeightTransfer.__new__(WeightTransfer)
    transfer._client, transfer._engine = PoolClient(None, 1), Sender()
    before = current()
    try:
        settings("expandable_segments:True,max_split_size_mb:512")
        with pytest.raises(EngineError):
            transfer.send(3)
        assert seen == ["expandable_segments:False,max_split_size_mb:512"]
        assert current() == "expandable_segments:True,max_split_size_mb:512"
    finally:
        settings(before)


@pytest.mark.slow
def test_importing_vllm_does_not_make_the_trainer_compile_with_one_thread() -> None:
    """In a process of its own, as vLLM is imported once."""
    script = (
        "import os, torch\n"
        "from spct_ray.engines.vllm_transfer import _import_vllm\n"
        "_import_vllm()\n"
        "from torch._inductor import config\n"
        "print('TORCHINDUCTOR_COMPILE_THREADS' in os.environ, config.compile_threads)\n"
        "os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '7'\n"
        "_import_vllm()\n"
        "print(config.compile_threads)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_COMPILE_THREADS"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.split("\n")[-3:-1]
    from torch._inductor.config import decide_compile_threads

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
        assert first == f"False {decide_compile_threads()}"
    assert second == "7"


IPC, NCCL = EngineConfig(transfer="ipc"), EngineConfig(transfer="nccl")
HALF = TrainResources(gpus_per_worker=0.5), EngineResources(gpus_per_replica=0.5)
WHOLE = TrainResources(gpus_per_worker=1), EngineResources(gpus_per_replica=1)


@pytest.mark.parametrize(
    ("ranks", "engines", "engine", "words"),
    [
        (TrainResources(), EngineResources(), IPC, "ipc, which is from GPU to GPU; on CPU it is directory"),
        (*WHOLE, IPC, r"here are 1 ranks of 1 GPUs and 1 engines of 1: use nccl"),
        (replace(HALF[0], num_workers=2), HALF[1], IPC, "here are 2 ranks"),
        (*HALF, NCCL, "nccl, which takes whole GPUs"),
    ],
)
def test_a_way_that_the_resources_do_not_allow_is_refused(ranks, engines, engine, words) -> None:
    with pytest.raises(ConfigError, match=words):
        GrpoResources(ranks, engines, engine)


def test_an_engine_that_sleeps_while_training_cannot_sample_ahead(tmp_path) -> None:
    config = GrpoConfig(max_staleness=1, max_prompt_tokens=100)
    with pytest.raises(ConfigError, match="sleeps while it trains"):
        run(make_context(tmp_path), config, GrpoResources(*HALF, IPC))
    assert GrpoResources(*WHOLE, NCCL).engine.transfer == "nccl"


@pytest.mark.slow
def test_a_cpu_engine_takes_weights_from_a_directory_only(tmp_path) -> None:
    from spct_ray.engines.vllm import VllmEngine

    make_tiny_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="transfer is ipc, which is from GPU to GPU"):
        VllmEngine(str(tmp_path / "model"), replace(IPC, max_model_len=64, kv_cache_gib=0.1))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_engine_on_the_trainers_gpu_gets_its_weights_and_sleeps(tmp_path) -> None:
    from spct_ray.cluster.pool import EnginePool
    from spct_ray.cluster.session import ClusterResources, start
    from spct_ray.cluster.sync import Parity, SentWeights, check_parity
    from spct_ray.engines.checksums import compare
    from spct_ray.engines.vllm_transfer import WeightTransfer
    from spct_ray.learn.batch import make_batch
    from spct_ray.learn.trainer import Trainer

    make_tiny_model(tmp_path / "model", hidden=256, layers=4)
    ids = [list(range(3, 40))]
    batch = make_batch(ids, [1])
    engine = EngineConfig(max_model_len=256, gpu_memory_utilization=0.2, transfer="ipc")
    trainer = Trainer(
        str(tmp_path / "model"), head="lm", optim=OptimConfig(lr=1e-2), resources=HALF[0], total_steps=9, seed=0
    )
    with start(ClusterResources()):
        pool = EnginePool(str(tmp_path / "model"), engine, HALF[1], max_restarts=0)
        sent = SentWeights(trainer, trainer.dtype)
        transfer = WeightTransfer(sent, pool, engine, 1)
        for version in (1, 2):
            trainer.step([batch], lambda b: -trainer.logprobs(b).mean())
            transfer.send(version)
            assert compare(sent.checksums(), pool.held_tensors(list(sent.checksums()))) == []
            with torch.no_grad():
                logps = [trainer.logprobs(batch).tolist()]
            check_parity(logps, pool.prompt_logprobs(ids), Parity(0.02, 0.12))
            awake = torch.cuda.mem_get_info()[0]
            pool.sleep()
            assert torch.cuda.mem_get_info()[0] > awake + 2**30  # the cache, and the weights
            pool.wake()
        pool.close()
