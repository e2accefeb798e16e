"""Engines that outlive a step: a judge on reloaded weights is the judge on an engine of its own, and who keeps them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
from graph_toys import ask_kept, take_the_cpu
from tiny import make_tiny_model

from spct_ray.cluster.kept_judges import JudgeHost, JudgeSpec, family
from spct_ray.engines.base import EngineConfig
from spct_ray.engines.engine_judge import EngineJudge
from spct_ray.engines.scripted import ScriptedEngine
from spct_ray.errors import EngineError
from spct_ray.graph.runner import run_steps
from spct_ray.graph.step import Step
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Item, Message

PROMPT = JudgeConfig(template="compact", max_tokens=12)
TASKS = [
    JudgeTask(Item(f"i{i}", (Message("user", f"Name {i} primes"),), ("two", "3, 5")), order, k, temperature, 7 + k)
    for i in range(3)
    for k, (order, temperature) in enumerate([((0, 1), 0.0), ((1, 0), 1.0), ((0, 1), 1.0)])
]


class Reloading(ScriptedEngine):
    """Answers by its model's name; a model named "bad" cannot be loaded."""

    started: ClassVar[list[str]] = []

    def __init__(self, model: str, config: EngineConfig) -> None:
        super().__init__(lambda request: [f"{self.model}: \\boxed{{8, 3}}"])
        self.started.append(model)
        self.model, self.loaded = model, [model]

    def reload(self, weights_dir: str, weight_version: int) -> None:
        if weights_dir == "bad":
            raise EngineError("no such weights")
        assert weight_version == 0
        self.model = weights_dir
        self.loaded.append(weights_dir)


def test_a_host_starts_one_engine_and_reloads_for_another_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reloading, "started", [])
    host = JudgeHost(EngineConfig(), Reloading)
    first, second, best = JudgeSpec("a", PROMPT, "A"), JudgeSpec("b", PROMPT, "B"), JudgeSpec("b", PROMPT, "B-best")
    for spec in (first, first, second, best, first):
        host.load(spec)
        made = host.judge(spec, TASKS)
        assert {(t.model, t.text[0], t.weight_version) for t in made} == {(spec.name, spec.model, 0)}
    assert Reloading.started == ["a"]
    assert host._engine.loaded == ["a", "b", "a"]  # type: ignore[union-attr]

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit):  # the weights may be half new: nobody may ask this engine again
        host.judge(JudgeSpec("bad", PROMPT, "bad"), TASKS)


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
    specs = {name: JudgeSpec(str(tmp_path / name), PROMPT, "judge") for name in ("a", "b")}
    host = JudgeHost(config)
    before = host.judge(specs["a"], TASKS)
    after = host.judge(specs["b"], TASKS)
    back = host.judge(specs["a"], TASKS)
    fresh = EngineJudge(VllmEngine(specs["b"].model, config), PROMPT, "judge").judge(TASKS)
    assert after == fresh
    assert back == before
    assert all(a.text != b.text for a, b in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_actors_are_kept_for_the_next_step_like_it_and_ended_for_others(tmp_path: Path) -> None:
    """On one CPU: what is kept must be gone before another step's workers find a place."""
    import ray

    def step(name: str, function: Any, config: Any, after: str) -> Step:
        return Step(name, function, config, None, {"before": after} if after else {})

    steps = [
        step("first", ask_kept, "x", ""),
        step("second", ask_kept, "x", ""),
        step("third", ask_kept, "y", "second"),
        step("other", take_the_cpu, None, "third"),
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
    assert [made[s.name].get("there") for s in steps] == ["nothing", "the same", "another kind", None]
    assert made["first"]["pid"] == made["second"]["pid"]
    assert len({m["pid"] for m in made.values()}) == 3
