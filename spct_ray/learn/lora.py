"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: added to a loaded model, and merged into its weights.

The trunk's linear layers compute W x + (alpha / rank) B A x, of which only A and B are trained; embeddings and output
layer are frozen, a new scalar head is trained in full. The trainer hands out (to engines, in exports) the merged weight
W + (alpha / rank) B A under the names of the model without adapters, or A and B alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spct_ray.errors import ConfigError
from spct_ray.learn.train_config import LoraConfig

_ADAPTER = "default"  # peft's name of the one adapter


def add_adapters(model: Any, lora: LoraConfig) -> None:
    """Freeze a transformers model except for a scalar head, and add adapters to its trunk in the dtype of its weights.

    A is random and B is 0, so the outputs do not change yet. Raises ConfigError for a name in `target_modules` that is
    not a linear layer of the trunk.
    """
    import peft

    trunk = model.base_model
    linear = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)]
    unknown = [t for t in lora.target_modules if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"lora.target_modules: {', '.join(unknown)} names no linear layer inside {type(trunk).__name__}; it has "
            f"{', '.join(known)} (embeddings and output layer take no adapter)"
        )
    model.requires_grad_(False)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or "all-linear",
    )
    peft.inject_adapter_in_model(config, trunk, _ADAPTER)
    dtype = next(p.dtype for p in trunk.parameters() if not p.requires_grad)
    for parameter in trunk.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)


@dataclass(frozen=True)
class WholeWeight:
    """One weight of the model without adapters: its HF name, and the parameters that it is merged from."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    layer: Any = None  # peft's, where there is an adapter

    @torch.no_grad()
    def value(self, with_adapter: bool = True) -> Tensor:
        """The live weight or, with an adapter, the merged one as a new tensor. Needs unpartitioned parameters."""
        weight = self.parameters[0].detach()
        adapted = self.layer is not None and with_adapter
        return weight + self.layer.get_delta_weight(_ADAPTER) if adapted else weight

    @torch.no_grad()
    def adapter(self) -> dict[str, Tensor]:
        """A [rank, in] and alpha / rank times B [out, rank] by their names in a PEFT checkpoint; else empty."""
        if self.layer is None:
            return {}
        name = f"base_model.model.{self.name.removesuffix('.weight')}"
        a, b = (parameter.detach() for parameter in self.parameters[1:])
        return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b * self.layer.scaling[_ADAPTER]}


def whole_weights(model: nn.Module) -> list[WholeWeight]:
    """All weights of a model with or without adapters, tied ones once."""
    weights = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        place, adapted, end = name.rpartition(".base_layer.")
        layer: Any = model.get_submodule(place) if adapted and end == "weight" else None
        halves = (layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight) if layer is not None else ()
        weights.append(WholeWeight(f"{place}.{end}" if adapted else name, (parameter, *halves), layer))
    return weights
