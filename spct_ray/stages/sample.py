"""Rejection sampling: several judgements of every training item, with and without a hint (paper, Section 4.1).

The sampler is a choice of its own, apart from the student: the student itself, another model, a remote endpoint, or,
for the built-in set, the checker program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.config import convert, imported
from spct_ray.data.program import ProgramConfig, ProgramJudge
from spct_ray.data.store import read_items
from spct_ray.engines.engine_judge import EngineJudge
from spct_ray.engines.host import JudgeSpec
from spct_ray.engines.remote import RemoteConfig, RemoteEngine
from spct_ray.errors import ConfigError
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import Judge, JudgeTask
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.prompt import JudgeConfig, check_items
from spct_ray.judge.seeds import derive_seed

if TYPE_CHECKING:
    from spct_ray.records import Item


SAMPLERS = ("student", "model", "endpoint", "program")


@dataclass(frozen=True)
class SamplerConfig:
    """Who judges. `model` is a directory or hub id for kind "model"; "student" reads the step's input "judge". Any
    other kind is the import path `module:Name` of a dataclass with the fields `own`; `make(prompt)` gives the judge."""

    kind: str = "student"
    model: str = ""
    endpoint: RemoteConfig | None = None
    program: ProgramConfig = field(default_factory=ProgramConfig)
    guided: bool = False  # hold the text to the format, for models that cannot write it yet
    own: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if ":" in self.kind:
            self.make_own()
        elif self.kind not in SAMPLERS:
            raise ConfigError(
                f"sampler.kind is {self.kind!r}; it is {', '.join(SAMPLERS)} or an import path module:Name"
            )

    def make_own(self) -> Any:
        """The sampler from outside the package. Raises ConfigError where it is none or does not take `own`."""
        sampler = imported(self.kind, "sampler.kind")
        if not (is_dataclass(sampler) and hasattr(sampler, "make")):
            raise ConfigError(f"sampler.kind: {self.kind} must be a dataclass with make(prompt), which returns a judge")
        return convert(sampler, self.own, "sampler.own")


@dataclass(frozen=True)
class SampleConfig:
    """N_RFT = 3 unhinted and 1 hinted judgement an item; `num_items` 0 means all training items."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    num_samples: int = 3
    num_hinted: int = 1
    temperature: float = 1.0
    num_items: int = 0


@stage(version=4)
def run(context: StepContext, config: SampleConfig, resources: SamplingResources) -> dict[str, Any]:
    """Judge the training items; writes trajectories/*.parquet and timing.json. Returns the counts."""
    from spct_ray.cluster.sampling import sample

    items = read_items(str(Path(context.inputs["items"]) / "train.parquet"))
    items = items[: config.num_items] if config.num_items else items
    check_items(items, config.judge)
    tasks = [task for item in items for task in tasks_of(item, config, derive_seed(context.seed, context.name))]
    with judges(config.sampler, config.judge, resources, context) as (make_judge, where):
        return {**sample(tasks, make_judge, context.out, where, context.progress), "items": len(items)}


def tasks_of(item: Item, config: SampleConfig, seed: int) -> list[JudgeTask]:
    """The judgements of one item: responses in balanced orders, seeds from (seed, item id, sample number)."""
    tasks = []
    for hinted, num in ((False, config.num_samples), (True, config.num_hinted)):
        orders = balanced_orders(len(item.responses), num, derive_seed(seed, item.id, int(hinted))) if num else []
        tasks += [
            JudgeTask(item, order, k, config.temperature, derive_seed(seed, item.id, int(hinted), k), hinted)
            for k, order in enumerate(orders)
        ]
    return tasks


@contextmanager
def judges(
    sampler: SamplerConfig, judge: JudgeConfig, resources: SamplingResources, context: StepContext
) -> Iterator[tuple[Callable[[], Judge], SamplingResources]]:
    """A picklable function that makes the judge inside a Ray Data actor, and what such an actor takes. Raises
    ConfigError when the choice lacks its field."""
    if ":" in sampler.kind:
        yield partial(sampler.make_own().make, judge), resources
    elif sampler.kind == "program":
        yield partial(ProgramJudge, sampler.program, judge), resources
    elif sampler.kind == "endpoint":
        if sampler.endpoint is None:
            raise ConfigError("sampler.kind is endpoint, but sampler.endpoint (base_url, model) is not set")
        yield partial(remote_judge, sampler.endpoint, judge, sampler.guided), resources
    else:
        from spct_ray.cluster.pool import close_judge_pool, judge_pool

        if sampler.kind == "model" and not sampler.model:
            raise ConfigError("sampler.kind is model, but sampler.model (a directory or hub id) is empty")
        student = Path(context.inputs.get("judge", ""))
        model, name = str(student / "model"), student.name.rsplit("-", 1)[0]
        if sampler.kind == "model":
            model = name = sampler.model
        pool = judge_pool(model, resources, context.log)
        try:
            yield pool.judge_maker(JudgeSpec(judge, name, sampler.guided)), resources.senders
        finally:
            close_judge_pool()


def remote_judge(endpoint: RemoteConfig, judge: JudgeConfig, guided: bool = False, in_chunks: bool = False) -> Judge:
    """A judge behind an endpoint."""
    return EngineJudge(RemoteEngine(endpoint), judge, endpoint.model, guided, in_chunks)
