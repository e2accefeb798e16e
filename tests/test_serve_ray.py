"""Serving for real: Ray Serve, vLLM on a tiny random model, a random meta RM, HTTP. The rest is in test_serve.py."""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from spct_ray.cluster import session
from spct_ray.engines.base import EngineConfig
from spct_ray.errors import ConfigError
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Message
from spct_ray.serve.client import JudgeClient, ServerError
from spct_ray.serve.config import ReplicaConfig, ServeConfig, ServeResources
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OK = {"messages": [{"role": "user", "content": "Name a prime."}], "responses": ["4", "7"]}
MAX_MODEL_LEN = 1024
JUDGE = ReplicaConfig(num_cpus=1, max_ongoing_requests=4, max_queued_requests=4)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    judge, meta = (tmp_path_factory.mktemp(name) for name in ("judge", "meta"))
    make_tiny_model(judge)
    tiny = AutoConfig.from_pretrained(judge, num_labels=1)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(tiny, dtype=torch.bfloat16).save_pretrained(meta)
    AutoTokenizer.from_pretrained(judge).save_pretrained(meta)
    return ServeConfig(
        judge_model=str(judge),
        meta_model=str(meta),
        name="tiny",
        judge=JudgeConfig(template="compact", single="scale", max_tokens=880),
        guided=True,
        judge_timeout_s=400,  # a busy machine needs minutes to start an engine anew
        resources=ServeResources(
            port=free_port(),
            judge=JUDGE,
            meta=ReplicaConfig(num_cpus=0.5),
            engine=EngineConfig(max_model_len=MAX_MODEL_LEN, max_num_seqs=16, kv_cache_gib=0.1),
            cluster=session.ClusterResources(num_cpus=4, object_store_gib=0.1),
        ),
    )


@pytest.fixture(scope="module")
def url(config):
    from spct_ray.serve import app
    from tests.scripted_judge import WatchedReplica

    with session.start(config.resources.cluster), app.serving(config, WatchedReplica) as address:
        yield address


def test_a_verdict_over_http(url):
    with JudgeClient(url) as client:
        answer = client.judge([Message("user", "Name a prime.")], ["4", "7"], k=6, k_meta=2, seed=1)
        again = client.judge([Message("user", "Name a prime.")], ["4", "7"], k=6, k_meta=2, seed=1)
    usable = [s for s in answer.samples if s.failure is None]
    assert len(usable) >= 2, answer.failures
    assert sum(answer.failures.values()) == 6 - len(usable)
    assert set(answer.failures) <= {"truncated"}  # the guide leaves no other way to fail
    kept = sorted(usable, key=lambda s: -s.meta_logit)[:2]
    assert answer.voting == "meta"
    assert answer.scores == [sum(s.scores[i] for s in kept) for i in (0, 1)]
    assert (answer.model, answer.weight_version, answer.num_samples) == ("tiny", 0, 6)
    assert all(s.prompt_tokens > 10 and s.completion_tokens > 10 for s in answer.samples)
    assert [s.order for s in again.samples] == [s.order for s in answer.samples]


def test_a_judge_replica_writes_its_log(url):
    """An engine that closes the process's log handlers leaves Serve's to hold each record for ever, and write none."""
    import ray

    with JudgeClient(url) as client:
        client.judge([Message("user", "Name a prime.")], ["4", "7"], k=1)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path(), "serve")
    written = "".join(log.read_text() for log in logs.glob("replica_spct_JudgeReplica_*.log"))
    assert "CALL judge OK" in written


def test_replicas_keep_the_niceness_of_the_process_that_started_ray(url):
    import ray

    assert ray.get(ray.remote(num_cpus=0)(lambda: os.nice(0)).remote()) == os.nice(0)


def test_refusals_over_http(url):
    bad = httpx.post(f"{url}/v1/judge", json={**OK, "k": 0})
    assert (bad.status_code, bad.json()["error"]["details"][0]["path"]) == (422, "k")
    with JudgeClient(url) as client, pytest.raises(ServerError) as raised:
        client.judge([Message("user", "long " * 400)], ["a", "b"], k=2)
    assert (raised.value.status, raised.value.kind) == (413, "too_long")
    assert str(MAX_MODEL_LEN) in str(raised.value)
    assert httpx.get(f"{url}/readyz").json() == {"status": "ok"}
    assert [m["role"] for m in httpx.get(f"{url}/v1/models").json()["data"]] == ["judge", "meta"]


def test_a_stream_over_http_ends_with_the_verdict(url):
    with JudgeClient(url) as client:
        *samples, answer = client.stream([Message("user", "Name a prime.")], ["4", "7"], k=4, seed=1)
    assert sorted(s.sample.sample for s in samples) == [0, 1, 2, 3]
    assert [s.num_samples for s in samples] == [1, 2, 3, 4]
    assert {s.sample.sample: s.sample.text for s in samples} == {s.sample: s.text for s in answer.samples}


