"""Whether an engine holds exactly the trainer's weights: checksums of all tensors on both sides, compared.

vLLM fuses tensors (qkv_proj, gate_up_proj), pads the vocabulary and cuts tensors into shards, so its own digests
(`compute_weight_checksums`) tell whether an engine changed, not whether it holds what the trainer does. The checksum
here is a sum over the tensor, so it adds up over fused parts and over shards. It changes with any bit of any element,
but not when words trade places within a tensor. Whether both compute the same is checked by `cluster.sync`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spct_ray.errors import ParityError
from spct_ray.records import Record

_MIX = 0x1E3779B97F4A7C15  # odd; with the shift it makes changes in opposite directions not cancel out
_CPU_CHUNK, _GPU_CHUNK = 1 << 16, 1 << 24  # elements: what a CPU's cache holds; what a GPU has room for beside a model
_MAX_NAMED = 8


@torch.no_grad()
def checksum(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum, modulo 2^64, of mixed 8-byte words of a tensor in `dtype`; int64 scalar on the tensor's device.

    Zeros count nothing, and a tensor's checksum is the sum of its slices' (rows of a multiple of 8 bytes each).
    """
    flat = tensor.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in torch.split(flat, _GPU_CHUNK if tensor.is_cuda else _CPU_CHUNK):
        part = part.to(dtype)
        missing = -part.numel() * part.element_size() % 8 // part.element_size()
        if missing:
            part = torch.nn.functional.pad(part, (0, missing))
        if part.data_ptr() % 8:
            part = part.clone()
        words = part.view(torch.int64) * _MIX
        total += (words ^ (words >> 32)).sum()
    return total


@dataclass(frozen=True, slots=True)
class HeldTensor(Record):
    """A tensor of one worker of an engine: where, of which of the trainer's tensors it consists, checksum, elements."""

    place: str
    parts: tuple[str, ...]
    checksum: int
    numel: int


def held_tensors(worker: Any, names: Sequence[str]) -> list[HeldTensor]:
    """All parameters of a vLLM worker's model, matched to the trainer's `names` by vLLM's own rules for loading them.

    A parameter to which no name belongs has no parts. Where vLLM packs a linear layer (CPU), the checksum is that of
    the weight that was packed (see `note_packed`). Adapters have the names of a PEFT checkpoint.
    """
    model = worker.model_runner.get_model()
    dtype = worker.model_config.dtype
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    parts = defaultdict(list)
    for name in names:
        parts[mapper.map_name(name) if mapper else name].append(name)
    held: list[tuple[str, tuple[str, ...], Tensor, int]] = []
    seen: dict[int, tuple[str, ...]] = {}  # a tied output layer holds the tensor of the embedding
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            place = f"{prefix}.{leaf}"
            packed = leaf == "weight" and getattr(module, "packed_checksum", None)
            of = tuple(parts[place.replace(".base_layer.", ".")])
            if parameter.numel() and id(parameter) not in seen:
                held.append((place, of, checksum(parameter, dtype), parameter.numel()))
            if parameter.numel():
                of = seen.setdefault(id(parameter), of)
            if packed:
                held.append((f"{place} (packed)", of, *packed))
        if hasattr(module, "lora_a_stacked"):
            held += _held_adapters(prefix, module, getattr(model, "packed_modules_mapping", {}), set(names), dtype)
    sums = torch.stack([value.to(worker.device) for _, _, value, _ in held]).tolist()
    return [HeldTensor(place, of, value, n) for value, (place, of, _, n) in zip(sums, held, strict=True)]


def _held_adapters(
    prefix: str, module: Any, packed: Mapping[str, Sequence[str]], names: set[str], dtype: torch.dtype
) -> list[tuple[str, tuple[str, ...], Tensor, int]]:
    """The halves of a layer's one adapter, where there are `names` for it."""
    parent, _, leaf = prefix.rpartition(".")
    held: list[tuple[str, tuple[str, ...], Tensor, int]] = []
    for slot, part in enumerate(packed.get(leaf, [leaf])):
        for half, stacked in (("lora_A", module.lora_a_stacked), ("lora_B", module.lora_b_stacked)):
            name = f"base_model.model.{parent}.{part}.{half}.weight"
            if name in names:
                tensor = stacked[slot][0, 0]
                held.append((f"{parent}.{part}.{half}", (name,), checksum(tensor, dtype), tensor.numel()))
    return held


def note_packed(layer: Any) -> None:
    """Called with a layer whose weight is about to be packed, after which nobody can read it."""
    if not layer.weight.is_meta:
        layer.packed_checksum = checksum(layer.weight, layer.weight.dtype), layer.weight.numel()


def compare(sent: Mapping[str, tuple[int, int]], engines: Sequence[Sequence[Sequence[HeldTensor]]]) -> list[str]:
    """Raise ParityError unless each engine (its workers' tensors) holds exactly what was sent.

    Returns what could not be compared: tensors that no engine holds under a known name, and those of an engine to which
    none that was sent belongs.
    """
    unknown: dict[str, None] = {}
    for number, workers in enumerate(engines):
        places: dict[str, list[HeldTensor]] = defaultdict(list)
        for held in workers:
            for tensor in held:
                places[tensor.place].append(tensor)
        compared = sum(bool(shards[0].parts) for shards in places.values())
        if not compared:
            raise ParityError(
                f"engine {number}: none of its {len(places)} tensors could be matched to the {len(sent)} that were "
                "sent, so nothing shows that it holds the trainer's weights: vLLM names those of this model otherwise"
            )
        stale = [place for place, shards in places.items() if shards[0].parts and not _equal(sent, shards)]
        if stale:
            named = ", ".join(stale[:_MAX_NAMED]) + (", ..." if len(stale) > _MAX_NAMED else "")
            raise ParityError(
                f"engine {number} does not hold the trainer's weights: {len(stale)} of {compared} tensors differ in "
                f"their bits ({named}). Everything it samples would be credited to the wrong policy. All of them: the "
                "sync did not happen or came from other weights; few: the engine's reload leaves them out"
            )
        matched = {part for shards in places.values() for part in shards[0].parts}
        unknown |= dict.fromkeys([name for name in sent if name not in matched])
        unknown |= dict.fromkeys([place for place, shards in places.items() if not shards[0].parts])
    return list(unknown)


def _equal(sent: Mapping[str, tuple[int, int]], shards: Sequence[HeldTensor]) -> bool:
    """Whether all workers hold the whole tensor, or together its shards."""
    sums = [sent[part][0] for part in shards[0].parts]
    numels = [sent[part][1] for part in shards[0].parts]
    if all(shard.numel == sum(numels) for shard in shards):
        return not any((shard.checksum - sum(sums)) % 2**64 for shard in shards)
    total, copies = sum(shard.numel for shard in shards), 1
    # Keys and values are copied where there are more workers than heads of them.
    if len(numels) == 3:
        copies = (total - numels[0]) // (numels[1] + numels[2])
    once = sums[0] if len(numels) > 1 else (total // numels[0]) * sums[0]
    expected = once + copies * sum(sums[1:])
    return not (sum(shard.checksum for shard in shards) - expected) % 2**64
