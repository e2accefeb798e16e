"""What principles do to judging: its tokens, its time and its accuracy.

The same items are judged by the judge's own principles, which it writes anew in each sample; by such as it writes once
from the query, the first time (generated) and again (cached); and by given ones: those of the item, or the requirements
of a built-in item. Items are held-out ones of the run, or built-in ones. Engine, gateway and cache are the service's,
in this process, without HTTP and meta RM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.bench.serve import add_service_arguments, service_config
from spct_ray.data.builtin import SOURCE, BuiltinConfig, generate, requirements_of
from spct_ray.data.program import criteria
from spct_ray.data.store import judged_files, read_items
from spct_ray.engines.base import Engine
from spct_ray.errors import ConfigError, RequestError
from spct_ray.evaluation.judgements import Sheet, best_credit, options_of
from spct_ray.evaluation.statistics import bootstrap_ci, paired_difference
from spct_ray.graph.targets import newest_step, parse_target
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Item
from spct_ray.serve.backends import LocalJudge
from spct_ray.serve.deployment import ServeConfig
from spct_ray.serve.gateway import Gateway
from spct_ray.serve.schema import MAX_SEED, JudgeAnswer, JudgeRequest, MessageIn

OWN, GENERATED, CACHED, GIVEN = "own", "generated", "cached", "given"
NUM_ALONE = 10  # items that are judged one by one, for the time of a request that nothing else delays
SEED = 1


@dataclass(frozen=True)
class Pass:
    """All items judged in one way: the answers (None: too long with these principles), and seconds for all of them."""

    answers: tuple[JudgeAnswer | None, ...]
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the bench."""
    add_service_arguments(parser)
    parser.add_argument(
        "--model", required=True, metavar="RUN_OR_MODEL", help="a trained judge: a random one writes none"
    )
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3, help="passes over all items in each way")


def run(options: argparse.Namespace) -> None:
    """Start the engine, measure, print the report."""
    config = service_config(options.model, options)
    items = _items(options.model, options.items)
    from spct_ray.engines.vllm import VllmEngine

    engine = VllmEngine(config.judge_model, config.resources.engine)
    try:
        report(items, *asyncio.run(measure(config, engine, items, options.k, options.runs)), options.k)
    finally:
        engine.close()


def rubric(item: Item) -> str:
    """The principles given with an item: its own or, of a built-in one, its requirements; "" where there are none."""
    if item.principles or item.source != SOURCE:
        return item.principles
    return criteria(requirements_of(item))


def credit(item: Item, answer: JudgeAnswer | None) -> float:
    """The chance that the vote is right when it breaks its ties at random; 0 without a usable sample."""
    if answer is None or answer.mean_scores is None:
        return 0.0
    options = options_of(answer.mean_scores, sum(answer.scale) / 2)
    return float(best_credit(Sheet.of([item]), np.array([options]))[0])


async def measure(
    config: ServeConfig, engine: Engine, items: Sequence[Item], k: int, runs: int
) -> tuple[dict[str, list[Pass]], dict[str, list[Pass]]]:
    """Passes by way: over all items at once, and over `NUM_ALONE` of them one by one; `runs` of each, in turns."""
    judge = LocalJudge(engine, config)
    ways = (OWN, GENERATED, CACHED, *((GIVEN,) if all(map(rubric, items)) else ()))
    found: tuple[dict[str, list[Pass]], ...] = ({way: [] for way in ways}, {way: [] for way in ways})
    for number in range(runs):
        for passes, judged, width in ((found[0], items, len(items)), (found[1], items[:NUM_ALONE], 1)):
            gateway = Gateway(config, judge, None)  # a new one has no principles yet
            for way in ways:
                engine.reload(config.judge_model, engine.weight_version)  # no prompt is cached from another way
                passes[way].append(await _judge(gateway, judged, way, k, number, width))
    return found[0], found[1]


