"""Replicas of a scripted judge under Ray Serve: which of them a call goes to, how many there are, and new weights."""

import argparse
import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from spct_ray.cluster import session
from spct_ray.engines.base import Weights
from spct_ray.errors import ConfigError
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Message
from spct_ray.serve.client import JudgeClient, request
from spct_ray.serve.deployment import ReplicaConfig, ServeConfig, ServeResources
from tests.test_serve_ray import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def config_of(model: str, judge: ReplicaConfig) -> ServeConfig:
    return ServeConfig(
        model, judge=JudgeConfig(template="compact"), resources=ServeResources(port=free_port(), judge=judge)
    )


@pytest.fixture(scope="module")
def ray_cluster():
    """A head of two CPUs and two nodes of one CPU, all on this machine; the head's second CPU is the gateway's."""
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **memory})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, **memory)
        with session.start(session.ClusterResources(address=cluster.address)):
            yield
    finally:
        cluster.shutdown()


def test_replicas_follow_the_requests_up_and_down(ray_cluster, tmp_path):
    """None, then three, for which there is one CPU on each of three nodes, then none again."""
    from ray import serve

    from spct_ray.serve import app
    from tests.scripted_judge import ScriptedReplica

    def wait_for(num):
        while serve.status().applications["spct"].deployments["JudgeReplica"].replica_states != num:
            time.sleep(0.2)

    judge = ReplicaConfig(
        min_replicas=0, max_replicas=3, target_ongoing_requests=2, upscale_delay_s=2, downscale_delay_s=2
    )

    def ask(i):
        with JudgeClient(url, max_attempts=1) as client:
            return client.judge([Message("user", f"Query {i}: wait for {tmp_path}/go")], ["4", "7"], k=1)

    with app.serving(config_of("unused", judge), ScriptedReplica) as url, ThreadPoolExecutor(9) as threads:
        wait_for({})
        asked = [threads.submit(ask, i) for i in range(9)]
        wait_for({"RUNNING": 3})
        (tmp_path / "go").touch()
        assert [future.result().num_samples for future in asked] == [1] * 9
        wait_for({})


def test_overload_and_a_killed_judge_give_right_answers_or_clean_refusals(ray_cluster, monkeypatch, capsys):
    """The load test itself, short and against a judge that is soon there again."""
    from jobs.bench import load
    from spct_ray.serve import app
    from tests.scripted_judge import ScriptedReplica

    monkeypatch.setattr(load, "PROBE_S", 2.0)
    monkeypatch.setattr(load, "NUM_ITEMS", 4)
    config = config_of("unused", ReplicaConfig(max_ongoing_requests=4, max_queued_requests=4))
    with app.serving(config, ScriptedReplica) as url:
        asyncio.run(load.drive(argparse.Namespace(clients=30, minutes=0.2, k=2, kill_minute=None), url, config))
    out = capsys.readouterr().out
    assert "graceful_shutdown" not in out  # Serve's end is no failure
    figures = json.loads(out.splitlines()[-1])
    assert figures["outcomes"].keys() == {"200", "503"}
    assert figures["faults"] == {}
    assert 0 < figures["other_texts"] < figures["outcomes"]["200"]  # they name the process, and a new one took over
    assert figures["after_load"] == {"200": 4}
    assert {name.split()[0] for name in figures["memory_mib"]} == {"GatewayReplica", "JudgeReplica"}
    assert figures["memory_growth_mib_per_minute"].keys() == figures["memory_mib"].keys()
    assert all(mib > 20 for readings in figures["memory_mib"].values() for mib in readings)


@pytest.fixture(scope="module")
def two_replicas(ray_cluster, tmp_path_factory):
    from spct_ray.serve import app
    from tests.scripted_judge import ScriptedReplica

    model = tmp_path_factory.mktemp("model")
    save_file({"layer.weight": np.zeros((2, 2))}, model / "model.safetensors")
    config = config_of(str(model), ReplicaConfig(min_replicas=2, max_replicas=2, num_cpus=0.5))
    with app.serving(config, ScriptedReplica) as url:
        yield url


