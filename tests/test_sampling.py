"""Sampling on a real Ray Data: every task once, also after judges and drivers die; and what selection makes of it."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_engines_remote import Endpoint

from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.data.builtin import BuiltinConfig, generate
from spct_ray.data.program import ProgramConfig, ProgramJudge
from spct_ray.data.store import write_items
from spct_ray.engines.engine_judge import EngineJudge
from spct_ray.engines.remote import RemoteConfig
from spct_ray.errors import ConfigError, DataError, EngineError
from spct_ray.graph.step import StepContext
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.judge.rule import is_correct
from spct_ray.records import Item, Message
from spct_ray.stages import evaluate, sample, select
from tests.scripted_engine import ScriptedEngine

JUDGE = JudgeConfig(template="compact")


def items_dir(tmp_path, num=40):
    train, heldout = generate(BuiltinConfig(size_train=num, size_heldout=10), 1)
    directory = tmp_path / "items"
    directory.mkdir(exist_ok=True)
    write_items(str(directory / "train.parquet"), train)
    write_items(str(directory / "heldout.parquet"), heldout)
    return directory, train


def context(tmp_path, name="sample", **inputs):
    out = tmp_path / name
    out.mkdir(exist_ok=True)
    return StepContext(name, 1, str(out), {role: str(d) for role, d in inputs.items()}, "spct run x")


def program_config(**changes):
    sampler = sample.SamplerConfig("program", program=ProgramConfig(**changes))
    return sample.SampleConfig(sampler=sampler, judge=JUDGE)


def test_tasks_are_balanced_and_seeded(tmp_path):
    _, train = items_dir(tmp_path)
    item = next(i for i in train if len(i.responses) == 2)
    tasks = sample.tasks_of(item, sample.SampleConfig(num_samples=4), 7)
    assert [t.hinted for t in tasks] == [False] * 4 + [True]
    assert sorted(t.order for t in tasks[:4]) == [(0, 1), (0, 1), (1, 0), (1, 0)]
    assert len({t.seed for t in tasks}) == 5
    assert tasks == sample.tasks_of(item, sample.SampleConfig(num_samples=4), 7)
    assert [t.seed for t in tasks] != [t.seed for t in sample.tasks_of(item, sample.SampleConfig(num_samples=4), 8)]
    greedy, other, *votes = evaluate.tasks_of(item, evaluate.EvaluateConfig(k_max=4), 7)
    assert (greedy.temperature, other.temperature, {v.temperature for v in votes}) == (0.0, 0.0, {0.5})
    assert greedy.order == other.order[::-1]
    assert not [t for t in evaluate.tasks_of(item, evaluate.EvaluateConfig(k_max=0), 7) if t.temperature]


def test_program_judge_errs_in_format_and_in_what_it_reads(tmp_path):
    train, _ = generate(BuiltinConfig(size_train=600, size_heldout=1), 3)
    config = ProgramConfig((0, 0, 0, 1), alien=0, finding_error=0.05, format_error=0.1)
    tasks = [t for i in train for t in sample.tasks_of(i, sample.SampleConfig(), 5)]
    made = list(zip(tasks, ProgramJudge(config, JUDGE).judge(tasks), strict=True))
    failed = [t for _, t in made if t.failure]
    assert 0.08 < len(failed) / len(made) < 0.12
    assert len({t.failure for t in failed}) >= 3
    parsed = [(task, t) for task, t in made if not t.failure]
    wrong = [t for task, t in parsed if not is_correct(t.scores, task.item.rewards)]
    assert not [t for t in wrong if t.hinted]
    unhinted = [t for _, t in parsed if not t.hinted]
    assert 0.1 < len(wrong) / len(unhinted) < 0.4  # thorough, it errs by misreading alone


@pytest.mark.parametrize("kind", ["endpoint", "model"])
def test_sampler_needs_its_field(tmp_path, kind):
    judges = sample.judges(sample.SamplerConfig(kind), JUDGE, SamplingResources(), context(tmp_path))
    with pytest.raises(ConfigError, match=rf"sampler\.{kind}"), judges:
        pass


@pytest.fixture(scope="module")
def ray_session():
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},  # workers import this module
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)  # sampling that waits for a CPU waits for ever
def test_sample_and_select(tmp_path, ray_session):
    from spct_ray.cluster.sampling import read_trajectories

    items, train = items_dir(tmp_path)
    here = context(tmp_path, items=items)
    every_cpu = SamplingResources(cpus_per_replica=3, block_size=50)  # reading and writing must not wait for one
    made = sample.run(here, program_config(), every_cpu)
    found = read_trajectories(here.out)
    assert len(found) == len({t.key for t in found}) == 160 == made["judgements"]
    assert sorted({t.item_id for t in found}) == sorted(i.id for i in train)
    chosen = context(tmp_path, "select", items=items, sample=here.out)
    report = select.run(chosen, select.SelectConfig(JUDGE), None)
    sft = pq.read_table(Path(chosen.out) / "sft.parquet").to_pylist()
    assert report["accepted"] == len(sft) > 20
    assert sum(report["counts"].values()) == 160
    assert not [row for row in sft if "best response is" in row["prompt"][0]["content"]]
    assert [row for row in sft if "/h" in row["key"]]
    again = sample.run(here, program_config(), SamplingResources(block_size=50))
    assert again["judgements"] == 0  # everything was there
    assert read_trajectories(here.out) == found


def dying_judge(marker, deaths):
    """A judge whose engine dies on its first call until `deaths` actors have died."""
    died = len(list(Path(marker).glob("death-*")))
    if died < deaths:
        (Path(marker) / f"death-{died}").touch()
        engine = ScriptedEngine(lambda request: ["\\boxed{1}"], calls_to_live=0)
    else:
        engine = ScriptedEngine(lambda request: ["Scores: \\boxed{9, 1}"])
    return EngineJudge(engine, JUDGE, "scripted")


@pytest.mark.slow
def test_a_dead_engine_is_replaced_and_its_block_done_again(tmp_path, ray_session):
    from spct_ray.cluster.sampling import read_trajectories
    from spct_ray.cluster.sampling import sample as sample_tasks

    _, train = items_dir(tmp_path)
    tasks = [t for i in train for t in sample.tasks_of(i, sample.SampleConfig(), 5)]
    out = tmp_path / "out"
    out.mkdir()
    made = sample_tasks(
        tasks, partial(dying_judge, str(tmp_path), 2), str(out), SamplingResources(block_size=40), lambda *a: None
    )
    assert len(list(tmp_path.glob("death-*"))) == 2
    assert made["judgements"] == 160
    assert len({t.key for t in read_trajectories(str(out))}) == 160


@pytest.mark.slow
def test_sampling_resumes_with_another_block_size(tmp_path, ray_session):
    """What was judged in small blocks counts, and larger blocks hold only the rest."""
    from spct_ray.cluster.sampling import read_trajectories
    from spct_ray.cluster.sampling import sample as sample_tasks

    _, train = items_dir(tmp_path, 3)
    tasks = [t for i in train for t in sample.tasks_of(i, sample.SampleConfig(), 5)]
    make_judge, where = partial(dying_judge, str(tmp_path), 0), [SamplingResources(block_size=b) for b in (2, 6)]
    sample_tasks(tasks[:4], make_judge, str(tmp_path), where[0], lambda *a: None)
    sample_tasks(tasks, make_judge, str(tmp_path / "whole"), where[0], lambda *a: None)
    assert sample_tasks(tasks, make_judge, str(tmp_path), where[1], lambda *a: None)["judgements"] == 8
    assert sample_tasks(tasks, make_judge, str(tmp_path / "whole"), where[1], lambda *a: None)["judgements"] == 0
    for directory in (tmp_path, tmp_path / "whole"):
        assert len({t.key for t in read_trajectories(str(directory))}) == 12
        assert len(list((directory / "tasks").glob("*.parquet"))) == 2


@pytest.mark.slow
def test_an_engine_that_always_dies_ends_in_a_clear_error(tmp_path, ray_session):
    from spct_ray.cluster.sampling import sample as sample_tasks

    _, train = items_dir(tmp_path)
    tasks = [t for i in train for t in sample.tasks_of(i, sample.SampleConfig(), 5)]
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(EngineError, match="died"):
        sample_tasks(
            tasks, partial(dying_judge, str(tmp_path), 99), str(out), SamplingResources(block_size=40), lambda *a: None
        )


def dying_engine(marker, deaths, model, config):
    """An engine of a pool, that dies on its first call until `deaths` processes have died."""
    return dying_judge(marker, deaths).engine


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_engine_of_a_pool_that_dies_is_replaced_and_its_block_done_again(tmp_path, ray_session):
    from spct_ray.cluster.pool import close_judge_pool, judge_pool
    from spct_ray.cluster.sampling import read_trajectories
    from spct_ray.cluster.sampling import sample as sample_tasks
    from spct_ray.engines.host import JudgeSpec

    _, train = items_dir(tmp_path)
    tasks = [t for i in train for t in sample.tasks_of(i, sample.SampleConfig(), 5)]
    said = []
    resources = SamplingResources(num_replicas=3, block_size=40)  # all CPUs: engines must leave room to begin
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pool = judge_pool(str(tmp_path / name), resources, said.append, partial(dying_engine, str(tmp_path), 2))
        make_judge = pool.judge_maker(JudgeSpec(JUDGE, name))
        made = sample_tasks(tasks, make_judge, str(tmp_path / name), resources, lambda *a: None)
        assert len(list(tmp_path.glob("death-*"))) == 2
        assert made["judgements"] == 160
        assert {t.model for t in read_trajectories(str(tmp_path / name))} == {name}
    close_judge_pool()
    assert said == ["starts engines", "loads its weights into the engines of the judge before"]
    mortal = judge_pool(str(tmp_path), resources, said.append, partial(dying_engine, str(tmp_path), 99))
    with pytest.raises(EngineError, match="died"):
        sample_tasks(tasks, mortal.judge_maker(JudgeSpec(JUDGE, "c")), str(tmp_path / "c"), resources, lambda *a: None)
    close_judge_pool()


@pytest.mark.slow
def test_killed_sampling_resumes_without_doing_a_block_twice(tmp_path):
    """A driver killed in mid-run leaves whole blocks; the next call judges only the rest."""
    script = Path(__file__).parent / "sampling_driver.py"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(script), str(out)]
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    while first.poll() is None and len(list((out / "checkpoint").glob("*.parquet"))) < 3:
        time.sleep(0.05)
    assert first.poll() is None, "the driver ended before it could be killed"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    subprocess.run(command, env=environment, check=True, timeout=300)
    calls = [line for file in out.glob("calls-*") for line in file.read_text().splitlines()]
    from spct_ray.cluster.sampling import read_trajectories

    keys = [t.key for t in read_trajectories(str(out))]
    assert len(keys) == len(set(keys)) == 160
    # Blocks in flight when the driver died are done again; whole ones are not.
    assert 160 <= len(calls) <= 160 + 3 * 10


def test_selection_without_any_accepted_judgement_says_what_to_do(tmp_path, monkeypatch):
    import pyarrow as pa

    items, train = items_dir(tmp_path, 3)
    rows = ProgramJudge(ProgramConfig(format_error=1.0), JUDGE).judge(
        [t for i in train for t in sample.tasks_of(i, sample.SampleConfig(), 5)]
    )
    directory = tmp_path / "sample" / "trajectories"
    directory.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{"key": t.key, **t.to_row()} for t in rows]), directory / "a.parquet")
    with pytest.raises(DataError, match="no judgement was accepted"):
        select.run(
            context(tmp_path, "select", items=items, sample=tmp_path / "sample"),
            select.SelectConfig(JUDGE),
            None,
        )


class MortalEndpoint(Endpoint):
    """Gives 9 : 1 until `left` requests were answered, then HTTP 503."""

    left = 21

    def answer(self, path, body, key):
        with self._lock:
            self.bodies.append(body)
            self.left -= 1
            if self.left < 0:
                return 503, {}, b"gone"
        choice = {"index": 0, "message": {"content": "Scores: \\boxed{9, 1}"}, "finish_reason": "stop"}
        return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": 11, "completion_tokens": 7}}


@pytest.mark.slow
def test_an_endpoint_that_fails_half_way_loses_no_finished_block(tmp_path, ray_session):
    from spct_ray.cluster.sampling import num_rows, read_trajectories

    items = [Item(f"i{i}", (Message("user", f"Q{i}"),), ("a", "b"), (1.0, 0.0)) for i in range(10)]
    (tmp_path / "items").mkdir()
    write_items(str(tmp_path / "items" / "bench_x.parquet"), items)
    here = context(tmp_path, "evaluate_x", items=tmp_path / "items")
    endpoint = MortalEndpoint()
    where = RemoteConfig(endpoint.url, "grm", concurrency=4, max_attempts=2, first_wait_s=0.01)
    config, ask = evaluate.EvaluateConfig(JUDGE, k_max=2), evaluate.EndpointResources(where, block_size=8)
    with pytest.raises(EngineError, match="died"):
        evaluate.run_endpoint(here, config, ask)
    done = num_rows(Path(here.out) / "trajectories")
    assert 0 < done < 40
    endpoint.left, endpoint.bodies = 10**6, []
    made = evaluate.run_endpoint(here, config, ask)
    assert made["judgements"] == 40 - done
    assert len(endpoint.bodies) == 1 + 40 - done  # one to greet
    assert {(t.failure, t.model) for t in read_trajectories(here.out)} == {("", "grm")}
    endpoint.server.shutdown()
    endpoint.server.server_close()
    with pytest.raises(EngineError, match="after 2 attempts"):  # at once, before any worker starts
        evaluate.run_endpoint(context(tmp_path, "evaluate_y", items=tmp_path / "items"), config, ask)
