"""Engines as Ray actors: work is shared out over the replicas, and a dead one is replaced and its work done again.

Leaves out what an engine is (`spct_ray.engines`) and how its weights come about (`spct_ray.cluster.sync`).
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from spct_ray.engines.base import Engine, EngineConfig, EngineResources, Request
from spct_ray.errors import EngineError, RequestError
from spct_ray.records import Completion

if TYPE_CHECKING:
    from spct_ray.engines.checksums import HeldTensor

_logger = logging.getLogger(__name__)
_BLOCKS_IN_FLIGHT = 2  # a replica: the next block joins the batch while the last sequences of the one before run out
_START_TIMEOUT_S = 1800.0

MakeEngine = Callable[[str, EngineConfig], Engine]


def vllm_engine(model_dir: str, config: EngineConfig) -> Engine:
    """The default engine of a pool; vLLM is imported where the engine runs, not in the driver."""
    from spct_ray.engines.vllm import VllmEngine

    return VllmEngine(model_dir, config)


class EngineHost:
    """One engine in its own process, with the newest weights from its first moment on."""

    def __init__(
        self, make_engine: MakeEngine, model_dir: str, config: EngineConfig, weights: tuple[str, int] | None
    ) -> None:
        self._engine: Any = make_engine(model_dir, config)
        if weights is not None:
            self._engine.reload(*weights)

    def ready(self) -> None:
        """Returns when the engine has started."""

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        return self._engine.generate(requests)  # type: ignore[no-any-return]

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self._engine.prompt_logprobs(sequences)  # type: ignore[no-any-return]

    def reload(self, weights_dir: str, weight_version: int) -> None:
        self._engine.reload(weights_dir, weight_version)

    def transfer(self, method: str, info: dict[str, Any] | None, weight_version: int) -> None:
        self._engine.transfer(method, info, weight_version)

    def held_tensors(self, names: Sequence[str]) -> list[list[HeldTensor]]:
        return self._engine.held_tensors(names)  # type: ignore[no-any-return]

    def sleep(self) -> None:
        self._engine.sleep()

    def wake(self) -> None:
        self._engine.wake()

    def close(self) -> None:
        self._engine.close()


EngineActor = ray.remote(EngineHost)


@dataclass(slots=True)
class _Replica:
    actor: Any
    num_restarts: int = 0


class EnginePool:
    """`num_replicas` engines on one model, used like one. For one caller at a time; it pickles.

    A replica that dies (its process, its node, or vLLM in it) is replaced up to `max_restarts` times, the new one
    gets the newest weights, and only the blocks that the dead one had not finished are done again. After that
    EngineError names the cause. Sampling with a seed makes a redone block equal to the lost one, up to the rounding
    differences of another batch.
    """

    def __init__(
        self,
        model_dir: str,
        config: EngineConfig,
        resources: EngineResources,
        make_engine: MakeEngine = vllm_engine,
        max_restarts: int = 3,
    ) -> None:
        self._model_dir = model_dir
        self._config = config
        self._resources = resources
        self._make_engine = make_engine
        self._max_restarts = max_restarts
        self._weights: tuple[str, int] | None = None
        self._replicas = [_Replica(self._start()) for _ in range(resources.num_replicas)]
        try:
            self._on_each("ready")
        except EngineError:
            self._kill()
            raise

    @property
    def weight_version(self) -> int:
        """Version of the weights that `reload` gave last; 0 for those of the model directory."""
        return self._weights[1] if self._weights else 0

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        """Completions of all requests, in order. RequestError when an engine refuses one of them."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[request.messages].append(index)
        blocks = self._blocks(groups.values(), [request.params.n for request in requests])
        return self._work("generate", requests, blocks)

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """As `Engine.prompt_logprobs`."""
        indices = range(len(sequences))
        return self._work("prompt_logprobs", sequences, self._blocks(([i] for i in indices), [1 for _ in indices]))

    def reload(self, weights_dir: str, weight_version: int) -> None:
        """Give all replicas these weights. `weights_dir` must stay readable on every node until the next reload."""
        self._weights = (weights_dir, weight_version)
        self._on_each("reload", weights_dir, weight_version)

    def transfer(self, method: str, info_of: Callable[[int], dict[str, Any] | None], weight_version: int) -> None:
        """A step of vLLM's weight transfer on all replicas, with `info_of` each one's number."""
        calls = [
            replica.actor.transfer.remote(method, info_of(number), weight_version)
            for number, replica in enumerate(self._replicas)
        ]
        self._finish("transfer", list(zip(self._replicas, calls, strict=True)))

    def held_tensors(self, names: Sequence[str]) -> list[list[list[HeldTensor]]]:
        """What each worker of each replica holds, see `VllmEngine.held_tensors`."""
        return self._on_each("held_tensors", names, again=True)

    def sleep(self) -> None:
        """See `VllmEngine.sleep`."""
        self._on_each("sleep")

    def wake(self) -> None:
        """See `VllmEngine.wake`."""
        self._on_each("wake")

    def close(self) -> None:
        """Stop all replicas."""
        refs = [replica.actor.close.remote() for replica in self._replicas]
        ray.wait(refs, num_returns=len(refs), timeout=30)
        self._kill()

    def _kill(self) -> None:
        for replica in self._replicas:
            ray.kill(replica.actor)

    def _start(self) -> Any:
        return EngineActor.options(
            num_cpus=self._resources.cpus_per_replica,
            num_gpus=self._resources.gpus_per_replica,
            max_concurrency=_BLOCKS_IN_FLIGHT,
        ).remote(self._make_engine, self._model_dir, self._config, self._weights)

    def _replace(self, replica: _Replica, cause: Exception) -> None:
        number, what = self._replicas.index(replica), _what_happened(cause)
        ray.kill(replica.actor)  # where only the engine died, its process still holds CPUs and memory
        # A replacement that does not start is tried again: a dead engine's workers may hold the GPUs a moment more.
        if isinstance(cause, RayActorError) and cause.actor_init_failed and not replica.num_restarts:
            raise EngineError(f"an engine on {self._model_dir} does not start: {what}") from cause
        if replica.num_restarts == self._max_restarts:
            raise EngineError(
                f"engine replica {number} on {self._model_dir} died again after {self._max_restarts} restarts: {what}"
            ) from cause
        replica.num_restarts += 1
        _logger.warning(
            "engine replica %d died and is replaced (restart %d of %d): %s",
            number,
            replica.num_restarts,
            self._max_restarts,
            what,
        )
        replica.actor = self._start()

    def _blocks(self, groups: Iterable[list[int]], sizes: Sequence[int]) -> list[list[int]]:
        """Indices in blocks that give each replica some, members of a group (equal prompts) side by side."""
        shares = self._resources.num_replicas * _BLOCKS_IN_FLIGHT
        limit = min(self._config.num_seqs(self._resources.gpus_per_replica > 0), -(-sum(sizes) // shares))
        blocks: list[list[int]] = [[]]
        size = 0
        for group in groups:
            if size and size + sum(sizes[i] for i in group) > limit:
                blocks.append([])
                size = 0
            for index in group:
                if size and size + sizes[index] > limit:
                    blocks.append([])
                    size = 0
                blocks[-1].append(index)
                size += sizes[index]
        return [block for block in blocks if block]

    def _work(self, method: str, inputs: Sequence[Any], blocks: list[list[int]]) -> list[Any]:
        """Results of all inputs, in order: blocks go to replicas as these become free."""
        waiting = deque(blocks)
        running: dict[Any, tuple[_Replica, list[int]]] = {}
        results: list[Any] = [None] * len(inputs)
        refused: RequestError | None = None
        while running or (waiting and refused is None):
            for replica in self._replicas * _BLOCKS_IN_FLIGHT:
                in_flight = sum(busy is replica for busy, _ in running.values())
                if waiting and refused is None and in_flight < _BLOCKS_IN_FLIGHT:
                    block = waiting.popleft()
                    ref = getattr(replica.actor, method).remote([inputs[i] for i in block])
                    running[ref] = replica, block
            (ref,), _ = ray.wait(list(running))
            replica, block = running[ref]
            try:
                outputs = ray.get(ref)
            except RequestError as error:
                refused = RequestError(_what_happened(error))
            except (EngineError, RayActorError) as error:
                lost = [r for r, (busy, _) in running.items() if busy is replica]
                waiting.extendleft(running.pop(r)[1] for r in lost)
                self._replace(replica, error)
                continue
            else:
                for index, output in zip(block, outputs, strict=True):
                    results[index] = output
            del running[ref]
        if refused is not None:
            raise refused
        return results

    def _on_each(self, method: str, *arguments: Any, again: bool = False) -> list[Any]:
        """Call `method` on all replicas at once. One that is new is asked `again`, or starts with all it needs."""
        running = [(r, getattr(r.actor, method).remote(*arguments)) for r in self._replicas]
        return self._finish(method, running, (method, *arguments) if again else ("ready",))

    def _finish(
        self, method: str, running: list[tuple[_Replica, Any]], to_new: tuple[Any, ...] = ("ready",)
    ) -> list[Any]:
        """Each replica's result; one that dies is replaced, and its successor asked for what `to_new` says."""
        results: dict[int, Any] = {}
        while running:
            replica, ref = running.pop(0)
            try:
                results[self._replicas.index(replica)] = ray.get(ref, timeout=_START_TIMEOUT_S)
            except (EngineError, RayActorError) as error:
                self._replace(replica, error)
                running.append((replica, getattr(replica.actor, to_new[0]).remote(*to_new[1:])))
            except GetTimeoutError as error:
                raise EngineError(
                    f"engine replica {self._replicas.index(replica)} on {self._model_dir} did not answer `{method}` in "
                    f"{_START_TIMEOUT_S:.0f} s; each replica wants {self._resources}, free in the cluster are "
                    f"{ray.available_resources()}"
                ) from error
        return [results[number] for number in sorted(results)]


def _what_happened(error: Exception) -> str:
    """What an EngineError says, or Ray about the death of an actor, without the remote traceback."""
    if isinstance(error, RayTaskError):
        return str(error.cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:1] + lines[-1:]) if len(lines) > 1 else str(error)
