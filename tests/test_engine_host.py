"""One host for all who ask an engine, and engines that outlive a step, as steps share a process."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from graph_toys import keep_actor, own_actor
from tiny import make_tiny_model

from spct_ray.cluster import pool
from spct_ray.cluster.pool import BACKGROUND_NICENESS, background_engine, family
from spct_ray.engines.base import EngineConfig, Weights
from spct_ray.engines.engine_judge import EngineJudge
from spct_ray.engines.host import EngineHost, JudgeSpec
from spct_ray.errors import EngineError
from spct_ray.graph.runner import run_steps
from spct_ray.graph.step import Step
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Item, Message
from tests.scripted_engine import ScriptedEngine

PROMPT = JudgeConfig(template="compact", max_tokens=12)
TASKS = [
    JudgeTask(Item(f"i{i}", (Message("user", f"Name {i} primes"),), ("two", "3, 5")), order, k, temperature, 7 + k)
    for i in range(3)
    for k, (order, temperature) in enumerate([((0, 1), 0.0), ((1, 0), 1.0), ((0, 1), 1.0)])
]


class Reloading(ScriptedEngine):
    """Answers by its model's name; a model named "bad" cannot be loaded."""

    def __init__(self, model: str) -> None:
        super().__init__(lambda request: [f"{self.loaded[-1]}: \\boxed{{8, 3}}"])
        self.loaded = [model]

    def reload(self, weights_dir: str, weight_version: int) -> None:
        if weights_dir == "bad":
            raise EngineError("no such weights")
        super().reload(weights_dir, weight_version)
        self.loaded.append(weights_dir)


class Mourned(EngineHost):
    causes: tuple[str, ...] = ()

    def engine_died(self, error: EngineError) -> None:
        self.causes = (*self.causes, str(error))


def test_a_host_loads_the_weights_that_a_call_is_for_once() -> None:
    engine = Reloading("a")
    host = Mourned(engine, "a")

    for weights, name in (("a", 0), "A"), (("a", 0), "A"), (("b", 0), "B"), (("b", 0), "B-best"), (("a", 1), "A"):
        held = Weights(*weights)
        judged = host.judge_block(held, JudgeSpec(PROMPT, name), TASKS)
        assert {(t.model, t.text[0], t.weight_version) for t in judged} == {(name, held.directory, held.version)}
    assert engine.loaded == ["a", "b", "a"]
    assert host.call(Weights("c", 2), "prompt_logprobs", [[1, 2]]) == [[-1.0]]
    assert engine.weight_version == 2
    for _ in range(2):  # the weights may be half new: they are not taken for loaded
        with pytest.raises(EngineError, match="no such weights"):
            host.judge_block(Weights("bad"), JudgeSpec(PROMPT, "bad"), TASKS)
    assert host.causes == ("no such weights",) * 2


def test_a_family_is_architecture_and_tokenizer_and_not_how_they_were_saved(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "a", seed=1)
    make_tiny_model(tmp_path / "b", seed=2)
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps(config | {"dtype": "float32", "transformers_version": "9"}))
    assert family(str(tmp_path / "a")) == family(str(tmp_path / "b"))
    for name, change in (("config.json", {"num_hidden_layers": 3}), ("tokenizer_config.json", {"eos_token": "x"})):
        values = json.loads((tmp_path / "b" / name).read_text())
        (tmp_path / "b" / name).write_text(json.dumps(values | change))
        assert family(str(tmp_path / "a")) != family(str(tmp_path / "b"))
        (tmp_path / "b" / name).write_text(json.dumps(values))
    (tmp_path / "b/tokenizer.json").write_text("{}")
    assert family(str(tmp_path / "a")) != family(str(tmp_path / "b"))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_after_a_reload_a_judge_says_what_it_says_on_an_engine_of_its_own(tmp_path: Path) -> None:
    """The same prompts before and after, so that a prefix kept from the old weights would show."""
    from spct_ray.engines.vllm import VllmEngine

    config = EngineConfig(max_model_len=256, kv_cache_gib=0.1, max_num_seqs=16)
    for name, seed in (("a", 1), ("b", 2)):
        make_tiny_model(tmp_path / name, tied=True, seed=seed)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    host = EngineHost(VllmEngine(a, config), a)

    before, after, back = (host.judge_block(Weights(model), JudgeSpec(PROMPT, "judge"), TASKS) for model in (a, b, a))
    fresh = EngineJudge(VllmEngine(b, config), PROMPT, "judge").judge(TASKS)
    assert after == fresh
    assert back == before
    assert all(a.text != b.text for a, b in zip(before, after, strict=True))


def test_an_engine_in_the_background_yields_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """It and what it starts, but not the rest of the process."""

    def niceness(*_: object) -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)  # of the thread

    before = niceness()
    monkeypatch.setattr(pool, "vllm_engine", niceness)
    with ThreadPoolExecutor(1) as thread:
        engine = thread.submit(background_engine, "model", EngineConfig()).result()
    assert engine == min(19, before + BACKGROUND_NICENESS)
    assert niceness() == before


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_steps_share_a_process_and_what_it_owns_ends_before_others_start(tmp_path: Path) -> None:
    """On one CPU: what the process owns must be gone before another step's workers find a place."""
    import ray

    def step(name: str, function: Any, config: Any, after: str) -> Step:
        return Step(name, function, config, None, {"before": after} if after else {})

    steps = [
        step("first", keep_actor, None, ""),
        step("second", keep_actor, None, ""),
        step("third", keep_actor, None, "second"),
        step("other", own_actor, None, "third"),
    ]
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.getcwd()])}},
    )
    try:
        records = run_steps(steps, str(tmp_path), 1, "spct run x", lambda line: None)
    finally:
        ray.shutdown()
    made = {name: record.metrics for name, record in records.items()}
    assert made["first"] == made["second"] == made["third"]
    assert made["first"]["process"] not in (made["other"]["process"], os.getpid())
    assert made["first"]["actor"] != made["other"]["actor"]
    written = {s.name: (tmp_path / "logs" / f"{s.name}.log").read_text() for s in steps}
    assert all(
        [f"warns {name}" in log for name in written] == [name == own for name in written]
        for own, log in written.items()
    )
