"""The voting service under more load than it can bear, with its judge killed once.

HTTP clients together ask for twice what the service was measured to answer, and do not try again. Every answer is
compared with the one that the idle service gave to the same request; memory is read from /proc. Without a model it
makes one of two layers with random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from jobs.bench.compare import model_directory
from jobs.bench.serve import add_service_arguments, bench_config, service_config
from jobs.bench.train import write_model
from spct_ray.data.builtin import BuiltinConfig, generate
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.seeds import derive_seed
from spct_ray.serve.client import request
from spct_ray.serve.deployment import ServeConfig
from spct_ray.serve.schema import JudgeAnswer

OVERLOAD = 2.0  # requests asked for, as a multiple of those answered at saturation
NUM_ITEMS = 32
PROBE_S = 10.0  # for which the capacity is measured
MEMORY_PERIOD_S = 2.0
TROUGH_S = 40.0
FLAT = 5.0  # MiB a minute, the most that a process may grow by in the second half of its life
DEPLOYMENTS = ("GatewayReplica", "JudgeReplica", "MetaReplica")


@dataclass(frozen=True)
class Question:
    """A request's body, and what the idle service answered to it."""

    body: dict[str, Any]
    alone: JudgeAnswer


@dataclass(frozen=True)
class Reply:
    """What came of one request: when it was sent (time.monotonic()) and how long it took, in seconds; the status, or
    the name of the error that came instead; what was wrong with the answer; whether its texts are the idle service's.
    """

    sent_at: float
    seconds: float
    outcome: str
    fault: str = ""
    same_texts: bool = True


@dataclass(frozen=True)
class Memory:
    """Resident MiB of one replica's process at a time of time.monotonic()."""

    at: float
    deployment: str
    pid: int
    mib: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the bench."""
    add_service_arguments(parser)
    parser.add_argument("--model", help="a run's root or a model directory (default: two layers, random)")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--kill-minute", type=float, help="when the judge is killed (default: half-way)")


def run(options: argparse.Namespace) -> None:
    """Serve the model, load it, print the report."""
    from spct_ray.cluster import session
    from spct_ray.serve import app

    with model_directory(options.model, write_model, 2) as model:
        config = service_config(model, options) if options.model else bench_config(model, options)
        with session.start(config.resources.cluster), app.serving(config) as url:
            asyncio.run(drive(options, url, config))


def fault(answer: JudgeAnswer, body: dict[str, Any], alone: JudgeAnswer) -> str:
    """What is wrong with an answer, "" for nothing.

    Its samples must be the request's own (their number, orders and prompts' lengths), and its verdict what they sum to.
    """
    num, k = len(body["responses"]), body["k"]
    orders = [list(order) for order in balanced_orders(num, k, derive_seed(body["seed"], "orders"))]
    if [s.sample for s in answer.samples] != list(range(k)) or [s.order for s in answer.samples] != orders:
        return "samples"
    if [s.prompt_tokens for s in answer.samples] != [s.prompt_tokens for s in alone.samples]:
        return "prompts"
    if any((s.scores is None) != (s.failure is not None) for s in answer.samples):
        return "failures"
    used = [answer.samples[i].scores for i in answer.used]
    if None in used or used != [s.scores for s in answer.samples if s.kept]:
        return "used samples"
    sums = [sum(scores[i] for scores in used if scores is not None) for i in range(num)] if used else None
    if answer.scores != sums:
        return "sums"
    best = [i for i, s in enumerate(sums) if s == max(sums)] if sums and num > 1 else []
    return "" if answer.winners == best and (answer.winner in best if best else answer.winner is None) else "winner"


def resident() -> list[Memory]:
    """Memory of the replicas that the Ray of this process runs."""
    found, now = [], time.monotonic()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            title = (directory / "cmdline").read_bytes().decode(errors="replace")
            name = next((name for name in DEPLOYMENTS if title.startswith("ray::ServeReplica") and name in title), None)
            if name is None or _parent(_parent(int(directory.name))) != os.getpid():  # the one between is the raylet
                continue
            pages = int((directory / "statm").read_text().split()[1])
        except OSError:  # it ended meanwhile
            continue
        if pages:  # else it is ending
            found.append(Memory(now, name, int(directory.name), pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
    return found


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def drive(options: argparse.Namespace, url: str, config: ServeConfig) -> None:
    """Load the service of `config` at `url`, whose Ray this process has started, and print the report."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=config.judge_timeout_s + 60, limits=limits) as http:
        questions = await _questions(http, options.k)
        started = time.monotonic()
        many = config.resources.judge.max_ongoing_requests
        probe = await asyncio.gather(*(_client(http, questions, i, started + PROBE_S, 0.0) for i in range(many)))
        answered = [r for replies in probe for r in replies if r.outcome == "200"]
        capacity = len(answered) / (max(r.sent_at + r.seconds for r in answered) - started)
        interval_s = options.clients / (OVERLOAD * capacity)
        print(f"{capacity:.1f} requests/s answered of {many} clients; now {options.clients} clients ask for "
              f"{OVERLOAD * capacity:.1f}/s for {options.minutes:g} minutes", flush=True)  # fmt: skip
        started = time.monotonic()
        end = started + 60 * options.minutes
        memory: list[Memory] = []
        watch = asyncio.create_task(_watch(memory))
        clients = [asyncio.create_task(_client(http, questions, i, end, interval_s)) for i in range(options.clients)]
        await asyncio.sleep(60 * (options.minutes / 2 if options.kill_minute is None else options.kill_minute))
        killed_at = time.monotonic()
        await asyncio.to_thread(_kill_judge)
        print(f"killed the judge replica after {killed_at - started:.0f} s", flush=True)
        replies = [reply for client in clients for reply in await client]
        watch.cancel()
        after = [await _ask(http, question) for question in questions]
    _report(options, capacity, replies, memory, started, killed_at, after)


