"""Starting Ray Serve where it does not come up, with a Serve that is not there."""

import pytest
import ray
from ray import serve
from ray.exceptions import ActorDiedError

from spct_ray.cluster.session import ClusterResources
from spct_ray.errors import ConfigError, SpctError
from spct_ray.serve import app
from spct_ray.serve.deployment import ReplicaConfig, ServeConfig, ServeResources


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


def test_an_application_for_an_unknown_cluster_states_its_gpus():
    from jobs.serve import build

    with pytest.raises(ConfigError, match=r"resources\.judge\.num_gpus must be a number here"):
        build({"config": "conf/serve.yaml"})
    with pytest.raises(ConfigError, match=r"resources\.meta\.num_gpus must be a number here"):
        build({"config": "conf/serve.yaml", "resources.judge.num_gpus": "1", "meta_model": "there"})
    assert build({"config": "conf/serve.yaml", "resources.judge.num_gpus": "1"}) is not None
