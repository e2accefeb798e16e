"""Starting Ray Serve where it does not come up, with a Serve that is not there."""

import inspect

import pytest
import ray
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve import context
from ray.serve._private import constants
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.controller import ServeController
from ray.serve._private.default_impl import get_request_metadata
from ray.serve.deployment import Deployment
from ray.serve.request_router import RequestRouter

from spct_ray.cluster.session import ENVIRONMENT, ClusterResources
from spct_ray.errors import ConfigError, SpctError
from spct_ray.serve import app
from spct_ray.serve.config import ReplicaConfig, ServeConfig, ServeResources


@pytest.mark.parametrize("failure", [ActorDiedError(), TimeoutError("HTTP proxies not available after 60s.")])
def test_a_proxy_that_does_not_come_up_is_told_and_serve_is_ended(monkeypatch, failure):
    def start(**options):
        raise failure

    ended = []
    monkeypatch.setattr(serve, "status", serve.schema.ServeStatus)
    monkeypatch.setattr(serve, "start", start)
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray, "available_resources", dict)
    monkeypatch.setattr(app, "_shut_down", lambda: ended.append(True))
    judge, elsewhere = ReplicaConfig(num_gpus=0), ClusterResources(address="elsewhere:1")
    config = ServeConfig("m", resources=ServeResources(port=4321, judge=judge, cluster=elsewhere))
    told = r"proxy for 127\.0\.0\.1:4321 died or was not ready within 60 s.*try again"
    with pytest.raises(SpctError, match=told), app.serving(config):
        pass
    assert ended == [True]


def test_serve_knows_the_variable_of_its_proxys_time_to_start():
    (name,) = [name for name in ENVIRONMENT if "PROXY" in name]
    assert f'"{name}"' in inspect.getsource(constants)


@pytest.mark.parametrize(
    ("owner", "names", "used_by"),
    [
        (context, ("def _get_global_client(", "def _disconnect("), "app._shut_down"),
        (ServeControllerClient, ("self._controller", "def shutdown_cached_handles("), "app._shut_down"),
        (ServeController, ("def graceful_shutdown(",), "app._shut_down"),
        (Deployment, ("version:", "_internal:"), "app._deployment"),
        (serve.ingress, ("__serve_build_asgi_app__",), "app.GatewayReplica"),
        (get_request_metadata, ("generate_request_id()",), "app._as_own_request"),
        (RequestRouter, ("def choose_replicas(", "def on_request_routed(", "def replica_queue_len_cache("), "routing"),
    ],
)
def test_what_we_use_of_serves_inner_parts_is_there(owner, names, used_by):
    missing = [name for name in names if name not in inspect.getsource(owner)]
    assert not missing, f"Ray {ray.__version__} lost {missing}, see spct_ray/serve/{used_by}"


def test_an_application_for_an_unknown_cluster_states_its_gpus():
    from jobs.serve import build

    with pytest.raises(ConfigError, match=r"resources\.judge\.num_gpus must be a number here"):
        build({"config": "conf/serve.yaml"})
    with pytest.raises(ConfigError, match=r"resources\.meta\.num_gpus must be a number here"):
        build({"config": "conf/serve.yaml", "resources.judge.num_gpus": "1", "meta_model": "there"})
    assert build({"config": "conf/serve.yaml", "resources.judge.num_gpus": "1"}) is not None