async def _questions(http: httpx.AsyncClient, k: int) -> list[Question]:
    found = []
    for seed, item in enumerate(generate(BuiltinConfig(0, NUM_ITEMS), seed=1)[1]):
        body = request(item.messages, item.responses, k=k, seed=seed)
        reply = await http.post("/v1/judge", json=body)
        reply.raise_for_status()
        found.append(Question(body, JudgeAnswer.model_validate_json(reply.content)))
    return found


async def _client(
    http: httpx.AsyncClient, questions: Sequence[Question], number: int, end: float, interval_s: float
) -> list[Reply]:
    """One request after the other, no sooner than every `interval_s`, until `end`."""
    rng, replies = random.Random(number), list[Reply]()
    due = time.monotonic() + interval_s * rng.random()
    while due < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        replies.append(await _ask(http, rng.choice(questions)))
        due = max(due + interval_s, time.monotonic())
    return replies


async def _ask(http: httpx.AsyncClient, question: Question) -> Reply:
    sent_at = time.monotonic()
    try:
        reply = await http.post("/v1/judge", json=question.body)
    except httpx.TransportError as error:
        return Reply(sent_at, time.monotonic() - sent_at, type(error).__name__)
    seconds = time.monotonic() - sent_at
    if reply.status_code != 200:
        clean = "" if "retry-after" in reply.headers or reply.status_code not in (429, 503) else "no Retry-After"
        return Reply(sent_at, seconds, str(reply.status_code), clean)
    try:
        answer = JudgeAnswer.model_validate_json(reply.content)
    except ValidationError:
        return Reply(sent_at, seconds, "200", "not an answer")
    texts = [s.text for s in question.alone.samples]
    return Reply(
        sent_at,
        seconds,
        "200",
        fault(answer, question.body, question.alone),
        [s.text for s in answer.samples] == texts,
    )


async def _watch(memory: list[Memory]) -> None:
    while True:
        memory += await asyncio.to_thread(resident)
        await asyncio.sleep(MEMORY_PERIOD_S)


