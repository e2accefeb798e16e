"""Placement for real: a Ray of two nodes with two GPUs each, which nothing computes on, so they need not exist."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spct_ray.cli import run_graph
from spct_ray.cluster import session
from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.engines.base import EngineConfig
from spct_ray.errors import ConfigError
from spct_ray.graph.record import read_record
from spct_ray.graph.step import Step
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Message
from spct_ray.serve.deployment import ReplicaConfig, ServeConfig, ServeResources
from tests.placement_toys import SeeingJudge, see
from tests.test_serve_ray import free_port
from tests.tiny import make_tiny_model, make_tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAIR = EngineConfig(tensor_parallel=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[session.ClusterResources]:
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # as a process sees whom nobody tells otherwise
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 4, "num_gpus": 2, "include_dashboard": False, **memory},
        )
        try:
            made.add_node(num_cpus=2, num_gpus=2, **memory)
            there = session.ClusterResources(address=made.address)
            with session.start(there):
                yield there
        finally:
            made.shutdown()


def step_of(model: str, engine: EngineConfig, num_replicas: int = 2) -> Step:
    where = SamplingResources(num_replicas, 1, None, engine=engine)
    return Step("see", see, model, where)


def test_engines_of_a_step_see_the_gpus_that_they_ask_for_and_other_processes_none(
    cluster: session.ClusterResources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two engines of two GPUs, one on each node, though the step left it open how many they take."""
    make_tiny_model(tmp_path / "model")
    step = step_of(str(tmp_path / "model"), PAIR)
    run_graph([step], str(tmp_path / "run"), 1, cluster, "test")
    (directory,) = (tmp_path / "run" / "steps").iterdir()
    record = read_record(str(directory))
    assert record is not None
    assert record.metrics == {"own": [], "worker": [], "kept": ["2"], "pooled": ["1"], "in_use": 4}
    assert record.resources["gpus_per_replica"] == 2
    assert "no room" not in capsys.readouterr().out


def test_a_step_without_room_is_refused_before_it_starts(cluster: session.ClusterResources, tmp_path: Path) -> None:
    """On a Ray that cannot grow, as this one is said to be."""
    here = session.ClusterResources()
    for engine, num, told in ((EngineConfig(tensor_parallel=4), 1, "see 4"), (PAIR, 3, "see 3 x 2")):
        with pytest.raises(ConfigError, match=rf"asked for \({told}; .*there are 2 \+ 2 on the nodes: .* of step see"):
            run_graph([step_of("model", engine, num)], str(tmp_path / "run"), 1, here, "test")
    assert not list((tmp_path / "run" / "steps").iterdir())


def config_of(tmp_path: Path, cluster: session.ClusterResources, **resources: Any) -> ServeConfig:
    return ServeConfig(
        str(tmp_path),
        judge=JudgeConfig(template="compact"),
        resources=ServeResources(port=free_port(), cluster=cluster, **resources),
    )


def test_replicas_ask_for_gpus_and_see_them(cluster: session.ClusterResources, tmp_path: Path) -> None:
    """Judge replicas on two GPUs each, the meta RM on a share of one, none for the gateway."""
    import ray
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from spct_ray.serve import app
    from spct_ray.serve.client import JudgeClient

    make_tiny_model(tmp_path)
    meta = tmp_path / "meta"
    config = AutoConfig.from_pretrained(tmp_path, num_labels=1)
    AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).save_pretrained(meta)
    make_tiny_tokenizer().save_pretrained(meta)
    shared = ReplicaConfig(num_cpus=0.5, num_gpus=0.5)
    served = replace(config_of(tmp_path, cluster, engine=PAIR, meta=shared), meta_model=str(meta))
    before = ray.available_resources()["GPU"]
    with app.serving(served, SeeingJudge) as url, JudgeClient(url) as client:
        answer = client.judge([Message("user", "Which?")], ["a", "b"], k=4)
        assert {s.text.split()[0] for s in answer.samples} == {"2"}
        assert (answer.voting, answer.voting_reason) == ("meta", "")
        assert before - ray.available_resources()["GPU"] == 2.5


def test_a_service_without_room_is_refused_or_where_ray_may_grow_said(
    cluster: session.ClusterResources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from spct_ray.serve import app

    here, four = session.ClusterResources(), EngineConfig(tensor_parallel=4)
    told = r"4 GPUs are asked for \(judge 4; .*there are 2 \+ 2 on the nodes: .*or name a larger cluster"
    with pytest.raises(ConfigError, match=told), app.serving(config_of(tmp_path, here, engine=four), SeeingJudge):
        pass
    with session.waiting_for_room(cluster, print):
        config_of(tmp_path, cluster, engine=four).resources.on(session.nodes()).check_room(session.nodes(), meta=False)
    assert "Ray has no room now, and is waited for: 4 GPUs" in capsys.readouterr().out
