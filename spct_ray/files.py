"""Writes files and directories so that readers, and crashes, see the old content or the new one, never a part."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write a file or directory to; it is renamed at the end of the block.

    A block that raises leaves `path` as it was. One writer at a time: what a killed one left behind is removed.
    """
    target = Path(path)
    temporary, old = target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.old")
    remove(temporary)
    try:
        yield temporary
        if target.is_dir():  # a directory can only be renamed over an empty one
            remove(old)
            os.rename(target, old)
        os.replace(temporary, target)
    finally:
        remove(temporary)
        remove(old)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replaces a file, through to the disk: once this returns, the file and its name survive a power cut. Several
    processes may write the same path; the last one wins."""
    temporary = f"{path}.{platform.node()}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    descriptor = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str | Path) -> None:
    """Deletes a file or a directory, if it exists."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)