async def _judge(gateway: Gateway, items: Sequence[Item], way: str, k: int, number: int, width: int) -> Pass:
    async def one(item: Item) -> JudgeAnswer | None:
        seed = derive_seed(SEED, item.id, number) % MAX_SEED  # the same orders and sampling seeds in each way
        request = JudgeRequest(
            messages=[MessageIn(role=m.role, content=m.content) for m in item.messages],
            responses=list(item.responses),
            k=k,
            seed=seed,
            reference=item.reference,
            principles=rubric(item) if way == GIVEN else "" if way == OWN else "auto",
        )
        try:
            async with gateway.parts:
                return await gateway.answer(request)
        except RequestError:
            return None

    started = time.perf_counter()
    answers: list[JudgeAnswer | None] = []
    for start in range(0, len(items), width):
        answers += await asyncio.gather(*map(one, items[start : start + width]))
    return Pass(tuple(answers), time.perf_counter() - started)


def report(items: Sequence[Item], passes: dict[str, list[Pass]], alone: dict[str, list[Pass]], k: int) -> None:
    """Print the table and the JSON."""
    print(f"{len(items)} items, k = {k}, plain vote; tokens and time of a judgement, with those of its principles")
    print(f"{'principles':11}{'shown':>7}{'read':>8}{'written':>9}{'ms':>8}{'alone, s':>10}{'parsed':>8}"
          f"{'too long':>10}{'accuracy':>22}{'less own, points':>22}")  # fmt: skip
    credits = {way: _credits(items, made) for way, made in passes.items()}
    found: dict[str, Any] = {}
    for way, made in passes.items():
        answers = [answer for one in made for answer in one.answers if answer]
        judgements = max(1, sum(answer.num_samples for answer in answers))
        failed = sum(sum(answer.failures.values()) for answer in answers)
        low, high = bootstrap_ci(credits[way], SEED)
        difference = paired_difference(credits[way], credits[OWN], SEED)
        row = found[way] = {
            "shown": sum(bool(answer.principles) for answer in answers) / max(1, len(answers)),
            "read": sum(answer.prompt_tokens for answer in answers) / judgements,
            "written": sum(answer.completion_tokens for answer in answers) / judgements,
            "ms": 1000 * sum(one.seconds for one in made) / judgements,
            "alone_s": statistics.median(one.seconds / len(one.answers) for one in alone[way]),
            "parsed": 1 - failed / judgements,
            "too_long": sum(answer is None for one in made for answer in one.answers),
            "accuracy": sum(credits[way]) / len(items),
            "ci": (low, high),
            "difference": difference.difference,
            "difference_ci": difference.ci,
        }
        accuracy = f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        less = f"{100 * difference.difference:+.1f} [{100 * difference.ci[0]:+.1f}, {100 * difference.ci[1]:+.1f}]"
        print(f"{way:11}{row['shown']:>7.0%}{row['read']:>8.1f}{row['written']:>9.1f}{row['ms']:>8.2f}"
              f"{row['alone_s']:>10.3f}{row['parsed']:>8.1%}{row['too_long']:>10}{accuracy:>22}"
              f"{'' if way == OWN else less:>22}")  # fmt: skip
    rounded = {
        way: {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()} for way, row in found.items()
    }
    print(json.dumps({"bench": "serve principles", "items": len(items), "k": k, "runs": len(passes[OWN])} | rounded))


def _credits(items: Sequence[Item], made: Sequence[Pass]) -> list[float]:
    """[I] means over passes."""
    return [statistics.fmean(credit(item, one.answers[i]) for one in made) for i, item in enumerate(items)]


def _items(target: str, number: int) -> list[Item]:
    """Held-out items of the run `target`, drawn; built-in ones for a model. Raises ConfigError."""
    meant = parse_target(target)
    if meant.model:
        return generate(BuiltinConfig(0, number), SEED)[1]
    file = judged_files(newest_step(meant, "items")[1]).get("heldout")
    if file is None:
        raise ConfigError(f"{target}: no held-out items of a finished run; give a model directory for built-in ones")
    found = read_items(str(file))
    return random.Random(SEED).sample(found, min(number, len(found)))
