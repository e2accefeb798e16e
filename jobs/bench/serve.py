"""What the voting service costs: the same judgements through it, over HTTP, and by the same engine driven directly.

Both engines live side by side and work in turns, so that a machine whose
speed drifts favours neither; each request shows new texts, so that neither finds its prompt cached. Without a model it
makes one of SmolLM2-135M's shape with random weights, which writes nonsense at the same speed: what it writes is no
judgement, and only its tokens and seconds count. Prints a table and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from jobs.bench.compare import model_directory
from jobs.bench.train import write_model
from spct_ray.engines.base import EngineConfig
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Item, Message
from spct_ray.serve.deployment import ReplicaConfig, ServeConfig, ServeResources, resolve

RESPONSES = 2  # of each item
SEED = 1


@dataclass(frozen=True)
class Took:
    """Completion tokens and seconds of some judgements."""

    tokens: int
    seconds: float


Judge = Callable[[Sequence[Item], int], Took]  # k judgements of each item, all at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the bench."""
    add_service_arguments(parser)
    parser.add_argument("--model", help="model directory of the judge (default: SmolLM2-135M's shape, random)")
    parser.add_argument("--items", type=int, default=6, help="items judged at once at saturation")
    parser.add_argument("--runs", type=int, default=3, help="rounds of all measurements; medians count")


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benches of the service share."""
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="threads of each engine")
    parser.add_argument("--k", type=int, default=8, help="judgements of each item")
    parser.add_argument("--prompt-tokens", type=int, default=800, help="about; exact for the random model")
    parser.add_argument("--max-tokens", type=int, default=40, help="of one judgement")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0, help="of each engine; resident memory grows until "
                        "all of it was used once")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and the JSON."""
    from spct_ray.cluster import session
    from spct_ray.serve import app

    with model_directory(options.model, write_model, 30) as model:
        config = bench_config(os.path.abspath(model), options)
        with (
            _Direct(config) as direct,
            session.start(config.resources.cluster),
            app.serving(config) as url,
        ):
            _report(options, *_measure(direct.judge, _service(url), options))


def service_config(target: str, options: argparse.Namespace) -> ServeConfig:
    """What `spct serve TARGET` would serve, with the engine's size and the address of this bench."""
    config, base = resolve(target), bench_config(os.path.abspath(target), options)
    engine = replace(config.resources.engine, kv_cache_gib=options.kv_cache_gib, threads=options.cores)
    return replace(config, resources=replace(base.resources, engine=engine))


def _measure(direct: Judge, service: Judge, options: argparse.Namespace) -> tuple[list[Took], ...]:
    """[saturation direct, saturation service, one sample direct, one sample service, vote@8, vote@32], each by run."""
    texts = _texts(options.prompt_tokens)
    for judge in (direct, service):
        judge([texts()], 2)  # first use of everything
    taken: tuple[list[Took], ...] = tuple([] for _ in range(6))
    for _ in range(options.runs):
        items = [texts() for _ in range(options.items)]
        taken[0].append(direct(items, options.k))
        taken[1].append(service(items, options.k))
        for _ in range(2):  # short, so more of them
            item = texts()
            taken[2].append(direct([item], 1))
            taken[3].append(service([item], 1))
        taken[4].append(service([texts()], 8))
        taken[5].append(service([texts()], 32))
    return taken