def _kill_judge() -> None:
    """End the judge's process without warning."""
    import ray

    for actor in ray.util.list_named_actors(all_namespaces=True):
        if "JudgeReplica" in actor["name"]:
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


def _report(
    options: argparse.Namespace,
    capacity: float,
    replies: Sequence[Reply],
    memory: Sequence[Memory],
    started: float,
    killed_at: float,
    after: Sequence[Reply],
) -> None:
    answers = [r for r in replies if r.outcome == "200"]
    seconds = sorted(r.seconds for r in answers)
    back = [r.sent_at + r.seconds - killed_at for r in answers if r.sent_at > killed_at]
    figures: dict[str, Any] = {
        "bench": "serve load",
        "clients": options.clients,
        "minutes": options.minutes,
        "k": options.k,
        "capacity": round(capacity, 2),
        "asked": round(len(replies) / (max(r.sent_at for r in replies) - started), 2),
        "answered": round(len(answers) / (max(r.sent_at + r.seconds for r in replies) - started), 2),
        "outcomes": dict(Counter(r.outcome for r in replies).most_common()),
        "faults": dict(Counter(r.fault for r in [*replies, *after] if r.fault)),
        "other_texts": sum(not r.same_texts for r in answers),
        "median_s": round(statistics.median(seconds), 2),
        "p95_s": round(seconds[int(0.95 * len(seconds))], 2),
        "first_answer_after_kill_s": round(min(back), 1) if back else None,
        "after_load": dict(Counter(r.outcome for r in after)),
    }
    lines = [
        "outcomes: " + ", ".join(f"{count} x {name}" for name, count in figures["outcomes"].items()),
        f"faults: {figures['faults'] or 'none'}",
        f"{figures['other_texts']} of {len(answers)} answers hold other texts than the idle service's",
        f"seconds to an answer: median {figures['median_s']}, 95 % {figures['p95_s']}",
        f"first answer to a request sent after the kill: {figures['first_answer_after_kill_s']} s after it",
        f"when the load was over, one by one: {figures['after_load']}",
    ]
    print("\n".join(lines))
    figures |= _memory_table(memory, started)
    print(json.dumps(figures))


def growth(readings: Sequence[Memory]) -> float | None:
    """MiB a minute over the second half of a process's readings, by least squares through the least reading of each
    whole `TROUGH_S`, for a judge on CPUs frees memory now and then; None for fewer than three of these."""
    half = readings[len(readings) // 2 :]
    spans = itertools.groupby(half, lambda m: (m.at - half[0].at) // TROUGH_S)
    *troughs, _ = [min(span, key=lambda m: m.mib) for _, span in spans]  # the last span may not be whole
    if len(troughs) < 3:
        return None
    return 60 * statistics.linear_regression([m.at for m in troughs], [m.mib for m in troughs]).slope


def _memory_table(memory: Sequence[Memory], started: float) -> dict[str, Any]:
    """Prints one line a process: its growth, and MiB at six times of its life under load. Gives the same, by deployment
    and process."""
    found, grown = {}, {}
    print(f"{'resident MiB at seconds':28}{'MiB/min':>10}         (growth in the second half of its life, flat up to "
          f"{FLAT:+.0f}; then six times from the first reading to the last)")  # fmt: skip
    for pid in dict.fromkeys(m.pid for m in memory):
        own = [m for m in memory if m.pid == pid]
        shown = [own[round(i * (len(own) - 1) / 5)] for i in range(6)]
        name, slope = f"{own[0].deployment} {pid}", growth(own)
        found[name], grown[name] = [round(m.mib, 1) for m in shown], None if slope is None else round(slope, 2)
        cells = "".join(f"{m.mib:10.0f} at {m.at - started:3.0f}" for m in shown)
        told = f"{'-':>10}{'':7}" if slope is None else f"{slope:+10.1f}{' flat' if slope <= FLAT else ' grows':7}"
        print(f"  {name:26}{told}{cells}")
    return {"memory_mib": found, "memory_growth_mib_per_minute": grown}
