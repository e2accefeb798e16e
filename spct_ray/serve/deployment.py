"""The configuration of the service: what is served, on which resources, and how a finished run determines both."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from spct_ray.cluster.session import ClusterResources
from spct_ray.config import load, override, rebuild
from spct_ray.engines.base import EngineConfig
from spct_ray.errors import ConfigError
from spct_ray.graph.targets import Target, find_judge, parse_target
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.judge.vote import MetaVote
from spct_ray.placement import Nodes, check_engine, check_room, gpus_of

_META_CPUS = 0.5
_ADVICE = (
    "lower resources.*.num_gpus, num_cpus or min_replicas, or name a larger cluster. A judge and a meta RM share one "
    "GPU with resources.judge.num_gpus=0.7 resources.meta.num_gpus=0.3 resources.engine.gpu_memory_utilization=0.65"
)


@dataclass(frozen=True)
class ReplicaConfig:
    """One deployment: how many replicas, what each asks of Ray, how many requests it takes and holds in line."""

    min_replicas: int = 1  # 0: none while nobody asks; the first request then waits for one to start
    max_replicas: int = 1
    target_ongoing_requests: float = 8.0  # the autoscaler adds replicas above this mean
    upscale_delay_s: float = 30.0  # how long it must stay above; also the averaging window, within 1 to 30 s
    downscale_delay_s: float = 600.0  # how long it must stay below
    max_ongoing_requests: int = 32  # per replica
    max_queued_requests: int = 64  # beyond this a request is answered 503
    num_cpus: float = 1.0
    num_gpus: float | None = None  # null: what its model needs, on a cluster with GPUs


@dataclass(frozen=True)
class ServeResources:
    """Where it runs. `host` is the loopback unless told otherwise.

    Where `num_gpus` is null, a judge takes its engine's `tensor_parallel` and a meta RM one; on a cluster without GPUs
    they take none. ConfigError where the judge's `num_gpus` is another number of GPUs.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    gateway: ReplicaConfig = field(
        default_factory=lambda: ReplicaConfig(
            num_cpus=0.1, num_gpus=0.0, max_ongoing_requests=128, max_queued_requests=256
        )
    )
    judge: ReplicaConfig = field(default_factory=ReplicaConfig)
    meta: ReplicaConfig = field(default_factory=lambda: ReplicaConfig(num_cpus=_META_CPUS))  # all three fit two cores
    engine: EngineConfig = field(default_factory=EngineConfig)
    cluster: ClusterResources = field(default_factory=ClusterResources)

    def __post_init__(self) -> None:
        check_engine(self.judge.num_gpus, self.engine.tensor_parallel, self.engine.gpu_memory_utilization)

    def on(self, nodes: Nodes) -> ServeResources:
        """The same with each `num_gpus` a number. Raises ConfigError where the judge's engine cannot run with it."""

        def filled(replicas: ReplicaConfig, needed: int) -> ReplicaConfig:
            return replace(replicas, num_gpus=gpus_of(replicas.num_gpus, needed, nodes))

        return replace(self, judge=filled(self.judge, self.engine.tensor_parallel), meta=filled(self.meta, 1))

    def check_room(self, nodes: Nodes, meta: bool) -> None:
        """Raise ConfigError where the nodes have no room for the least number of replicas, or for one where that is 0.
        Every `num_gpus` is a number."""
        replicas = {"gateway": self.gateway, "judge": self.judge} | ({"meta": self.meta} if meta else {})
        num = {name: max(1, r.min_replicas) for name, r in replicas.items()}
        cpus = {name: num[name] * r.num_cpus for name, r in replicas.items()}
        gpus = {name: [r.num_gpus or 0.0] * num[name] for name, r in replicas.items()}
        check_room(cpus, gpus, nodes, _ADVICE)


