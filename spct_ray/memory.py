"""Returns freed memory to the system."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Return free pages of the C heap to the system, where it is glibc's.

    Otherwise glibc keeps them, in pieces too small for larger tensors: activations beside the optimizer's state, and
    holes between the kernels that oneDNN compiles for each batch size and evicts again.
    """
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)
