"""What is served and with which resources, and how to find both in a finished run. Leaves out starting anything."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spct_ray.engines.base import EngineConfig
from spct_ray.errors import ConfigError
from spct_ray.judge.prompt import JudgeConfig


@dataclass(frozen=True)
class ReplicaConfig:
    """One deployment: how many replicas, what each asks of Ray, how many requests it takes and holds in line."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 8.0  # the autoscaler adds replicas above this mean
    max_ongoing_requests: int = 32  # a replica
    max_queued_requests: int = 64  # beyond this a request is answered 503
    num_cpus: float = 1.0
    num_gpus: float = 0.0


@dataclass(frozen=True)
class ServeResources:
    """Where it runs. `host` is the loopback unless told otherwise: there is no authentication."""

    host: str = "127.0.0.1"
    port: int = 8000
    gateway: ReplicaConfig = field(
        default_factory=lambda: ReplicaConfig(num_cpus=0.1, max_ongoing_requests=128, max_queued_requests=256)
    )
    judge: ReplicaConfig = field(default_factory=ReplicaConfig)
    meta: ReplicaConfig = field(default_factory=ReplicaConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class ServeConfig:
    """The judge (and the meta RM that guides its votes), as model directories with safetensors and a tokenizer."""

    judge_model: str
    meta_model: str | None = None
    name: str = "judge"  # stamped on answers
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    max_tokens: int = 1024
    temperature: float = 0.5  # paper: 0.5 for voting
    guided: bool = False  # hold judgements to the format by structured output
    judge_timeout_s: float = 120.0  # a request that takes longer is answered 504
    meta_timeout_s: float = 10.0  # without logits by then, the vote is plain
    resources: ServeResources = field(default_factory=ServeResources)


def from_run(root: str) -> ServeConfig:
    """The newest finished judge (GRPO, else RFT) and meta RM of a run, with the prompt that the run evaluated.

    Raises ConfigError when `root` has no finished judge or no evaluation that says how to prompt it.
    """
    records = sorted(_records(root), key=lambda found: found[1]["finished_at"])
    newest = {_kind(record["name"]): (step, record) for step, record in records}
    judge = newest.get("grpo") or newest.get("rft")
    if judge is None:
        raise ConfigError(f"{root}: no finished grpo or rft step under steps/; finish the run (`spct run`) first")
    if "evaluate" not in newest:
        raise ConfigError(f"{root}: no finished evaluate step to take the judge's prompt from; finish the run first")
    how = newest["evaluate"][1]["config"]
    meta = newest.get("meta")
    return ServeConfig(
        judge_model=str(judge[0] / "model"),
        meta_model=str(meta[0] / "model") if meta else None,
        name=judge[1]["name"],
        judge=JudgeConfig(**how["judge"]),
        max_tokens=how["max_tokens"],
    )


def from_model(directory: str) -> ServeConfig:
    """A judge from a model directory alone, with the full prompt and no meta RM."""
    return ServeConfig(judge_model=str(Path(directory).resolve()), name=Path(directory).resolve().name)


def from_run_or_model(path: str) -> ServeConfig:
    """`path` is the root of a run (it has steps/) or a model directory (it has config.json)."""
    if (Path(path) / "steps").is_dir():
        return from_run(path)
    if (Path(path) / "config.json").is_file():
        return from_model(path)
    raise ConfigError(f"{path} is neither a run (no steps/ in it) nor a model directory (no config.json in it)")


def _records(root: str) -> list[tuple[Path, dict[str, Any]]]:
    files = (Path(root).resolve() / "steps").glob("*/record.json")
    return [(file.parent, json.loads(file.read_text(encoding="utf-8"))) for file in files]


def _kind(step_name: str) -> str:
    """evaluate_grpo -> evaluate, rft_2 -> rft; but meta_scores is no meta RM."""
    kind, _, rest = step_name.partition("_")
    return kind if kind == "evaluate" or not rest or rest.isdigit() else step_name