@dataclass(frozen=True)
class ServeConfig:
    """The judge (and the meta RM that guides its votes), as model directories with safetensors and a tokenizer."""

    judge_model: str
    meta_model: str | None = None
    name: str = "judge"  # stamped on answers
    judge: JudgeConfig = field(default_factory=lambda: JudgeConfig(single="scale"))
    temperature: float = 0.5  # paper: 0.5 for voting
    guided: bool = False  # hold judgements to the format by structured output
    judge_timeout_s: float = 120.0  # a request that takes longer is answered 504
    meta_timeout_s: float = 10.0  # without logits by then, the vote is plain
    meta_vote: MetaVote = "best"  # sum the best half, or all samples weighted by their chance to be right
    k_auto_max: int = 32  # most samples of an adaptive k
    k_auto_error: float = 0.01  # share of its decisions that may differ from those of the vote over `k_auto_max`
    max_cohort: int = 8  # responses in one prompt where many are scored (rerank, reward); more are judged in chunks
    principles_cache: int = 1024  # queries whose generated principles are kept (`principles: auto`)
    max_body_bytes: int = 4 * 2**20
    api_key_env: str = ""  # environment variable with the API keys, space-separated; empty: no key is required
    judgements_per_minute: int = 0  # of each API key (without keys: each client address), beyond: 429; 0: no limit
    resources: ServeResources = field(default_factory=ServeResources)

    def __post_init__(self) -> None:
        for name in ("judgements_per_minute", "principles_cache"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.judge.mode != "list":
            raise ConfigError(
                f"judge.mode {self.judge.mode!r} cannot be served: the server judges in mode 'list', and a request may "
                "bring a reference and principles. `spct evaluate` knows all modes"
            )


def resolve(target: str, overrides: Sequence[str] = ()) -> ServeConfig:
    """What `target` says to serve: a YAML file of a ServeConfig, RUN, RUN:rft, or a model directory; with
    `key=value` overrides of ServeConfig's fields."""
    if target.endswith((".yaml", ".yml")):
        return load(ServeConfig, target, overrides)
    meant = parse_target(target)
    return override(from_model(target) if meant.model else from_run(meant), overrides)


def from_run(target: Target) -> ServeConfig:
    """A run's judge (GRPO, else RFT) as its newest evaluation used it, with the meta RM that scored that evaluation.

    Engine and GPUs are those of its evaluation, and of the meta RM's scoring; what ran on CPUs is left to the cluster.

    Raises ConfigError when the run has no finished evaluation of it.
    """
    found = find_judge(target, ("grpo", "rft"))
    evaluated, file = found.evaluation, f"{found.directory}/record.json"
    prompt = rebuild(JudgeConfig, evaluated.config["judge"], f"{file}: config.judge")
    meta_gpus = found.scores.resources["gpus_per_replica"] if found.scores else None
    return ServeConfig(
        judge_model=os.path.join(found.judge_model, "model"),
        meta_model=os.path.join(found.meta_model, "model") if found.meta_model else None,
        name=evaluated.inputs["judge"]["step"],
        judge=replace(prompt, single=evaluated.config["single"]),
        temperature=evaluated.config["temperature"],
        resources=ServeResources(
            judge=ReplicaConfig(num_gpus=evaluated.resources["gpus_per_replica"] or None),
            meta=ReplicaConfig(num_cpus=_META_CPUS, num_gpus=meta_gpus or None),
            engine=rebuild(EngineConfig, evaluated.resources["engine"], f"{file}: resources.engine"),
        ),
    )


def from_model(directory: str) -> ServeConfig:
    """A judge from a model directory alone: the full prompt, no meta RM, half of a short context for the judgement."""
    model = os.path.abspath(directory)
    engine = EngineConfig.of_model(model)
    return ServeConfig(
        judge_model=model,
        name=os.path.basename(model),
        judge=JudgeConfig(single="scale", max_tokens=min(JudgeConfig.max_tokens, engine.max_model_len // 2)),
        resources=ServeResources(engine=engine),
    )
