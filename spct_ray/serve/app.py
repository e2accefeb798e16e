"""The Ray Serve application: judge and meta RM as two deployments behind one HTTP gateway, each scaled on its own.

Plain classes do the work (gateway.py, routes.py, backends.py); here they become deployments.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextvars import Context
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from spct_ray.cluster import session
from spct_ray.engines.base import Weights
from spct_ray.errors import ConfigError, EngineError, RequestError, SpctError
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Completion, Message, Trajectory
from spct_ray.serve.backends import LocalJudge, LocalMeta
from spct_ray.serve.deployment import ReplicaConfig, ServeConfig
from spct_ray.serve.gateway import Gateway
from spct_ray.serve.ledger import Event, LocalLedger
from spct_ray.serve.routes import build_app
from spct_ray.serve.routing import ItemRouter
from spct_ray.serve.weights import check_fit

APP_NAME = "spct"
JUDGE, META, GATEWAY, LEDGER = "JudgeReplica", "MetaReplica", "GatewayReplica", "LedgerReplica"  # the deployments
MAX_ATTEMPTS = 3  # of one judgement on replicas that die under it
SHUTDOWN_TIMEOUT_S = 60.0  # of Ray Serve; what is left then ends with Ray
HEALTH_CHECK_PERIOD_S = 2.0  # after which Serve sees that a replica has died


class JudgeReplica(LocalJudge):
    """One engine, loaded from `config.judge_model`."""

    def __init__(self, config: ServeConfig) -> None:
        from spct_ray.engines.vllm import VllmEngine  # here, so that only these replicas load vLLM

        super().__init__(VllmEngine(config.judge_model, config.resources.engine), config)

    def engine_died(self, error: EngineError) -> None:
        """End the process, so that its calls go to another replica and Serve starts a new one. If it lived on, calls
        would keep coming here and fail at once until a health check noticed."""
        os._exit(1)


class GatewayReplica:
    """The HTTP ingress: validation, seeds, fan-out, vote."""

    def __init__(
        self,
        config: ServeConfig,
        judge: DeploymentHandle,
        meta: DeploymentHandle | None,
        ledger: DeploymentHandle | None,
    ) -> None:
        self._gateway = Gateway(config, _RemoteJudge(judge), _RemoteMeta(meta) if meta else None)
        self._ledger = _RemoteLedger(ledger) if ledger else LocalLedger(config.name, config.judgements_per_minute)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._gateway, self._ledger, self._is_ready)

    async def _is_ready(self) -> bool:
        """Whether a judge replica runs, by Serve's own record, so that a long queue does not look like a death."""
        if self._gateway.config.resources.judge.min_replicas == 0:
            return True
        status = await asyncio.to_thread(serve.status)
        return bool(status.applications[APP_NAME].deployments[JUDGE].replica_states.get("RUNNING", 0))


class _RemoteJudge:
    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def judge(self, tasks: Sequence[JudgeTask]) -> AsyncGenerator[list[Trajectory], None]:
        """All tasks, which are of one item, on one replica, where they share the cached prompt; those that are not done
        when it dies are sent again, up to `MAX_ATTEMPTS` times in all."""
        item = tasks[0].item
        session_id = str(derive_seed(*(m.content for m in item.messages), *sorted(item.responses)))
        handle = self._handle.options(stream=True, session_id=session_id)
        missing = {task.sample: task for task in tasks}
        for attempts_left in reversed(range(MAX_ATTEMPTS)):
            response = _as_own_request(handle.judge, list(missing.values()))
            with _translated("judge", attempts_left):
                try:
                    async for batch in response:
                        for trajectory in batch:
                            del missing[trajectory.sample]
                        yield batch
                    return
                except (GeneratorExit, asyncio.CancelledError):  # nobody waits for the rest
                    response.cancel()
                    raise

    async def principles(self, messages: Sequence[Message]) -> Completion:
        """As `judge`, for one text."""
        for attempts_left in reversed(range(MAX_ATTEMPTS)):
            with _translated("judge", attempts_left):
                return await _as_own_request(self._handle.principles, tuple(messages))  # type: ignore[no-any-return]
        raise AssertionError("the last attempt returns or raises")


