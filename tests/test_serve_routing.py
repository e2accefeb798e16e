"""The router of judge calls and new weights for one replica, without a cluster."""

import asyncio
import random

import numpy as np
import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, RequestMetadata
from ray.serve.request_router import PendingRequest, ReplicaID
from safetensors.numpy import save_file

from spct_ray.errors import ConfigError
from spct_ray.serve.backends import LocalJudge
from spct_ray.serve.deployment import ServeConfig
from spct_ray.serve.routing import MAX_LEAD, ItemRouter
from spct_ray.serve.weights import check_fit
from tests.scripted_engine import ScriptedEngine

JUDGE = DeploymentID(name="JudgeReplica", app_name="spct")


class Replica:
    """As much of a running replica as a router sees."""

    def __init__(self, name, room=100):
        self.replica_id = ReplicaID(name, JUDGE)
        self.max_ongoing_requests = room
        self.num_ongoing = 0

    async def get_queue_len(self, *, deadline_s):
        return self.num_ongoing


class Routed:
    """A router over `replicas`; calls stay with their replica until `finish`."""

    def __init__(self, *replicas):
        self.router = ItemRouter(JUDGE, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        self.router.initialize_state()
        self.router.update_replicas(list(replicas))

    async def call(self, item):
        """Name of the replica that a call about `item` goes to."""
        self.num_calls = getattr(self, "num_calls", 0) + 1
        pending = PendingRequest([], {}, RequestMetadata("r", str(self.num_calls), session_id=item))
        replica = await self.router._choose_replica_for_request(pending)
        replica.num_ongoing += 1
        self.router.on_send_request(replica.replica_id)
        self.router.on_request_routed(pending, replica.replica_id, None)
        return replica.replica_id.unique_id

    def finish(self, replica):
        replica.num_ongoing -= 1
        self.router.decrement_queue_len_cache(replica.replica_id)


def run(scenario):
    random.seed(1)
    return asyncio.run(asyncio.wait_for(scenario(), 20))


def test_calls_about_an_item_go_to_one_replica_and_items_to_all():
    async def scenario():
        replicas = [Replica(name) for name in "abc"]
        routed = Routed(*replicas)
        calls = {}
        for _ in range(4):  # one after the other, so that no replica is ever busy
            for item in range(30):
                calls.setdefault(item, []).append(await routed.call(f"item {item}"))
                routed.finish(next(r for r in replicas if r.replica_id.unique_id == calls[item][-1]))
        return calls

    calls = run(scenario)
    assert all(len(set(names)) == 1 for names in calls.values())
    assert {names[0] for names in calls.values()} == set("abc")


def test_calls_that_come_together_all_get_a_replica():
    async def scenario():
        routed = Routed(Replica("a"), Replica("b"))
        return await asyncio.gather(*(routed.call(f"item {i % 20}") for i in range(60)))

    names = run(scenario)
    assert len(names) == 60
    assert min(names.count("a"), names.count("b")) >= 12  # over 150 seeds 20 at least


def test_a_busy_replica_keeps_its_items_only_up_to_a_lead():
    async def scenario():
        routed = Routed(Replica("a"), Replica("b"))
        return [await routed.call("item") for _ in range(MAX_LEAD + 2)]

    *first, last = run(scenario)
    assert len(set(first)) == 1
    assert last != first[0]


def test_calls_without_an_item_are_spread_and_a_dead_or_full_replica_is_left():
    async def scenario():
        a, b = Replica("a", room=2), Replica("b")
        routed = Routed(a, b)
        spread = [await routed.call("") for _ in range(10)]
        await routed.call("item")
        routed.router.update_replicas([Replica("c")])
        return spread, await routed.call("item")

    spread, after = run(scenario)
    assert (spread.count("a"), spread.count("b")) == (2, 8)
    assert after == "c"


# --- new weights


def test_weights_must_have_the_served_models_tensors(tmp_path):
    served, other = tmp_path / "served", tmp_path / "other"
    for directory in (served, other):
        directory.mkdir()
    save_file({"a": np.zeros((2, 2)), "b": np.zeros(3)}, served / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        check_fit(str(other), str(served))
    (other / "1.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match="cannot be read"):
        check_fit(str(other), str(served))
    save_file({"a": np.zeros((2, 3))}, other / "1.safetensors")
    with pytest.raises(ConfigError, match=r"2 differ, the first is a, of shape \(2, 3\) instead of \(2, 2\)"):
        check_fit(str(other), str(served))
    save_file({"a": np.ones((2, 2)), "lm_head.weight": np.ones((2, 2))}, other / "1.safetensors")
    save_file({"b": np.ones(3)}, other / "2.safetensors")
    check_fit(str(other), str(served))


def test_a_replica_loads_weights_once_a_version():
    loaded = []

    class Engine(ScriptedEngine):
        def reload(self, weights_dir, weight_version):
            loaded.append((weights_dir, weight_version))
            super().reload(weights_dir, weight_version)

    judge = LocalJudge(Engine(lambda r: ["x"]), ServeConfig("unused"))
    for directory, version in (("unused", 0), ("/new", 1), ("/new", 1), ("/newer", 2)):
        asyncio.run(judge.reconfigure({"directory": directory, "version": version}))
    assert loaded == [("/new", 1), ("/newer", 2)]