def _report(options: argparse.Namespace, *taken: list[Took]) -> None:
    theirs, ours = (statistics.median(t.tokens / t.seconds for t in side) for side in taken[:2])
    one_direct, one, eight, all32 = (statistics.median(t.seconds for t in side) for side in taken[2:])
    lines = [
        (f"saturation, engine alone ({options.items} items x k = {options.k})", f"{theirs:8.1f} tokens/s"),
        ("saturation, through the service", f"{ours:8.1f} tokens/s"),
        ("ratio", f"{ours / theirs:8.3f}"),
        ("one sample, engine alone", f"{one_direct:8.3f} s"),
        ("one sample, through the service", f"{one:8.3f} s"),
        ("added", f"{100 * (one / one_direct - 1):8.1f} %"),
        ("vote@8 / one sample", f"{eight / one:8.2f}"),
        ("vote@32 / one sample", f"{all32 / one:8.2f}"),
    ]
    print(f"{options.cores} cores, prompts of {options.prompt_tokens} tokens, judgements of {options.max_tokens}")
    for name, value in lines:
        print(f"  {name:48s}{value}")
    figures: dict[str, Any] = {"bench": "serve", "ratio": ours / theirs, "ours": ours, "theirs": theirs}
    figures |= {"unit": "judge tokens/s", "runs": options.runs, "added_latency": one / one_direct - 1}
    figures |= {"one_sample_s": one, "vote8": eight / one, "vote32": all32 / one}
    print(json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in figures.items()}))


def _texts(prompt_tokens: int) -> Callable[[], Item]:
    """Items that have no text in common from the first line on. A byte is a token of the random model."""
    rng = random.Random(SEED)

    def text(length: int) -> str:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz     ") for _ in range(length)).strip() or "a"

    def item() -> Item:
        part = max(prompt_tokens - 130, 30) // (1 + RESPONSES)  # 130: the frame
        return Item("bench", (Message("user", text(part)),), tuple(text(part) for _ in range(RESPONSES)))

    return item


def _service(url: str) -> Judge:
    from spct_ray.serve.client import JudgeClient

    client = JudgeClient(url)
    threads = ThreadPoolExecutor(64)

    def judge(items: Sequence[Item], k: int) -> Took:
        started = time.perf_counter()
        answers = list(threads.map(lambda i: client.judge(i.messages, i.responses, k=k, seed=SEED), items))
        return Took(sum(a.completion_tokens for a in answers), time.perf_counter() - started)

    return judge


class _Direct:
    """The engine in a process of its own, as a replica has it, asked over a pipe."""

    def __init__(self, config: ServeConfig) -> None:
        os.environ["OMP_NUM_THREADS"] = str(config.resources.engine.threads)  # as Ray sets it for the replica
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_drive, args=(config, other), daemon=True)

    def judge(self, items: Sequence[Item], k: int) -> Took:
        """As `Judge`; the seconds are the process's own."""
        self._connection.send((items, k))
        took: Took = self._connection.recv()
        return took

    def __enter__(self) -> _Direct:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def _drive(config: ServeConfig, connection: Connection) -> None:
    from spct_ray.engines.engine_judge import EngineJudge
    from spct_ray.engines.vllm import VllmEngine

    judge = EngineJudge(VllmEngine(config.judge_model, config.resources.engine), config.judge, "direct")
    while True:
        items, k = connection.recv()
        started = time.perf_counter()
        orders = balanced_orders(RESPONSES, k, derive_seed(SEED, "orders"))
        tasks = [
            JudgeTask(item, order, s, config.temperature, derive_seed(SEED, "sample", s))
            for item in items
            for s, order in enumerate(orders)
        ]
        tokens = sum(t.completion_tokens for t in judge.judge(tasks))
        connection.send(Took(tokens, time.perf_counter() - started))


def bench_config(model: str, options: argparse.Namespace) -> ServeConfig:
    """A service of one judge on this machine, at a free port."""
    from spct_ray.cluster.session import ClusterResources

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    length = options.prompt_tokens + options.max_tokens + 200
    return ServeConfig(
        judge_model=model,
        judge=JudgeConfig(template="compact", single="scale", max_tokens=options.max_tokens),
        judge_timeout_s=600,
        resources=ServeResources(
            port=port,
            judge=ReplicaConfig(num_cpus=options.cores),
            engine=EngineConfig(max_model_len=length, kv_cache_gib=options.kv_cache_gib, threads=options.cores),
            cluster=ClusterResources(num_cpus=options.cores + 1, object_store_gib=0.1),
        ),
    )
