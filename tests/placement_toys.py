"""What tests of placement run in Ray's workers: engines, a judge and a step that say how many GPUs they see."""

from __future__ import annotations

import os
from typing import Any

from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.engines.base import EngineConfig, EngineResources, Request, SamplingParams
from spct_ray.engines.host import JudgeSpec
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Item, Message
from spct_ray.serve.backends import LocalJudge
from spct_ray.serve.deployment import ServeConfig
from tests.scripted_engine import ScriptedEngine

TASKS = [JudgeTask(Item(f"i{i}", (Message("user", "Which?"),), ("a", "b")), (0, 1), 0, 0.0, 1) for i in range(4)]


def visible() -> list[str]:
    return [number for number in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if number]


class SeeingEngine(ScriptedEngine):
    """Says how many GPUs its process sees."""

    def __init__(self, model: str = "", config: EngineConfig | None = None) -> None:
        super().__init__(lambda request: [f"{len(visible())} GPUs \\boxed{{8, 3}}"])


class SeeingJudge(LocalJudge):
    def __init__(self, config: ServeConfig) -> None:
        super().__init__(SeeingEngine(), config)


@stage(version=1)
def see(context: StepContext, config: Any, resources: SamplingResources) -> dict[str, Any]:
    """A step: what its own process, a task, engines of judges and engines of rollouts see."""
    import ray

    from spct_ray.cluster.pool import EnginePool, close_judge_pool, judge_pool

    pool = judge_pool(config, resources, context.log, SeeingEngine)
    make_judge = pool.judge_maker(JudgeSpec(JudgeConfig(template="compact"), "judge"))
    judges = [make_judge() for _ in range(resources.num_replicas)]
    kept = {t.text.split()[0] for judge in judges for t in judge.judge(TASKS)}
    in_use = ray.cluster_resources()["GPU"] - ray.available_resources().get("GPU", 0)
    close_judge_pool()
    pool = EnginePool("none", EngineConfig(), EngineResources(2, 0, 1), SeeingEngine)
    pooled = {c.text.split()[0] for (c,) in pool.generate([_request(i) for i in range(8)])}
    pool.close()
    worker = ray.get(ray.remote(num_cpus=0)(visible).remote())
    return {"own": visible(), "worker": worker, "kept": sorted(kept), "pooled": sorted(pooled), "in_use": in_use}


def _request(number: int) -> Request:
    return Request((Message("user", str(number)),), SamplingParams(max_tokens=99))
