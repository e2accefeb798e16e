"""How many GPUs a process asks Ray for, and whether nodes have room for all that is asked. Arithmetic; loads no Ray.

A process that asks for none sees none, see `cluster.session.ENVIRONMENT`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spct_ray.errors import ConfigError

Nodes = Sequence[Mapping[str, float]]  # what Ray counts on each living node, e.g. {"CPU": 64.0, "GPU": 8.0}

_EPSILON = 1e-6  # Ray counts in steps of 1e-4


def gpus_of(asked: float | None, needed: int, nodes: Nodes) -> float:
    """GPUs of one process: those `asked` for or, where that is left open (None), the `needed` ones on a cluster that
    has GPUs and none on one that has not."""
    if asked is not None:
        return asked
    return float(needed) if any(node.get("GPU", 0.0) for node in nodes) else 0.0


def check_engine(gpus: float | None, tensor_parallel: int, memory_share: float) -> None:
    """Raise ConfigError unless an engine on `tensor_parallel` GPUs can run with so many GPUs (None: left open).

    One that is not divided may also run on CPUs, or share a GPU with others, of whose memory it then takes no larger
    part than of the GPU.
    """
    if gpus is not None and 0 < gpus < min(1.0, memory_share):
        raise ConfigError(
            f"an engine on {gpus:g} of a GPU would take {memory_share:g} of its memory: lower gpu_memory_utilization"
        )
    if gpus is None or gpus == tensor_parallel or (tensor_parallel == 1 and 0 <= gpus < 1):
        return
    raise ConfigError(
        f"an engine with tensor_parallel {tensor_parallel} takes {tensor_parallel} GPUs, but {gpus:g} are asked for"
        + ("; where there are no GPUs, tensor_parallel is 1" if gpus == 0 else "")
    )


def check_room(cpus: Mapping[str, float], gpus: Mapping[str, Sequence[float]], nodes: Nodes, advice: str) -> None:
    """Raise ConfigError, with numbers and `advice`, where the nodes have no room for all at once.

    `cpus` are the sums, and `gpus` those of each process, by a name. The GPUs of one process are on one node, and a
    part of a GPU is part of one.
    """
    total = sum(node.get("CPU", 0.0) for node in nodes)
    if sum(cpus.values()) > total + _EPSILON:
        asked = ", ".join(f"{name} {number:g}" for name, number in cpus.items() if number)
        raise ConfigError(f"{sum(cpus.values()):g} CPUs are asked for ({asked}), and there are {total:g}: {advice}")
    if _fit([size for sizes in gpus.values() for size in sizes], [node.get("GPU", 0.0) for node in nodes]):
        return
    asked = ", ".join(f"{name} {_counted(sizes)}" for name, sizes in gpus.items() if sum(sizes))
    there = " + ".join(f"{node['GPU']:g}" for node in nodes if node.get("GPU")) or "none"
    raise ConfigError(
        f"{sum(map(sum, gpus.values())):g} GPUs are asked for ({asked}; those of one process on one node), and there "
        f"are {there}{' on the nodes' if '+' in there else ''}: {advice}"
    )


def _counted(sizes: Sequence[float]) -> str:
    """`2 x 4 + 1` of [4, 4, 1]."""
    numbers = {size: sizes.count(size) for size in sizes if size}
    return " + ".join(f"{number} x {size:g}" if number > 1 else f"{size:g}" for size, number in numbers.items())


def _fit(sizes: Sequence[float], nodes: Sequence[float]) -> bool:
    """Whether all find a place, the largest first, each where the least is left that is enough."""
    free, shared = list(nodes), list[float]()  # GPUs of a node; what is left of one that processes share
    for size in sorted(filter(None, sizes), reverse=True):
        place = next((i for i, left in enumerate(shared) if size < 1 and size <= left + _EPSILON), None)
        if place is not None:
            shared[place] -= size
            continue
        whole = max(size, 1.0)
        enough = [i for i, left in enumerate(free) if whole <= left + _EPSILON]
        if not enough:
            return False
        free[min(enough, key=free.__getitem__)] -= whole
        if size < 1:
            shared.append(1 - size)
    return True