def test_several_gateways_count_requests_and_judgements_together(ray_cluster):
    import httpx

    from spct_ray.serve import app
    from tests.scripted_judge import ScriptedReplica

    config = config_of("unused", ReplicaConfig())
    pair = ReplicaConfig(min_replicas=2, max_replicas=2, num_cpus=0.1)
    config = replace(config, judgements_per_minute=40, resources=replace(config.resources, gateway=pair))
    body = request([Message("user", "Which?")], ["4", "7"], k=2)

    def ask(_):
        return httpx.post(f"{url}/v1/judge", json=body, timeout=60).status_code

    with app.serving(config, ScriptedReplica) as url, ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(ask, range(30)))
        metrics = [httpx.get(f"{url}/metrics").text.splitlines() for _ in range(8)]
    assert 20 <= statuses.count(200) <= 22  # a minute's worth, and what a few seconds give back
    assert set(statuses) == {200, 429}
    counted = 'spct_requests_total{route="/v1/judge",status="%d"} %.1f'
    for lines in metrics:
        assert all(counted % (status, statuses.count(status)) in lines for status in (200, 429))


def judges(answer) -> set[str]:
    """The processes that wrote an answer's samples."""
    return {sample.text.split()[0] for sample in answer.samples}


def test_all_rounds_of_an_item_go_to_one_replica_and_items_to_both(two_replicas):
    with JudgeClient(two_replicas) as client, ThreadPoolExecutor(4) as threads:

        def ask(i):
            return client.judge([Message("user", f"Query {i}")], ["4", "7"], k="auto")

        answers = list(threads.map(ask, range(12)))
        again = list(threads.map(ask, range(12)))
        batch = client.judge_batch([request([Message("user", f"Query {i}")], ["4", "7"], k=2) for i in range(40)])
    assert [a.num_samples for a in answers] == [32] * 12  # four rounds, four calls
    assert all(len(judges(a)) == 1 for a in answers)
    assert [judges(a) for a in again] == [judges(a) for a in answers]
    assert len(set.union(*map(judges, answers))) == 2
    assert [result.error for result in batch] == [None] * 40  # calls of one HTTP request do not wait for one another


def test_a_request_whose_engine_dies_is_answered_by_another(two_replicas, tmp_path):
    query = [Message("user", f"Query: die without {tmp_path}/once")]
    with JudgeClient(two_replicas, max_attempts=1) as client:
        answer = client.judge(query, ["4", "7"], k=4)
        assert (tmp_path / "once").exists()
        assert [s.sample for s in answer.samples] == [0, 1, 2, 3]
        assert [client.judge(query, ["4", "7"], k=1).num_samples for _ in range(8)] == [1] * 8  # none is left dead


def test_new_weights_come_to_all_replicas_under_load_and_no_request_is_dropped(two_replicas, tmp_path):
    from spct_ray.serve import app

    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        app.update_weights(str(tmp_path))
    save_file({"layer.weight": np.zeros((2, 3))}, tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"1 differ, the first is layer.weight, of shape \(2, 3\) instead of \(2, 2\)"
    ):
        app.update_weights(str(tmp_path))
    save_file({"layer.weight": np.ones((2, 2)), "lm_head.weight": np.ones((2, 2))}, tmp_path / "model.safetensors")

    stop = threading.Event()

    def ask_on(i):
        answers = []
        with JudgeClient(two_replicas, max_attempts=1) as client:
            while not stop.is_set():
                answers.append(client.judge([Message("user", f"Query {i} {len(answers)}")], ["4", "7"], k=2))
        return answers

    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(ask_on, i) for i in range(6)]
        try:
            time.sleep(1.0)
            assert app.update_weights(str(tmp_path)) == Weights(str(tmp_path), 1)
            time.sleep(1.0)
        finally:
            stop.set()
        by_client = [future.result() for future in asked]  # raises if any request failed
    with JudgeClient(two_replicas) as client:
        after = [client.judge([Message("user", f"Query {i}")], ["4", "7"], k=2) for i in range(12)]
    assert {a.weight_version for answers in by_client for a in answers} == {0, 1}
    assert all(answers[-1].weight_version == 1 for answers in by_client)
    assert {a.weight_version for a in after} == {1}
    pids = {pid for answers in by_client for a in answers for pid in judges(a)}
    assert len(pids) == 2  # the replicas went on, none was started anew