def _as_own_request(method: Any, *arguments: Any) -> Any:
    """Call a deployment's method outside the context of the HTTP request: Serve's router finds a waiting call by the
    request's id, and would confuse the calls of a batch or cohort."""
    return Context().run(method.remote, *arguments)


class _RemoteMeta:
    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def score(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        try:
            with _translated("meta RM"):
                return await self._handle.score.remote(conversations)  # type: ignore[no-any-return]
        except RayTaskError as error:  # whatever it was (say, out of memory), the vote can go on without
            raise EngineError(f"{type(error.cause).__name__}: {error.cause}") from error


class _RemoteLedger:
    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def record(self, events: Sequence[Event]) -> None:
        self._handle.record.remote(events)  # nobody waits for it

    async def take(self, client: str, judgements: int) -> int:
        with _translated("ledger of rate limits"):
            return await self._handle.take.remote(client, judgements)  # type: ignore[no-any-return]

    async def exposition(self) -> bytes:
        with _translated("ledger of metrics"):
            return await self._handle.exposition.remote()  # type: ignore[no-any-return]


@contextlib.contextmanager
def _translated(name: str, attempts_left: int = 0) -> Iterator[None]:
    """Turns the errors of a call to a deployment into ours. The death of a replica, whose work can be done again
    elsewhere, passes while attempts are left."""
    try:
        yield
    except RayActorError as error:
        if not attempts_left:
            raise EngineError(f"a replica of the {name} died: {error}") from error
    except (RayTaskError, BackPressureError, DeploymentUnavailableError) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, RequestError):
            raise cause from None
        if isinstance(cause, BackPressureError):
            raise EngineError(f"the {name}'s queue is full: {cause.message}") from error
        if isinstance(cause, DeploymentUnavailableError):
            raise EngineError(f"the {name} is not available: {cause.message}") from error
        raise


def application(
    config: ServeConfig, judge_class: type[LocalJudge] = JudgeReplica, weights: Weights | None = None
) -> Any:
    """The Serve application, ready for `serve.run`.

    The deployments' version covers everything that determines their code. Running the same with other `weights` lets
    Serve call `reconfigure` on the judge's replicas, one after the other (or a fifth of them at once, where they
    are many), and on each that it starts later. Raises ConfigError where a `num_gpus` is null and Ray not connected, so
    that nobody knows whether the cluster has GPUs.
    """
    config = _placed(config)
    resources = config.resources
    version = str(derive_seed(repr(config), repr(judge_class)))
    judge = _deployment(JUDGE, judge_class, resources.judge, version).options(
        request_router_config=RequestRouterConfig(request_router_class=ItemRouter),
        user_config=asdict(weights or Weights(config.judge_model)),
    )
    meta = None
    if config.meta_model:
        meta = _deployment(META, LocalMeta, resources.meta, version).bind(config.meta_model)
    ledger = None
    if resources.gateway.max_replicas > 1:  # they count together, in one replica
        one = ReplicaConfig(max_ongoing_requests=256, max_queued_requests=-1, num_cpus=0, num_gpus=0)
        ledger = _deployment(LEDGER, LocalLedger, one, version).bind(config.name, config.judgements_per_minute)
    gateway = _deployment(GATEWAY, serve.ingress()(GatewayReplica), resources.gateway, version)
    return gateway.bind(config, judge.bind(config), meta, ledger)


def _placed(config: ServeConfig) -> ServeConfig:
    """The configuration with a number for each model's GPUs."""
    if ray.is_initialized():
        return replace(config, resources=config.resources.on(session.nodes()))
    for name in ("judge", "meta") if config.meta_model else ("judge",):
        if getattr(config.resources, name).num_gpus is None:
            raise ConfigError(
                f"resources.{name}.num_gpus must be a number here (0 on CPUs): the application is made before Ray is "
                "connected, so nobody knows whether it has GPUs"
            )
    return config


def update_weights(directory: str) -> Weights:
    """Give the running judge's replicas the weights in `directory` (HF safetensors, seen by all nodes), one after the
    other; returns when all have them.

    Raises ConfigError when nothing is served on the connected cluster or the weights do not fit, EngineError when a
    replica did not take them.
    """
    _quieten()
    if APP_NAME not in serve.status().applications:
        raise ConfigError("nothing is served on this Ray cluster; start `spct serve` first, or set RAY_ADDRESS to it")
    judge_class, config, old = serve.get_deployment_handle(JUDGE, APP_NAME).deployed.remote().result()
    check_fit(directory, old.directory)
    new = Weights(directory, old.version + 1)
    _run(config, judge_class, new)
    return new