def test_a_client_that_goes_away_and_a_budget_that_is_spent_end_the_engines_work(url):
    """Its tasks leave the judge's replica; Serve counts those that run."""
    from ray import serve
    from ray.serve.handle import DeploymentHandle

    judge: DeploymentHandle = serve.get_deployment_handle("JudgeReplica", "spct")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/judge", json={**OK, "k": 64}, timeout=0.5)
    assert becomes_idle(judge)
    with httpx.stream("POST", f"{url}/v1/judge", json={**OK, "k": 64, "stream": True}, timeout=60) as reply:
        lines = reply.iter_lines()  # a name keeps it, and with it the connection
        assert next(lines) == "event: sample"
        assert judge.num_under_way.remote().result() > 0
    assert becomes_idle(judge)
    late = httpx.post(f"{url}/v1/judge", json={**OK, "k": 64, "budget": {"milliseconds": 500}}, timeout=60)
    assert late.status_code == 504 or late.json()["stopped"] == "budget"
    assert becomes_idle(judge)
    assert httpx.post(f"{url}/v1/judge", json={**OK, "k": 1}, timeout=60).status_code == 200


def test_texts_of_requests_are_in_no_log(url):
    import ray

    body = {**OK, "messages": [{"role": "user", "content": "Open sesame."}], "k": 1}
    assert httpx.post(f"{url}/v1/judge", json=body, timeout=60).status_code == 200
    assert httpx.post(f"{url}/v1/judge", json={**body, "sesame": 1}, timeout=60).status_code == 422
    out = ray.get(ray.remote(num_cpus=0)(lambda: os.readlink("/proc/self/fd/1")).remote())  # a worker writes to a log
    logs = [path.read_bytes() for path in Path(out).parent.rglob("*") if path.is_file()]
    assert any(b"/v1/judge" in log for log in logs)  # the requests are there
    assert not any(b"sesame" in log for log in logs)


def test_one_cluster_serves_once(url, config):
    from spct_ray.serve import app

    with pytest.raises(ConfigError, match="already serves"), app.serving(config):
        pass


def test_a_full_queue_is_503_and_recovers(url):
    """More requests than the judge runs and holds: the rest is refused at once, the accepted ones are answered."""

    def ask(_):
        return httpx.post(f"{url}/v1/judge", json={**OK, "k": 1}, timeout=300)

    with ThreadPoolExecutor(40) as threads:
        replies = list(threads.map(ask, range(40)))
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= JUDGE.max_ongoing_requests + JUDGE.max_queued_requests
    assert all("retry-after" in reply.headers for reply in replies if reply.status_code == 503)
    assert ask(0).status_code == 200


def test_new_weights_from_another_process_reach_the_engine_under_load_and_no_request_fails(url, tmp_path):
    import ray

    def greedy(client):
        (sample,) = client.judge([Message("user", "Name a prime.")], ["4", "7"], k=1, seed=1, temperature=0).samples
        return sample.text

    def ask_on(i):
        versions = []
        with JudgeClient(url, max_attempts=1) as client:
            while not stop.is_set():
                versions.append(client.judge([Message("user", f"Query {i}")], ["4", "7"], k=1).weight_version)
        return versions

    make_tiny_model(tmp_path, seed=1)
    stop = threading.Event()
    command = [sys.executable, "-m", "spct_ray.cli", "serve-update", str(tmp_path)]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with JudgeClient(url) as client, ThreadPoolExecutor(3) as threads:
        before = greedy(client)
        asked = [threads.submit(ask_on, i) for i in range(3)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            after = greedy(client)
        finally:
            stop.set()
        versions = [future.result() for future in asked]  # raises if any request failed
        assert done.returncode == 0, done.stderr
        assert "as weight version 1" in done.stdout
        assert before != after == greedy(client)
    assert all(seen == sorted(seen) and {*seen} == {0, 1} for seen in versions)


def test_a_judge_killed_at_work_is_replaced_and_a_lost_meta_rm_makes_the_vote_plain(url, config):
    from ray import serve

    judge = serve.get_deployment_handle("JudgeReplica", "spct")
    Path(config.meta_model, "model.safetensors").unlink()  # so that no replacement of the meta RM can load
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(httpx.post, f"{url}/v1/judge", json={**OK, "k": 8, "seed": 1}, timeout=450)
        while not judge.num_under_way.remote().result():
            time.sleep(0.05)
        kill_replicas()
        reply = asked.result()
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert [s["sample"] for s in answer["samples"]] == list(range(8))
    assert {s["weight_version"] for s in answer["samples"]} == {1}  # a replica that starts takes the new weights
    assert (answer["voting"], answer["scores"] is None) == ("plain", False)
    assert "meta RM" in answer["voting_reason"]


def becomes_idle(judge):
    """Whether no judgement is under way, long before 64 of them could have been written."""
    for _ in range(20):
        if judge.num_under_way.remote().result() == 0:
            return True
        time.sleep(0.1)
    return False


def kill_replicas():
    """End the judge's and the meta RM's processes without warning."""
    import ray

    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if "SERVE_REPLICA" in a["name"]]
    doomed = [name for name in names if "JudgeReplica" in name or "MetaReplica" in name]
    assert len(doomed) == 2
    for name in doomed:
        ray.kill(ray.get_actor(name, namespace="serve"))
