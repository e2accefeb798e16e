"""Memory of this process that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Give free pages of the C heap back to the system, where it is glibc's.

    It keeps them otherwise, in pieces that larger tensors do not fit into: activations beside the optimizer's state,
    and holes between the kernels that oneDNN makes for each batch size, keeps by the thousand and drops again.
    """
    if (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        malloc_trim(0)