@contextlib.contextmanager
def serving(config: ServeConfig, judge_class: type[LocalJudge] = JudgeReplica) -> Iterator[str]:
    """Serve `config` on the connected Ray cluster; yields the URL once all deployments are healthy.

    At the end the application goes, and Ray Serve itself where it was started here; one that ran before keeps its own
    address. Raises ConfigError when the address is taken or the cluster already serves an application of ours,
    SpctError when Ray Serve does not start, EngineError when a model will not load. On this machine alone, what has no
    room is a ConfigError too, before anything loads; a cluster may grow, so there it is only said.
    """
    _quieten()
    config = _placed(config)
    resources = config.resources
    before = serve.status()
    if APP_NAME in before.applications:
        raise ConfigError(f"this Ray cluster already serves {APP_NAME!r}; stop that `spct serve` first")
    with session.waiting_for_room(resources.cluster, partial(print, flush=True)):
        resources.check_room(session.nodes(), meta=config.meta_model is not None)
        if not session.is_local(resources.cluster):  # others may hold what there is
            resources.check_room([ray.available_resources()], meta=config.meta_model is not None)
    try:
        _start(resources.host, resources.port)
        _run(config, judge_class, Weights(config.judge_model))
        yield f"http://{resources.host}:{resources.port}"
    finally:
        if before.proxies:
            serve.delete(APP_NAME)
        else:
            _shut_down()


def _quieten() -> None:
    """Keep Ray Serve's news of itself, but no warning or error, from this process's terminal."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _start(host: str, port: int) -> None:
    """Ray Serve with its HTTP proxy. Raises ConfigError when the address is taken, SpctError when no proxy comes up."""
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    except RayTaskError as error:
        raise ConfigError(f"{error.cause} Choose another host or port.") from error
    except (RayActorError, TimeoutError) as error:  # Serve ends a proxy that is not ready in time
        raise SpctError(
            f"Ray Serve's HTTP proxy for {host}:{port} died or was not ready within {session.PROXY_READY_TIMEOUT_S} s; "
            "most often the machine is overloaded: end other work or free memory, and try again"
        ) from error


def _shut_down() -> None:
    """`serve.shutdown()`, except that its call is made once: the controller ends in answer to it, which Ray would take
    for a failure, report on the terminal and try again. No public call does so, hence the private names."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    client.shutdown_cached_handles()
    with contextlib.suppress(RayActorError, GetTimeoutError):
        ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=SHUTDOWN_TIMEOUT_S)
    _disconnect()


def _run(config: ServeConfig, judge_class: type[LocalJudge], weights: Weights) -> None:
    try:
        serve.run(application(config, judge_class, weights), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        failed = serve.status().applications[APP_NAME].deployments.items()
        causes = [f"{name}: {status.message}" for name, status in failed if status.status != "HEALTHY"]
        raise EngineError("\n".join([f"Ray Serve could not start {weights.directory}.", *causes])) from error


def _deployment(name: str, cls: type, replicas: ReplicaConfig, version: str) -> Any:
    options = asdict(replicas)  # under Serve's own names
    actor = {key: options.pop(key) for key in ("num_cpus", "num_gpus")}
    queue = {key: options.pop(key) for key in ("max_ongoing_requests", "max_queued_requests")}
    window_s = min(max(replicas.upscale_delay_s, 1.0), 30.0)
    deployment = serve.deployment(
        cls,
        name=name,
        # Who deploys must not matter to Serve: it restarts replicas whose runtime environment changes.
        ray_actor_options=actor | {"runtime_env": {"env_vars": dict(session.ENVIRONMENT)}},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        autoscaling_config=options | {"look_back_period_s": window_s, "metrics_interval_s": window_s / 3},
        **queue,
    )
    # Without a version each `serve.run` counts as new code and restarts replicas that only need new weights; without
    # the private argument Serve warns that versions are deprecated, about which a user can do nothing.
    return deployment.options(version=version, _internal=True)
