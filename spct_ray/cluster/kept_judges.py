"""Judges on engines that outlive a step: the next judge's weights go into the same engines, which need not start again.

An engine takes half a minute to start and a second to reload, and judges are evaluated one after the other. The engines
live in actors that the run's keeper owns (`graph.keeper`); the judge in a sampling actor only sends its blocks there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.exceptions import RayActorError

from spct_ray.cluster.pool import MakeEngine, vllm_engine
from spct_ray.cluster.sampling import MAX_RESTARTS
from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.engines.base import Engine, EngineConfig
from spct_ray.engines.engine_judge import EngineJudge
from spct_ray.errors import EngineError
from spct_ray.judge.judge import Judge, JudgeTask
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Trajectory

_SAVING = {  # what a model directory says of how it was saved, not of what it computes
    "config.json": ("dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    "tokenizer_config.json": ("is_local", "local_files_only", "name_or_path", "tokenizer_file"),
}
_SAID = {  # by what the keeper had
    "nothing": "starts engines",
    "the same": "loads its weights into the engines of the judge before",
    "another kind": "starts engines anew: its architecture or tokenizer is not that of the judge before",
}


@dataclass(frozen=True)
class JudgeSpec:
    """A judge: the model's directory, the prompt, its name in trajectories, and whether it judges in chunks."""

    model: str
    prompt: JudgeConfig
    name: str
    in_chunks: bool = False


class JudgeHost:
    """One engine in a process of its own, that judges for one spec after the other.

    Every call says for which. Where the engine dies, so does the process: Ray starts another and sends the call again,
    which starts an engine on the model that it names.
    """

    def __init__(self, engine: EngineConfig, make_engine: MakeEngine = vllm_engine) -> None:
        self._config, self._make_engine = engine, make_engine
        self._engine: Engine | None = None
        self._spec: JudgeSpec | None = None
        self._judge: EngineJudge | None = None

    def load(self, spec: JudgeSpec) -> None:
        """Become the judge of `spec`: the first one's engine is started, later ones' weights are loaded into it (and
        count as version 0, like those of an engine of their own). Raises ConfigError and EngineError when none starts.
        """
        if self._engine is None:
            self._engine = self._make_engine(spec.model, self._config)
        elif self._spec is not None and self._spec.model != spec.model:
            try:
                self._engine.reload(spec.model, weight_version=0)
            except EngineError as error:
                _die(error)
        if self._spec != spec:
            self._judge = EngineJudge(self._engine, spec.prompt, spec.name, in_chunks=spec.in_chunks)
        self._spec = spec

    def judge(self, spec: JudgeSpec, tasks: Sequence[JudgeTask]) -> list[Trajectory]:
        """One trajectory a task, in order."""
        self.load(spec)
        assert self._judge is not None
        try:
            return self._judge.judge(tasks)
        except EngineError as error:
            _die(error)


def _die(error: EngineError) -> NoReturn:
    print(f"judge engine died, its process is replaced: {error}", flush=True)
    os._exit(1)


class KeptJudge:
    """Judges on one of the hosts that are kept under `name`. Raises EngineError where that died for good."""

    def __init__(self, name: str, keeper: Any, spec: JudgeSpec) -> None:
        self._host, self._spec = ray.get(keeper.lend.remote(name)), spec
        self._ask("load")  # so that no time of judging is spent on it

    def judge(self, tasks: Sequence[JudgeTask]) -> list[Trajectory]:
        return self._ask("judge", tasks)  # type: ignore[no-any-return]

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self._host, method).remote(self._spec, *arguments))
        except RayActorError as error:
            raise EngineError(f"the engine of {self._spec.name} died more than {MAX_RESTARTS} times") from error


def keep_judges(
    keeper: Any,
    name: str,
    spec: JudgeSpec,
    resources: SamplingResources,
    say: Callable[[str], None],
    make_engine: MakeEngine = vllm_engine,
) -> Callable[[], Judge]:
    """Have `keeper` keep hosts for `spec` under a name; returns a picklable function that makes its judge.

    Hosts of another architecture or tokenizer are ended and new ones made; `say` is told which it was.
    """
    found = ray.get(keeper.keep.remote(name, family(spec.model), partial(_make_hosts, resources, make_engine)))
    say(_SAID[found])
    return partial(KeptJudge, name, keeper, spec)


def family(model: str) -> str:
    """Digest of a model directory's architecture and tokenizer: an engine takes the weights of models that share it."""
    found = hashlib.blake2b(digest_size=16)
    for name, ignored in _SAVING.items():
        file = Path(model, name)
        values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        kept = {key: value for key, value in values.items() if key not in ignored}
        found.update(json.dumps(kept, sort_keys=True).encode())
    for pattern in ("tokenizer.json", "*.jinja", "*.model"):
        for file in sorted(Path(model).glob(pattern)):
            found.update(file.name.encode() + hashlib.blake2b(file.read_bytes()).digest())
    return found.hexdigest()


def _make_hosts(resources: SamplingResources, make_engine: MakeEngine) -> list[Any]:
    """Hosts hold the GPUs, but no CPUs: those are held by the sampling actors that send them blocks, and so are free
    between two steps (Ray Data needs one to begin)."""
    host = ray.remote(JudgeHost).options(
        num_cpus=0,
        num_gpus=resources.gpus_per_replica,
        scheduling_strategy="SPREAD",
        max_restarts=MAX_RESTARTS,
        max_task_retries=MAX_RESTARTS,
    )
    threads = resources.engine.threads or max(1, int(resources.cpus_per_replica))  # Ray gives an actor without CPUs one
    engine = replace(resources.engine, threads=threads)
    return [host.remote(engine, make_engine) for _ in range(resources.num_replicas)]
