"""What we do beside the usual way to do it, in one run: `python jobs/bench.py train`, `trl`, `serve` or `plan`.

train: each side is a process of its own, so that its peak memory is its own; the two of a comparison take turns on the
same threads, repeat by repeat. The first repeat is dropped, the rest give medians. Both sides must find the same loss.
trl: the same with TRL's own trainers, see spct_ray/stages/trl_speed.py. serve: see spct_ray/serve/speed.py.
plan: nothing runs; what a configuration needs on paper, see spct_ray/stages/scaling.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from spct_ray.cli import guarded
from spct_ray.errors import SpctError
from spct_ray.serve import speed


def _processes() -> Any:
    """Forked ones start fast (nothing is computed before, so no thread is lost), but none of them could use CUDA."""
    import torch

    return multiprocessing.get_context("spawn" if torch.version.cuda else "fork")


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
    """One side of a comparison in a process of its own, computing only while it is asked to."""

    def __init__(self, make: Callable[..., Any], threads: int, *args: Any) -> None:
        self._name = make.__name__
        processes = _processes()
        self._pipe, theirs = processes.Pipe()
        self._process = processes.Process(target=_serve, args=(theirs, make, threads, args), daemon=True)
        self._process.start()
        theirs.close()

    def repeat(self) -> tuple[float, Any, float]:
        """Seconds, what the side gave (a `Repeat`), and its peak memory so far in bytes."""
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
    """Both sides in turns. Raises SpctError when their first losses differ: they would not do the same work."""
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


def train(options: argparse.Namespace) -> None:
    """The three comparisons of the training side, as a table and as JSON.

    FLOP/s stand beside the best of the machine's matrix products before and after each comparison, on equal threads.
    """
    if options.repeats < 2:
        raise SpctError(f"--repeats {options.repeats}: the first is dropped, so at least 2 are needed")
    from spct_ray.evaluation import training_speed as sides

    threads = options.threads or len(os.sched_getaffinity(0))
    names = ("prompts", "group_size", "prompt_tokens", "completion_tokens", "micro_tokens", "head_tokens")
    sizes = sides.Sizes(**{n: getattr(options, n) for n in names}, head_vocab=262_144, head_hidden=576)
    print(f"{threads} threads, {options.repeats - 1} repeats after one that is dropped; {asdict(sizes)}", flush=True)
    print(f"{'':14}{'ours s':>9}{'theirs s':>10}{'faster':>8}{'tokens':>16}{'peak GiB':>16}{'GFLOP/s':>16}", flush=True)
    results = []
    ceiling = SideProcess(sides.matmul_ceiling, threads)
    peaks = [ceiling.repeat()[1]]
    with _model(options) as model:
        for name, ours, theirs in (
            ("grpo update", sides.grpo_ours, sides.grpo_padded),
            ("log-probs 256k", sides.head_ours, sides.head_naive),
            ("sft update", sides.sft_ours, sides.sft_padded),
        ):
            r = compare(name, ours, theirs, options.repeats, threads, model, sizes)
            results.append(r)
            peaks.append(ceiling.repeat()[1])
            tokens, memory = f"{r.tokens_ours} / {r.tokens_theirs}", f"{r.peak_gib_ours:.2f} / {r.peak_gib_theirs:.2f}"
            rates = f"{r.flops_ours / r.ours / 1e9:.0f} / {r.flops_theirs / r.theirs / 1e9:.0f}"
            print(
                f"{name:14}{r.ours:9.3f}{r.theirs:10.3f}{r.ratio:7.2f}x{tokens:>16}{memory:>16}{rates:>16}", flush=True
            )
    ceiling.close()
    best = max(peaks)
    shares = {r.name: (r.flops_ours / r.ours / best, r.flops_theirs / r.theirs / best) for r in results}
    told = ", ".join(f"{name} {mine:.0%} / {other:.0%}" for name, (mine, other) in shares.items())
    print(f"matrix products reach {best / 1e9:.0f} GFLOP/s here; shares of it, ours / theirs: {told}")
    content = {
        "bench": "train", "threads": threads, "sizes": asdict(sizes), "results": [asdict(r) for r in results],
        "ceiling_flops": best, "shares": shares,
    }  # fmt: skip
    _finish(content, options)


def trl(options: argparse.Namespace) -> None:
    """Whole updates beside TRL's, in tokens a second: completion tokens for GRPO, real ones for SFT."""
    from spct_ray.stages.trl_speed import SIDES, Work, require_trl

    require_trl()
    if options.repeats < 2:
        raise SpctError(f"--repeats {options.repeats}: the first is dropped, so at least 2 are needed")
    threads = options.threads or len(os.sched_getaffinity(0))
    names = ("prompts", "group_size", "prompt_tokens", "completion_tokens", "examples", "micro_tokens")
    work = Work(**{n: getattr(options, n) for n in names})
    print(f"{threads} threads, {options.repeats - 1} repeats after one that is dropped; {asdict(work)}", flush=True)
    results = []
    with _model(options) as model:
        for name in options.only:
            ours, theirs, beta = SIDES[name]
            r = compare(name, ours, theirs, options.repeats, threads, model, work, beta)
            rates = r.tokens_ours / r.ours, r.tokens_theirs / r.theirs
            results.append({**asdict(r), "tokens_per_second": rates, "ratio": rates[0] / rates[1]})
            print(
                f"{name:8} ours {rates[0]:.1f} tokens/s, TRL {rates[1]:.1f}: {rates[0] / rates[1]:.2f}x; seconds "
                f"{r.ours:.1f} / {r.theirs:.1f}; peak GiB {r.peak_gib_ours:.2f} / {r.peak_gib_theirs:.2f}",
                flush=True,
            )
    _finish({"bench": "trl", "threads": threads, "work": asdict(work), "results": results}, options)


