"""The cost of a decision in generated tokens, FLOPs and engine seconds, and the Pareto front of score over cost."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from spct_ray.errors import DataError


@dataclass(frozen=True, slots=True)
class Rates:
    """One judge's mean cost per judgement.

    `params` is None for a model whose weights cannot be counted (behind an endpoint), `meta_params` is 0 without a meta
    RM. `seconds` are engine seconds, summed over replicas, at the batch sizes of the evaluation.
    """

    params: int | None
    meta_params: int
    prompt_tokens: float
    completion_tokens: float
    seconds: float


def cost(rates: Rates, k: float, guided: bool) -> dict[str, float | None]:
    """Cost of one decision by k judgements (a mean where k varies), with the meta RM's reading when `guided`.

    FLOPs are 2 x weights x tokens, None where the weights are unknown: prefill reads the prompts and all that the meta
    RM reads, decode writes. Prefill is an upper bound, because an engine with a prefix cache does not read the same
    prompt k times.
    """
    prefill, decode = None, None
    if rates.params is not None:
        read = rates.params * rates.prompt_tokens
        if guided:
            read += rates.meta_params * (rates.prompt_tokens + rates.completion_tokens)
        prefill, decode = 2 * k * read, 2 * k * rates.params * rates.completion_tokens
    return {
        "tokens": k * rates.completion_tokens,
        "prefill_flops": prefill,
        "decode_flops": decode,
        "seconds": k * rates.seconds,
        "flops": None if prefill is None or decode is None else prefill + decode,
    }


def count_weights(model_dir: str) -> int:
    """The number of weights in a model directory, from the headers of its safetensors; a tied output layer counts once.

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
    """The points whose "score" no other point reaches at the same or lower cost on `axis`, cheapest first."""
    front: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda p: (p[axis], -p["score"])):
        if not front or point["score"] > front[-1]["score"]:
            front.append(point)
    return front
