"""Judgements of held-out items and benchmarks by one model: greedy once, and k_max samples for the votes.

Every smaller k, and meta voting, is computed from these samples by `stages.report`: nothing is generated twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.config import rebuild
from spct_ray.data.store import judged_files, read_items
from spct_ray.engines.base import Request, SamplingParams
from spct_ray.engines.host import JudgeSpec
from spct_ray.engines.remote import RemoteConfig, RemoteEngine
from spct_ray.errors import ConfigError, DataError, RequestError
from spct_ray.graph.record import read_record
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import Judge, JudgeTask
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.prompt import JudgeConfig, check_items
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Item, Message
from spct_ray.stages.sample import remote_judge


@dataclass(frozen=True)
class EvaluateConfig:
    """`k_max` samples an item at `temperature` (paper: 0.5; 0: none) beside its greedy judgements.

    `single` is the scale for n = 1 at test time (paper: 1..10); it replaces the training prompt's. `endpoint` names a
    judge that does not run here ("MODEL at URL"; how it is asked is a resource); else the judge is an input. Responses
    that do not fit one prompt are judged `in_chunks`, or not at all (the failure "too_long").
    """

    judge: JudgeConfig = field(default_factory=JudgeConfig)
    single: Literal["binary", "scale"] = "scale"
    k_max: int = 8
    temperature: float = 0.5
    endpoint: str = ""
    in_chunks: bool = False

    @property
    def prompt(self) -> JudgeConfig:
        """The prompt at test time."""
        return replace(self.judge, single=self.single)


@dataclass(frozen=True)
class EndpointResources:
    """How a judge that does not run here is asked, and how many judgements make a block."""

    endpoint: RemoteConfig
    block_size: int = 64


@stage(version=3, keeps=True)
def run(context: StepContext, config: EvaluateConfig, resources: SamplingResources) -> dict[str, Any]:
    """Judge all held-out and benchmark items with input "judge", in two orders greedily where n >= 2 (of a pair, both);
    writes trajectories/*.parquet and timing.json."""
    from spct_ray.cluster.pool import background_engine, judge_pool

    name, model = context.name.removeprefix("evaluate_"), str((Path(context.inputs["judge"]) / "model").resolve())
    pool = judge_pool(model, resources, context.log, background_engine)
    spec = JudgeSpec(config.prompt, name, in_chunks=config.in_chunks)
    return _judge(context, config, resources.senders, pool.judge_maker(spec))


@stage(version=3)
def run_endpoint(context: StepContext, config: EvaluateConfig, resources: EndpointResources) -> dict[str, Any]:
    """As `run`, by a judge behind an endpoint. Raises ConfigError and EngineError before anything is asked
    when it cannot be reached."""
    _greet(resources.endpoint)
    make_judge = partial(remote_judge, resources.endpoint, config.prompt, False, config.in_chunks)
    return _judge(context, config, SamplingResources(block_size=resources.block_size), make_judge)


def config_of(directory: str) -> EvaluateConfig:
    """How a finished evaluation judged. Raises DataError without its record, ConfigError for one of another version."""
    record = read_record(directory)
    if record is None:
        raise DataError(f"{directory}: no record of a finished evaluation; run the step again")
    return rebuild(EvaluateConfig, record.config, f"{directory}/record.json: config")


def _judge(
    context: StepContext,
    config: EvaluateConfig,
    resources: SamplingResources,
    make_judge: Callable[[], Judge],
) -> dict[str, Any]:
    from spct_ray.cluster.sampling import sample

    files = judged_files(context.inputs["items"]).values()
    items = [item for file in files for item in read_items(str(file))]
    check_items(items, config.prompt)
    tasks = [task for item in items for task in tasks_of(item, config, context.seed)]
    return {**sample(tasks, make_judge, context.out, resources, context.progress), "items": len(items)}


def _greet(endpoint: RemoteConfig) -> None:
    """Ask for one token, so that a wrong URL, model or key is told at once and not by every worker."""
    engine = RemoteEngine(replace(endpoint, max_attempts=2))
    try:
        engine.generate([Request((Message("user", "Hello"),), SamplingParams(max_tokens=1, temperature=0.0))])
    except RequestError as error:
        raise ConfigError(f"{endpoint.base_url}, model {endpoint.model}: {error}") from error
    finally:
        engine.close()


def tasks_of(item: Item, config: EvaluateConfig, seed: int) -> list[JudgeTask]:
    """Two greedy (one for n = 1) and k_max sampled tasks; the orders and seeds are the same for every model,
    so that models pair up."""
    num = len(item.responses)
    greedy = balanced_orders(num, min(num, 2), derive_seed(seed, item.id, "greedy"))
    orders = balanced_orders(num, config.k_max, derive_seed(seed, item.id, "vote")) if config.k_max else []
    return [
        *(JudgeTask(item, order, j, 0.0, derive_seed(seed, item.id, "greedy", j)) for j, order in enumerate(greedy)),
        *(
            JudgeTask(item, order, k, config.temperature, derive_seed(seed, item.id, "vote", k))
            for k, order in enumerate(orders)
        ),
    ]
