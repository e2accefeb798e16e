"""Engines as Ray actors, used like one: for rollouts, and for the judges of sampling and evaluation.

Ray replaces an engine that dies and sends its calls again. A call names the weights that it is for, so that a new
engine loads the newest before it answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.engines.base import Engine, EngineConfig, EngineResources, Request, Weights
from spct_ray.engines.host import EngineHost, JudgeSpec
from spct_ray.errors import EngineError, RequestError
from spct_ray.judge.judge import Judge, JudgeTask
from spct_ray.records import Completion, Trajectory

if TYPE_CHECKING:
    from spct_ray.engines.checksums import HeldTensor

BACKGROUND_NICENESS = 10
MAX_RESTARTS = 3  # of one engine; work that kills every engine must not be tried for ever
_BLOCKS_IN_FLIGHT = 2  # per engine: the next block joins the batch while the last sequences of the one before run out
_START_TIMEOUT_S, _EXIT_TIMEOUT_S = 1800.0, 20.0
_SAVING = {  # what a model directory says of how it was saved, not of what it computes
    "config.json": ("dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    "tokenizer_config.json": ("is_local", "local_files_only", "name_or_path", "tokenizer_file"),
}

MakeEngine = Callable[[str, EngineConfig], Engine]


def vllm_engine(model: str, config: EngineConfig) -> Engine:
    """The default engine of a pool; vLLM is imported where the engine runs, not in the driver."""
    from spct_ray.engines.vllm import VllmEngine

    return VllmEngine(model, config)


def background_engine(model: str, config: EngineConfig) -> Engine:
    """The default engine, yielding its cores to other processes: a training beside it is waited for, it is not."""
    os.nice(BACKGROUND_NICENESS)  # of this thread, and of those that it starts
    return vllm_engine(model, config)


class EngineActor(EngineHost):
    """A host in a process of its own, which ends with its engine."""

    def __init__(self, make_engine: MakeEngine, model: str, config: EngineConfig) -> None:
        self._num_lent = 0
        try:
            engine = make_engine(model, config)
        except EngineError as error:
            # One that does not start in place of a dead one is tried again: its workers may still hold the GPUs.
            if ray.get_runtime_context().was_current_actor_reconstructed:
                self.engine_died(error)
            raise
        super().__init__(engine, model)

    def next_number(self) -> int:
        """0, 1, 2, ... by which callers share out the pool's engines among them."""
        self._num_lent += 1
        return self._num_lent - 1

    def engine_died(self, error: EngineError) -> None:
        """End the process with the cause as its last words, which Ray repeats when it has no restarts left."""
        last_resort = threading.Timer(_EXIT_TIMEOUT_S, os._exit, (1,))  # what a dead engine left may not end in order
        last_resort.daemon = True
        last_resort.start()
        sys.exit(" ".join(str(error).split()))


