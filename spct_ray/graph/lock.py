"""Locks that a dying process cannot leave behind: `flock` on a file which also says who holds it.

They work on local disks and on NFS (Linux turns them into byte-range locks there); an object store has none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator

from spct_ray.errors import StepError
from spct_ray.graph.step import format_seconds

POLL_SECONDS = 0.25
REMIND_SECONDS = 60.0


@contextlib.contextmanager
def hold(path: str, purpose: str, say: Callable[[str], None], limit: float = float("inf")) -> Iterator[None]:
    """Hold the lock file at `path` for `purpose`; wait for its holder, naming it through `say`.

    Raises StepError, naming the holder, when it still holds after `limit` seconds.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        started, next_words = time.monotonic(), 0.0
        while not _try_lock(file.fileno()):
            waited = time.monotonic() - started
            if waited > limit:
                raise StepError(
                    f"{path} is still held after {format_seconds(waited)} by {holder(path)}. If that process should "
                    "not run any more, end it and try again."
                )
            if waited >= next_words:
                say(f"waiting for {holder(path)}, which holds {path}")
                next_words = waited + REMIND_SECONDS
            time.sleep(POLL_SECONDS)
        file.truncate(0)
        who = {"host": platform.node(), "pid": os.getpid(), "purpose": purpose, "since": time.strftime("%F %T %Z")}
        file.write(json.dumps(who))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # closing releases the lock; the file itself stays, else two could hold "the" lock


def holder(path: str) -> str:
    """Who holds the lock file, in words; "" when it names nobody (free, or never held)."""
    try:
        with open(path, encoding="utf-8") as file:
            who = json.load(file)
        return f"process {who['pid']} on {who['host']} ({who['purpose']}, since {who['since']})"
    except (OSError, ValueError, KeyError):  # being written at this moment, or empty
        return "another process" if is_held(path) else ""


def is_held(path: str) -> bool:
    """Whether some process holds the lock now."""
    try:
        with open(path, "r+", encoding="utf-8") as file:
            return not _try_lock(file.fileno())
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
