"""What every engine promises: completions for prompts, and the settings of one (importable without vLLM and Ray)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from spct_ray.errors import ConfigError
from spct_ray.precision import Precision
from spct_ray.records import Completion, Message, Record


@dataclass(frozen=True, slots=True)
class SamplingParams(Record):
    """How to continue one prompt. temperature 0 is greedy. `guide` is a regular expression the text must match."""

    max_tokens: int
    temperature: float = 1.0
    seed: int | None = None
    n: int = 1
    logprobs: bool = False
    guide: str = ""


@dataclass(frozen=True, slots=True)
class Request(Record):
    """One prompt as chat messages; the engine applies the model's chat template with the generation prompt."""

    messages: tuple[Message, ...]
    params: SamplingParams


LORA_LAYERS = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM has kernels; others are padded with zeros


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of one vLLM engine. They change speed and memory, not what is generated, except `max_model_len`."""

    max_model_len: int = 4096  # prompt + completion, tokens
    max_num_seqs: int = 0  # sequences in one forward pass; 0: what vLLM takes on the device
    max_num_batched_tokens: int = 0  # tokens in one forward pass; 0: what vLLM takes on the device
    dtype: Literal[Precision, "float16"] = "auto"  # see `spct_ray.precision`
    tensor_parallel: int = 1  # GPUs of one replica
    gpu_memory_utilization: float = 0.85  # GPU only: share of memory for weights and cache
    transfer: Literal["directory", "nccl", "ipc"] = "directory"  # GRPO's way for new weights, see docs/training.md
    lora_rank: int = 0  # of adapters beside the weights, one of LORA_RANKS; GRPO sets it where it is of use
    enforce_eager: bool = False  # GPU only: no compilation and CUDA graphs (the CPU engine never has them)
    kv_cache_gib: float = 2.0  # CPU only
    threads: int = 0  # CPU only: OpenMP threads; 0 keeps the process's own number

    def num_seqs(self, on_gpu: bool) -> int:
        """`max_num_seqs`, or what it will be on CPU or on a card of 70 GiB and more (an A100 and smaller take 256)."""
        return self.max_num_seqs or (1024 if on_gpu else 256)

    @classmethod
    def of_model(cls, directory: str) -> EngineConfig:
        """The default, cut to the model's own context length. Raises ConfigError where there is no model."""
        try:
            config = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{directory}: no readable config.json of a model: {error}") from error
        longest = cls().max_model_len
        return cls(
            max_model_len=min(longest, config.get("text_config", config).get("max_position_embeddings", longest))
        )


@dataclass(frozen=True, slots=True)
class Weights(Record):
    """What an engine holds: safetensors in a directory, and their version (0: not from a trainer or a roll-out)."""

    directory: str
    version: int = 0


@dataclass(frozen=True, slots=True)
class EngineResources:
    """How many engines run and where. `gpus_per_replica` is 0 on CPU, else the engine's `tensor_parallel`."""

    num_replicas: int = 1
    cpus_per_replica: float = 1
    gpus_per_replica: float = 0


class Engine(Protocol):
    """A source of completions. Calls raise RequestError (bad request, engine fine) or EngineError (engine dead)."""

    @property
    def weight_version(self) -> int:
        """0 for the weights the engine was started with; set by `reload`, stamped on every completion."""

    def submit(self, request: Request) -> Future[tuple[Completion, ...]]:
        """Queue one request; the future gives its n completions. Safe to call from any thread."""

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        """Completions of all requests, in order; n of them a request."""

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token of each sequence but its first, under the current weights."""

    def reload(self, weights_dir: str, weight_version: int) -> None:
        """Replace the weights by those in `weights_dir` (HF safetensors, or a PEFT adapter beside the weights that the
        engine was started with), drop cached prefixes, set the version."""

    def close(self) -> None:
        """Free the engine; pending futures fail with EngineError."""