class EnginePool:
    """`num_replicas` engines on one model, used like one. For one caller at a time; it pickles.

    An engine that dies (its process, its node, or vLLM in it) is replaced up to `max_restarts` times, and what it had
    not finished is done again; after that every call raises EngineError with the cause. Sampling with a seed makes a
    redone block equal to the lost one, up to the rounding differences of another batch.
    """

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        resources: EngineResources,
        make_engine: MakeEngine = vllm_engine,
        max_restarts: int = MAX_RESTARTS,
    ) -> None:
        self._model, self._config, self._resources, self._max_restarts = model, config, resources, max_restarts
        self.weights = Weights(model)
        actor = ray.remote(EngineActor).options(
            num_cpus=resources.cpus_per_replica,
            num_gpus=resources.gpus_per_replica,
            scheduling_strategy="SPREAD",  # engines that ask for no CPU would all find room on one node
            max_concurrency=_BLOCKS_IN_FLIGHT,
            max_restarts=max_restarts,
            max_task_retries=max_restarts,
        )
        self.actors = [actor.remote(make_engine, model, config) for _ in range(resources.num_replicas)]
        try:
            self.reload(model, 0)
        except EngineError:
            self._kill()
            raise

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
        """Give all engines these weights. `weights_dir` must stay readable on every node until the next reload."""
        self.weights = Weights(weights_dir, weight_version)
        self.get([actor.load.remote(self.weights) for actor in self.actors])

    def transfer(self, method: str, info_of: Callable[[int], dict[str, Any] | None], weight_version: int) -> None:
        """A step of vLLM's weight transfer on all engines, with `info_of` each one's number."""
        self._on_each("transfer", lambda number: (method, info_of(number), weight_version))

    def held_tensors(self, names: Sequence[str]) -> list[list[list[HeldTensor]]]:
        """What each worker of each engine holds, see `VllmEngine.held_tensors`."""
        return self._on_each("held_tensors", lambda _: (names,))

    def sleep(self) -> None:
        """See `VllmEngine.sleep`."""
        self._on_each("sleep")

    def wake(self) -> None:
        """See `VllmEngine.wake`."""
        self._on_each("wake")

    def judge_maker(self, spec: JudgeSpec) -> Callable[[], Judge]:
        """A picklable function that makes a judge on the weights of now; each call takes the next engine."""
        return partial(_PoolJudge, self, spec)

    def close(self) -> None:
        """Stop all engines."""
        refs = [actor.call.options(max_task_retries=0).remote(self.weights, "close") for actor in self.actors]
        ray.wait(refs, num_returns=len(refs), timeout=30)
        self._kill()

    def _kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def get(self, refs: Any) -> Any:
        """What calls of actors give, or raise. EngineError for one that died for good or does not answer."""
        try:
            return ray.get(refs, timeout=_START_TIMEOUT_S)
        except RayActorError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            what = " ".join(dict.fromkeys((lines[0], lines[-1])))  # between them, a remote traceback
            if error.actor_init_failed:
                raise EngineError(f"an engine on {self._model} does not start: {what}") from error
            raise EngineError(
                f"an engine on {self._model} died again after {self._max_restarts} restarts: {what}"
            ) from error
        except GetTimeoutError as error:
            raise EngineError(
                f"an engine on {self._model} did not answer in {_START_TIMEOUT_S:.0f} s; each wants {self._resources}, "
                f"free in the cluster are {ray.available_resources()}"
            ) from error

    def _on_each(self, method: str, arguments_of: Callable[[int], tuple[Any, ...]] = lambda _: ()) -> list[Any]:
        calls = [a.call.remote(self.weights, method, *arguments_of(i)) for i, a in enumerate(self.actors)]
        return self.get(calls)  # type: ignore[no-any-return]

    def _blocks(self, groups: Iterable[list[int]], sizes: Sequence[int]) -> list[list[int]]:
        """Indices in blocks that give each engine some, members of a group (equal prompts) side by side."""
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
        """Results of all inputs, in order: blocks go to engines as these become free."""
        waiting, free = deque(blocks), deque(self.actors * _BLOCKS_IN_FLIGHT)
        running: dict[Any, tuple[Any, list[int]]] = {}
        results: list[Any] = [None] * len(inputs)
        refused: RequestError | None = None
        while waiting or running:
            while waiting and free:
                actor, block = free.popleft(), waiting.popleft()
                running[actor.call.remote(self.weights, method, [inputs[i] for i in block])] = actor, block
            (ref,), _ = ray.wait(list(running))
            actor, block = running.pop(ref)
            free.append(actor)
            try:
                for index, output in zip(block, self.get(ref), strict=True):
                    results[index] = output
            except RequestError as error:
                refused = error
                waiting.clear()
        if refused is not None:
            raise RequestError(str(getattr(refused, "cause", refused)))  # without the remote traceback
        return results


@dataclass
class _PoolJudge:
    """A judge on one of the pool's engines. Raises EngineError where that died for good."""

    pool: EnginePool
    spec: JudgeSpec

    def __post_init__(self) -> None:
        actors = self.pool.actors
        self._actor = actors[ray.get(actors[0].next_number.remote()) % len(actors)]

    def judge(self, tasks: Sequence[JudgeTask]) -> list[Trajectory]:
        reply = self._actor.judge_block.remote(self.pool.weights, self.spec, tasks)
        return self.pool.get(reply)  # type: ignore[no-any-return]


_kept: list[tuple[Any, EnginePool]] = []  # at most one, of this process


def judge_pool(
    model: str, resources: SamplingResources, say: Callable[[str], None], make_engine: MakeEngine = vllm_engine
) -> EnginePool:
    """Engines for judges on `model`, which this process keeps: where they can take the weights of the next one's
    model, they need not start again (half a minute, in place of a second). `say` is told which it was.

    They hold the GPUs but no CPUs: those are for the Ray Data actors that send them blocks.
    """
    kind = family(model), resources
    if _kept and _kept[0][0] == kind:
        say("loads its weights into the engines of the judge before")
        _kept[0][1].reload(model, 0)
        return _kept[0][1]
    say("starts engines anew, as another model or other resources were asked for" if _kept else "starts engines")
    close_judge_pool()
    threads = resources.engine.threads or max(1, int(resources.cpus_per_replica))  # Ray gives an actor without CPUs one
    where = EngineResources(resources.num_replicas, 0, resources.gpus_per_replica or 0.0)
    pool = EnginePool(model, replace(resources.engine, threads=threads), where, make_engine)
    _kept.append((kind, pool))
    return pool


def close_judge_pool() -> None:
    """Stop the engines that this process keeps, if there are any."""
    while _kept:
        _kept.pop()[1].close()


def family(model: str) -> str:
    """Digest of a model directory's architecture and tokenizer: an engine takes the weights of models that share it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, ignored in _SAVING.items():
        file = Path(model, name)
        values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        computed = {key: value for key, value in values.items() if key not in ignored}
        digest.update(json.dumps(computed, sort_keys=True).encode())
    for pattern in ("tokenizer.json", "*.jinja", "*.model"):
        for file in sorted(Path(model).glob(pattern)):
            digest.update(file.name.encode() + hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()
