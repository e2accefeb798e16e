"""Which arithmetic "auto" stands for."""

import platform

import pytest
import torch

from spct_ray.precision import resolve


@pytest.mark.parametrize(
    ("able", "on_gpu", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False, "float32"),
        ({"amx_bf16": True}, False, "bfloat16"),
        ({"avx512_bf16": True}, False, "bfloat16"),
        ({}, False, "float32"),
        ({}, True, "bfloat16"),
    ],
)
def test_auto_is_what_the_hardware_is_fast_in(monkeypatch, able, on_gpu, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert resolve("auto", on_gpu) == expected
    assert resolve("float16", on_gpu) == "float16"  # a choice stays


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names are those of x86")
def test_this_torch_tells_what_the_processor_can():
    assert any(name in torch.cpu.get_capabilities() for name in ("amx_bf16", "avx512_bf16", "bf16"))