def plan(options: argparse.Namespace) -> None:
    """Memory of each GPU and time of a step on paper, see docs/scaling.md."""
    from spct_ray.config import load
    from spct_ray.stages.plan_check import tables
    from spct_ray.stages.recipe import Recipe

    print(tables(load(Recipe, options.config, options.overrides), options.gpus))


@contextlib.contextmanager
def _model(options: argparse.Namespace) -> Iterator[str]:
    """The given model directory, or a random one of SmolLM2-135M's shape."""
    from spct_ray.evaluation import training_speed as sides

    if options.model:
        yield options.model
        return
    with tempfile.TemporaryDirectory() as scratch:
        writer = _processes().Process(target=sides.write_model, args=(scratch, options.layers))
        writer.start()
        writer.join()
        yield scratch


def _finish(content: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        Path(options.json).write_text(json.dumps(content, indent=1))
    print(json.dumps(content))


def main() -> None:
    """Parse the arguments and run one bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCH")
    service = commands.add_parser("serve", help="the voting service against the same engine driven directly")
    speed.add_arguments(service)
    service.set_defaults(handler=speed.serve)
    ours = commands.add_parser("train", help="GRPO and SFT updates and log-probs against the usual way")
    peer = commands.add_parser(
        "trl", help="GRPO end to end and SFT against TRL's own trainers (pip install spct-ray[bench])"
    )
    for command, handler, defaults in (
        (ours, train, {"repeats": 4, "prompts": 1, "prompt-tokens": 256, "completion-tokens": 64, "head-tokens": 2048}),
        (peer, trl, {"repeats": 3, "prompts": 8, "prompt-tokens": 400, "completion-tokens": 100, "examples": 16}),
    ):
        command.add_argument("--model", metavar="DIR", help="a model directory (default: random, SmolLM2-135M's shape)")
        command.add_argument("--layers", type=int, default=30, help="of the random model")
        command.add_argument("--threads", type=int, default=0, help="default: all cores")
        command.add_argument("--json", metavar="FILE", help="write the results here, too")
        for name, value in {**defaults, "group-size": 4, "micro-tokens": 2400}.items():
            command.add_argument(f"--{name}", type=int, default=value)
        command.set_defaults(handler=handler)
    paper = commands.add_parser("plan", help="memory of each GPU and time of a GRPO step on paper (docs/scaling.md)")
    paper.add_argument("config", metavar="CONFIG")
    paper.add_argument("overrides", nargs="*", metavar="key=value")
    paper.add_argument("--gpus", type=int, nargs="+", default=[], metavar="N", help="for so many GPUs, e.g. 8 16 64")
    paper.set_defaults(handler=plan)
    names = ("grpo", "grpo-kl", "sft")
    peer.add_argument("--only", nargs="+", choices=names, default=names, help="these comparisons (default: all)")
    options = parser.parse_args()
    sys.exit(guarded(lambda: options.handler(options), " ".join(sys.argv)))


if __name__ == "__main__":
    main()
