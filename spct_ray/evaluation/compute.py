"""What a decision costs: generated tokens, floating-point operations, engine seconds; and which are worth it."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from spct_ray.errors import DataError


@dataclass(frozen=True, slots=True)
class Rates:
    """One judge's mean cost a judgement. `params` is None for a model whose weights cannot be counted (an endpoint's),
    `meta_params` 0 without a meta RM; `seconds` are of the engine, summed over
    replicas, at the batch sizes of the evaluation."""

    params: int | None
    meta_params: int
    prompt_tokens: float
    completion_tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Cost:
    """One decision. FLOPs are 2 x weights x tokens: prefill reads (prompts, and all that the meta RM reads), decode
    writes. Prefill is an upper bound, for an engine that keeps prefixes reads a prompt of k samples fewer times."""

    tokens: float
    prefill_flops: float
    decode_flops: float
    seconds: float


def cost(rates: Rates, k: float, guided: bool) -> dict[str, float | None]:
    """Cost of one decision by k judgements (a mean where k varies), with the meta RM's reading when `guided`; FLOPs are
    None where the weights are unknown."""
    tokens, seconds = k * rates.completion_tokens, k * rates.seconds
    if rates.params is None:
        return {"tokens": tokens, "prefill_flops": None, "decode_flops": None, "seconds": seconds, "flops": None}
    read = rates.params * rates.prompt_tokens
    if guided:
        read += rates.meta_params * (rates.prompt_tokens + rates.completion_tokens)
    made = Cost(
        tokens=tokens,
        prefill_flops=2 * k * read,
        decode_flops=2 * k * rates.params * rates.completion_tokens,
        seconds=seconds,
    )
    return asdict(made) | {"flops": made.prefill_flops + made.decode_flops}


def count_weights(model_dir: str) -> int:
    """Weights of a model directory, read from the headers of its safetensors; a tied output layer counts once.

    Raises DataError where there are none.
    """
    total, files = 0, sorted(Path(model_dir).glob("*.safetensors"))
    if not files:
        raise DataError(f"{model_dir}: no *.safetensors whose weights could be counted")
    for file in files:
        with file.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length))
        total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def pareto(points: Sequence[Mapping[str, Any]], axis: str) -> list[Mapping[str, Any]]:
    """Those points whose "score" no other point reaches at the same or a lower value of `axis`, cheapest first."""
    front: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda p: (p[axis], -p["score"])):
        if not front or point["score"] > front[-1]["score"]:
            front.append(point)
    return front
