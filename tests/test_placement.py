"""Which GPUs processes ask for, what has no room, and that it is told before anything starts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spct_ray.cli import main
from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.config import load, override
from spct_ray.engines.base import EngineConfig
from spct_ray.errors import ConfigError
from spct_ray.graph.step import Step
from spct_ray.placement import check_engine, check_room, gpus_of
from spct_ray.stages import evaluate, grpo
from spct_ray.stages.evaluate import EvaluateConfig
from spct_ray.stages.meta_scores import MetaScoresResources
from spct_ray.stages.recipe import Recipe

NODES = [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}]


def test_what_is_left_open_takes_what_it_needs_where_there_are_gpus() -> None:
    assert [gpus_of(None, 2, nodes) for nodes in (NODES, NODES[:1], [])] == [2, 0, 0]
    assert gpus_of(0, 2, NODES) == 0


def test_an_engine_is_divided_over_as_many_gpus_as_it_asks_for() -> None:
    for gpus, size in ((None, 4), (4, 4), (1, 1), (0.5, 1), (0, 1)):
        check_engine(gpus, size, 0.5)
    for gpus, size in ((0, 2), (0.5, 2), (1, 2), (2, 1), (1.5, 1), (-1, 1)):
        with pytest.raises(ConfigError, match=f"tensor_parallel {size} takes {size} GPUs, but {gpus} are asked for"):
            check_engine(gpus, size, 0.5)
    with pytest.raises(ConfigError, match=r"0\.5 of a GPU would take 0\.6 of its memory"):
        check_engine(0.5, 1, 0.6)
    with pytest.raises(ConfigError, match="but 1 are asked for"):
        SamplingResources(gpus_per_replica=1, engine=EngineConfig(tensor_parallel=2))


def test_a_process_has_its_gpus_on_one_node() -> None:
    check_room({}, {"judge": [2], "meta": [0.4, 0.6, 1]}, NODES, "less")
    with pytest.raises(
        ConfigError, match=r"4 GPUs are asked for \(judge 4; .*\), and there are 2 \+ 2 on the nodes: less"
    ):
        check_room({}, {"judge": [4]}, NODES, "less")
    with pytest.raises(ConfigError, match=r"4\.8 GPUs are asked for \(judge 2 x 2, meta 0\.8; .*2 \+ 2 on"):
        check_room({}, {"judge": [2, 2], "meta": [0.8], "gateway": [0]}, NODES, "less")
    with pytest.raises(ConfigError, match=r"1\.8 GPUs are asked for \(meta 3 x 0\.6; .*and there are 2: less"):
        check_room({}, {"meta": [0.6] * 3}, NODES[:2], "less")  # parts of one GPU, not of two
    with pytest.raises(ConfigError, match=r"25 CPUs are asked for \(judge 24, meta 1\), and there are 24: less"):
        check_room({"judge": 24, "meta": 1, "gateway": 0}, {}, NODES, "less")


def fits_somehow(sizes: Sequence[int], nodes: Sequence[int]) -> bool:
    return any(
        all(sum(s for s, at in zip(sizes, places, strict=True) if at == i) <= node for i, node in enumerate(nodes))
        for places in itertools.product(range(len(nodes)), repeat=len(sizes))
    )


@given(st.lists(st.sampled_from([1, 2, 4]), max_size=5), st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_powers_of_two_are_refused_only_where_no_placement_exists(sizes: list[int], nodes: list[int]) -> None:
    try:
        check_room({}, {"it": sizes}, [{"CPU": 1.0, "GPU": float(num)} for num in nodes], "")
    except ConfigError:
        assert not fits_somehow(sizes, nodes)
    else:
        assert fits_somehow(sizes, nodes)


def test_steps_take_what_they_left_open_and_say_so_to_whoever_admits_them() -> None:
    left = SamplingResources(2, 1, None, engine=EngineConfig(tensor_parallel=2))
    step = Step("evaluate_a", evaluate.run, EvaluateConfig(), left)
    assert (step.cpus, step.gpus_of_each) == (2, (0, 0))
    there = step.placed(NODES)
    assert (there.resources.gpus_per_replica, there.gpus_of_each) == (2, (2, 2))
    assert there.keeps == str(there.resources)  # the name under which the step keeps its engines
    stated = Step("evaluate_a", evaluate.run, EvaluateConfig(), SamplingResources())
    assert stated.placed(NODES) is stated
    there.check_room(NODES)
    with pytest.raises(ConfigError, match=r"evaluate_a 2 x 2; .*there are 2: lower the resources of step evaluate_a"):
        there.check_room(NODES[:2])
    with pytest.raises(ConfigError, match="takes 2 GPUs, but 0 are asked for"):
        step.placed(NODES[:1])
    scoring = Step("scores", evaluate.run, None, MetaScoresResources(gpus_per_replica=None))
    assert [scoring.placed(nodes).gpus_of_each for nodes in (NODES, NODES[:1])] == [(1,), (0,)]


def test_the_demand_of_grpo_is_that_of_ranks_and_engines() -> None:
    where = load(Recipe, "conf/paper.yaml").resources.grpo
    gpus = Step("grpo", grpo.run, None, where).gpus_of_each
    assert sorted(gpus) == [1.0] * where.train.num_workers + [2.0] * where.rollout.num_replicas


@dataclass(frozen=True)
class _Outer:
    inner: SamplingResources = field(default_factory=SamplingResources)
    name: str = "x"


def test_an_override_changes_one_value_of_a_dataclass() -> None:
    before = _Outer(SamplingResources(num_replicas=3, engine=EngineConfig(max_model_len=99)), "y")
    after = override(before, ["inner.engine.dtype=float32", "inner.gpus_per_replica=null"])
    assert after == _Outer(SamplingResources(3, 1, None, engine=EngineConfig(99, dtype="float32")), "y")
    assert override(before, []) == before
    with pytest.raises(ConfigError, match=r"override 'inner.engine.dtpe=x': .*did you mean 'inner.engine.dtype'"):
        override(before, ["inner.engine.dtpe=x"])


def test_a_run_that_cannot_fit_its_gpus_is_refused_before_anything_is_made(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    arguments = ["conf/single_gpu.yaml", f"root={root}", "resources.cluster.gpu_gib=8"]
    assert main(["run", *arguments]) == 2
    refused = capsys.readouterr()
    assert main(["plan", *arguments]) == 2
    assert refused.err == capsys.readouterr().err
    assert "this plan cannot fit" in refused.err
    assert not root.exists()
