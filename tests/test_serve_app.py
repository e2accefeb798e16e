"""Starting Ray Serve where it does not come up, with a Serve that is not there."""

import inspect

import pytest
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve._private import constants

from spct_ray.cluster.session import ENVIRONMENT, ClusterResources
from spct_ray.errors import SpctError
from spct_ray.serve import app
from spct_ray.serve.config import ServeConfig, ServeResources


@pytest.mark.parametrize("failure", [ActorDiedError(), TimeoutError("HTTP proxies not available after 60s.")])
def test_a_proxy_that_does_not_come_up_is_told_and_serve_is_ended(monkeypatch, failure):
    def start(**options):
        raise failure

    ended = []
    monkeypatch.setattr(serve, "status", serve.schema.ServeStatus)
    monkeypatch.setattr(serve, "start", start)
    monkeypatch.setattr(app, "_shut_down", lambda: ended.append(True))
    config = ServeConfig("m", resources=ServeResources(port=4321, cluster=ClusterResources(address="elsewhere:1")))
    told = r"proxy for 127\.0\.0\.1:4321 died or was not ready within 60 s.*try again"
    with pytest.raises(SpctError, match=told), app.serving(config):
        pass
    assert ended == [True]


def test_serve_knows_the_variable_of_its_proxys_time_to_start():
    (name,) = [name for name in ENVIRONMENT if "PROXY" in name]
    assert f'"{name}"' in inspect.getsource(constants)
