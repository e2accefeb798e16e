"""Two sides of a comparison, each in a process of its own: equal threads, turns repeat by repeat, peak memory apart."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from spct_ray.errors import ConfigError, SpctError


@dataclass(frozen=True)
class Repeat:
    """What one repeat computed (equal on both sides), how many tokens passed through the network, and its work.

    `flops` are those of linear layers, attention and output layer that were really computed, forward and backward, by
    formula (see `jobs.flops`; 0: not counted).
    """

    loss: float
    tokens: int
    flops: float = 0.0


Side = Callable[[], Repeat]


@dataclass(frozen=True)
class Result:
    """One comparison: seconds, tokens, FLOPs of one update; peak memory in GiB; `ratio` is theirs / ours in seconds."""

    name: str
    ours: float
    theirs: float
    ratio: float
    tokens_ours: int
    tokens_theirs: int
    peak_gib_ours: float
    peak_gib_theirs: float
    flops_ours: float
    flops_theirs: float
    runs: int


class SideProcess:
    """One side of a comparison in a process of its own, which computes only when told to."""

    def __init__(self, make: Callable[..., Any], threads: int, *args: Any) -> None:
        self._name = make.__name__
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, threads, args), daemon=True)
        self._process.start()
        theirs.close()

    def repeat(self) -> tuple[float, Any, float]:
        """Seconds, what the side returned (a `Repeat`), and its peak memory so far in bytes."""
        try:
            self._pipe.send(True)
            answer: tuple[float, Any, float] = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise SpctError(f"{self._name} failed; its traceback is above") from error
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.send(False)
        self._process.join()


def _context() -> Any:
    """Forked processes start fast (nothing is computed before, so no thread is lost), but cannot use CUDA."""
    import torch

    return multiprocessing.get_context("spawn" if torch.version.cuda else "fork")


def _serve(pipe: Connection, make: Callable[..., Any], threads: int, args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(threads)
    side = make(*args)
    cuda = torch.cuda.is_available()
    while pipe.recv():
        started = time.perf_counter()
        done = side()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((seconds, done, torch.cuda.max_memory_allocated() if cuda else rss))


def compare(
    name: str, ours: Callable[..., Any], theirs: Callable[..., Any], repeats: int, threads: int, *args: Any
) -> Result:
    """Run both sides in turns; the first repeat is dropped, the rest give medians.

    Raises ConfigError for fewer than two repeats, and SpctError when the first losses differ: the sides would not do
    the same work.
    """
    if repeats < 2:
        raise ConfigError(f"--repeats {repeats}: the first is dropped, so at least 2 are needed")
    sides = [SideProcess(make, threads, *args) for make in (ours, theirs)]
    seconds: list[list[float]] = [[], []]
    for number in range(repeats):
        answers = [side.repeat() for side in sides]
        for kept, answer in zip(seconds, answers, strict=True):
            kept.append(answer[0])
        losses = [answer[1].loss for answer in answers]
        if number == 0 and abs(losses[0] - losses[1]) > 0.01 * abs(losses[1]) + 1e-3:
            raise SpctError(
                f"{name}: the two sides find losses {losses[0]:.5f} and {losses[1]:.5f} for the same samples"
            )
    for side in sides:
        side.close()
    medians = [statistics.median(kept[1:]) for kept in seconds]
    (_, mine, my_peak), (_, other, other_peak) = answers
    return Result(
        name, medians[0], medians[1], medians[1] / medians[0], mine.tokens, other.tokens,
        my_peak / 2**30, other_peak / 2**30, mine.flops, other.flops, repeats - 1,
    )  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser, **sizes: int) -> None:
    """Options of a bench that trains, with the defaults of its sizes."""
    parser.add_argument("--model", metavar="DIR", help="a model directory (default: random, SmolLM2-135M's shape)")
    parser.add_argument("--layers", type=int, default=30, help="of the random model")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--json", metavar="FILE", help="write the results here, too")
    for name, value in {**sizes, "group_size": 4, "micro_tokens": 2400}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)


def num_threads(given: int) -> int:
    """The number given on the command line, or all cores for 0."""
    return given or len(os.sched_getaffinity(0))


@contextlib.contextmanager
def model_directory(given: str | None, write_model: Callable[[str, int], None], layers: int) -> Iterator[str]:
    """The given model directory, or a temporary one that `write_model` fills in another process."""
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory() as scratch:
        writer = _context().Process(target=write_model, args=(scratch, layers))
        writer.start()
        writer.join()
        yield scratch
