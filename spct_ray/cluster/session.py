"""Connects to Ray, or starts it on this machine, and ends only what it started."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from spct_ray.errors import ConfigError, SpctError
from spct_ray.placement import Nodes

PROXY_READY_TIMEOUT_S = 60  # of Ray Serve's HTTP proxy. Serve's own 5 s are too few on a busy machine; 60 is its most
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # steps report progress themselves
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started on node",  # as many as there are actors
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait starve their neighbours on shared cores
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(PROXY_READY_TIMEOUT_S),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # else a process that asks for no GPU sees, and takes, the first one
}
for _name, _value in ENVIRONMENT.items():  # now, because Ray reads some of it when it is imported
    os.environ.setdefault(_name, _value)


@dataclass(frozen=True)
class ClusterResources:
    """Where Ray is, and the memory of each of its GPUs, by which `spct plan` tells whether a plan fits.

    `num_cpus` and `object_store_gib` count only for a local Ray; null means all CPUs and Ray's own default.
    """

    address: str | None = None  # of an existing cluster, e.g. "auto"; RAY_ADDRESS wins, as in a submitted job
    num_cpus: int | None = None
    object_store_gib: float | None = None
    gpu_gib: float = 79.0  # of an "80 GB" card


def is_local(resources: ClusterResources) -> bool:
    """Whether no existing cluster is named, so that Ray runs on this machine alone."""
    return not (os.environ.get("RAY_ADDRESS") or resources.address)


@contextlib.contextmanager
def start(resources: ClusterResources) -> Iterator[None]:
    """Be connected to Ray inside the `with` block.

    In order: a Ray that this process is connected to already; RAY_ADDRESS (set inside submitted jobs) or
    `resources.address`; else a new local Ray without dashboard, which ends with the block. Raises ConfigError when
    there is no Ray at the address.
    """
    address = os.environ.get("RAY_ADDRESS") or resources.address
    if not address:  # the network port of a local Ray is this machine's own; Ray would ask its children for a token
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")

    import ray  # here, because `spct plan` imports this file, but never Ray

    if ray.is_initialized():
        yield
        return
    environment: dict[str, Any] = {"worker_process_setup_hook": "spct_ray.cluster.session.exit_with_raylet"}
    if address:
        environment["env_vars"] = {name: os.environ[name] for name in ENVIRONMENT}
        try:
            ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level="WARNING")
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster answers at {address!r} ({error}). Start one there (`ray start --head`), or unset "
                "RAY_ADDRESS and resources.cluster.address to start Ray on this machine"
            ) from error
    else:
        gib = resources.object_store_gib
        _start_local(
            num_cpus=resources.num_cpus,
            object_store_memory=None if gib is None else int(gib * 2**30),
            include_dashboard=False,
            runtime_env=environment,
            log_to_driver=False,
            logging_level="WARNING",
        )
    try:
        yield
    finally:
        ray.shutdown()  # a cluster that was there before goes on


def _start_local(**options: Any) -> None:
    """A new Ray on this machine. Ray gives its own processes 30 s to start, too few on a busy machine: so try again.

    Its workers keep this process's niceness. By default Ray adds 15, and then whatever else wakes up on a core, Ray's
    own processes among it, stops an engine's thread at once, and with it all those that wait for that thread.
    Raises SpctError after the third time.
    """
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    for _ in range(3):
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:  # Ray raises no class of its own here
            if "timed out during startup" not in str(error):
                raise
            last = error
            ray.shutdown()  # what is left of the attempt ends with this process at the latest
    raise SpctError(
        "Ray did not start on this machine within 30 s, three times; end other work or free memory, and try again"
    ) from last


def nodes() -> Nodes:
    """What Ray counts on each living node of the connected cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@contextlib.contextmanager
def waiting_for_room(resources: ClusterResources, say: Callable[[str], None]) -> Iterator[None]:
    """Let a ConfigError of the body, for what has no room, pass where Ray is this machine alone. A cluster may grow or
    be in use by others: there `say` it, and go on."""
    try:
        yield
    except ConfigError as error:
        if is_local(resources):
            raise
        say(f"Ray has no room now, and is waited for: {error}")


def exit_with_raylet() -> None:
    """Called by Ray in each worker process: end it when its raylet is gone.

    Ray lets a busy worker finish its call first, so after the death of a node or of a local driver its orphans would
    go on writing beside the resumed run.
    """
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="exit-with-raylet", daemon=True).start()
