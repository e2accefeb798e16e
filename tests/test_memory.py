"""Freed memory really goes back to the system."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
from spct_ray.memory import give_back_freed

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

pieces = [bytearray(b"x" * 100_000) for _ in range(2000)]
kept = pieces.pop()  # at the end of the heap, which glibc would cut off by itself
del pieces
before = resident()
give_back_freed()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_pages_of_the_heap_that_are_free_go_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 100  # MiB of about 190
