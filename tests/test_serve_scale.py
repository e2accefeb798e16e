"""Replicas of a scripted judge under Ray Serve: which of them a call goes to, how many there are, and new weights."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from spct_ray.cluster import session
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Message
from spct_ray.serve.client import JudgeClient, request
from spct_ray.serve.config import ReplicaConfig, ServeConfig, ServeResources
from tests.test_serve_ray import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def config_of(judge: ReplicaConfig) -> ServeConfig:
    return ServeConfig(
        "unused", judge=JudgeConfig(template="compact"), resources=ServeResources(port=free_port(), judge=judge)
    )


@pytest.fixture(scope="module")
def ray_cluster():
    with session.start(session.ClusterResources(num_cpus=4, object_store_gib=0.1)):
        yield


@pytest.fixture(scope="module")
def two_replicas(ray_cluster):
    from spct_ray.serve import app
    from tests.scripted_judge import ScriptedReplica

    config = config_of(ReplicaConfig(min_replicas=2, max_replicas=2, num_cpus=0.5))
    with app.serving(config, ScriptedReplica) as url:
        yield url


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
