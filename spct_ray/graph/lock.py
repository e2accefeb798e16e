"""Locks that a dying process cannot leave behind, each with a file beside it that says who holds it.

`filelock` uses `flock`, which works on local disks and on NFS; an object store has none.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from spct_ray.errors import StepError
from spct_ray.files import write_atomically
from spct_ray.graph.step import format_seconds

REMIND_SECONDS = 60.0


@contextlib.contextmanager
def hold(path: str, command: str, say: Callable[[str], None], limit: float = float("inf")) -> Iterator[None]:
    """Hold the lock file at `path` for `command`; wait for its holder, naming it through `say` now and every minute.

    Raises StepError, naming the holder, when it still holds after `limit` seconds.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    lock, started, patience = FileLock(path), time.monotonic(), 0.0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            waited = time.monotonic() - started
            if waited >= limit:
                raise StepError(
                    f"{path} is still held after {format_seconds(waited)} by {holder(path)}. If that process should "
                    "not run any more, end it and try again."
                ) from None
            say(f"waiting for {holder(path)}, which holds {path}")
            patience = min(REMIND_SECONDS, limit - waited)
    who = f"process {os.getpid()} on {platform.node()} ({command}, since {time.strftime('%F %T %Z')})"
    try:
        write_atomically(_holder_file(path), who.encode())
        yield
    finally:
        _holder_file(path).unlink(missing_ok=True)
        lock.release()


def holder(path: str) -> str:
    """Who holds the lock file now, in words; "" when nobody does."""
    if not os.path.exists(path):
        return ""
    lock = FileLock(path)
    with contextlib.suppress(Timeout), lock.acquire(timeout=0):
        return ""
    try:
        return _holder_file(path).read_text(encoding="utf-8")
    except FileNotFoundError:  # about to be written, or just removed
        return "another process"


def _holder_file(path: str) -> Path:
    return Path(f"{path}.holder")
