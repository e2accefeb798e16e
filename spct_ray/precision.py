"""Picks the compute dtype."""

from __future__ import annotations

from typing import Literal

Precision = Literal["auto", "bfloat16", "float32"]


def resolve(dtype: str, on_gpu: bool) -> str:
    """`dtype`, with "auto" as bfloat16 on GPUs and on CPUs that have instructions for it, else float32.

    A CPU without them multiplies matrices in bfloat16 up to a hundred times as slowly as in float32.
    """
    import torch

    if dtype != "auto":
        return dtype
    if on_gpu:
        return "bfloat16"
    able = torch.cpu.get_capabilities()
    return "bfloat16" if any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")) else "float32"
