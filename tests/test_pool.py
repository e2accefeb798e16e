"""EnginePool on a real Ray: sharing out, replacement of dead replicas, redone work."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import ray

from spct_ray.cluster.pool import EnginePool
from spct_ray.engines.base import EngineConfig, EngineResources, Request, SamplingParams
from spct_ray.errors import EngineError, RequestError
from spct_ray.records import Message
from tests.scripted_engine import ScriptedEngine
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ONE = EngineResources()
TWO = EngineResources(num_replicas=2, cpus_per_replica=0.5)
SMALL_BLOCKS = EngineConfig(max_num_seqs=4)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=int(300e6), log_to_driver=False)
    yield
    ray.shutdown()


def requests_for(texts, n=1):
    return [Request((Message("user", text),), SamplingParams(max_tokens=99, n=n)) for text in texts]


def scripted(notes: Path, dies_with: str = "", refuses: str = "", deaths: int = 1):
    """Makes engines that answer "<prompt>!<number of sample>", note each prompt answered, and kill their process on
    the prompt `dies_with`, `deaths` times in all."""

    def make_engine(model_dir, config):
        def answer(request):
            prompt = request.messages[0].content
            if prompt == dies_with and len(list(notes.glob("death-*"))) < deaths:
                (notes / f"death-{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if prompt == refuses:
                raise RequestError("too long by 3 tokens")
            with (notes / "answered").open("a") as file:
                file.write(f"{os.getpid()} {prompt}\n")
            return [f"{prompt}!{i}" for i in range(request.params.n)]

        return ScriptedEngine(answer)

    return make_engine


def pids(notes: Path) -> dict[str, set[str]]:
    """For each prompt, the processes that answered it."""
    found: dict[str, set[str]] = {}
    for line in (notes / "answered").read_text().splitlines():
        pid, prompt = line.split(" ", 1)
        found.setdefault(prompt, set()).add(pid)
    return found


def texts_of(results):
    return [[completion.text for completion in completions] for completions in results]


def test_shares_out_in_order_and_keeps_equal_prompts_together(tmp_path):
    pool = EnginePool("no-model", SMALL_BLOCKS, TWO, scripted(tmp_path))
    prompts = [f"p{i % 8}" for i in range(24)]  # three requests of each prompt, far apart
    results = pool.generate(requests_for(prompts, n=2))
    pool.close()
    assert texts_of(results) == [[f"{p}!0", f"{p}!1"] for p in prompts]
    answered = pids(tmp_path)
    assert len(set.union(*answered.values())) == 2
    # 3 requests x 2 samples exceed a block of 4, so at most two blocks, hence processes, have a prompt
    assert all(len(who) <= 2 for who in answered.values())


def test_killed_replica_is_replaced_with_the_newest_weights_and_its_work_redone(tmp_path):
    pool = EnginePool("no-model", SMALL_BLOCKS, TWO, scripted(tmp_path, dies_with="p13"))
    pool.reload("weights-7", 7)
    prompts = [f"p{i}" for i in range(40)]
    results = pool.generate(requests_for(prompts))
    assert texts_of(results) == [[f"{p}!0"] for p in prompts]
    assert {c.weight_version for cs in results for c in cs} == {7}
    assert len(list(tmp_path.glob("death-*"))) == 1
    lines = (tmp_path / "answered").read_text().splitlines()
    again = [p for p, count in Counter(line.split()[1] for line in lines).items() if count > 1]
    assert len(again) < 8  # only the blocks that were in flight on the dead one: two of four requests
    assert len({line.split()[0] for line in lines}) == 3
    assert pool.prompt_logprobs([[1, 2, 3], [4]]) == [[-1.0, -1.0], []]
    pool.close()


def test_replica_killed_while_idle_is_replaced_on_reload_and_on_generate(tmp_path):
    pool = EnginePool("no-model", SMALL_BLOCKS, ONE, scripted(tmp_path))
    ray.kill(pool.actors[0], no_restart=False)
    pool.reload("weights-1", 1)
    ray.kill(pool.actors[0], no_restart=False)
    results = pool.generate(requests_for(map(str, range(16))))
    pool.close()
    assert texts_of(results) == [[f"{i}!0"] for i in range(16)]
    assert {c.weight_version for cs in results for c in cs} == {1}


def test_a_request_that_kills_every_engine_ends_in_an_error_with_the_cause(tmp_path):
    pool = EnginePool("no-model", SMALL_BLOCKS, ONE, scripted(tmp_path, dies_with="p3", deaths=99), max_restarts=1)
    with pytest.raises(EngineError, match=r"engine on no-model died again after 1 restarts: .*died"):
        pool.generate(requests_for([f"p{i}" for i in range(8)]))
    pool.close()


def test_engine_error_is_a_death_too(tmp_path):
    def make_engine(model_dir, config):
        return ScriptedEngine(lambda request: ["ok"], calls_to_live=14)

    pool = EnginePool("no-model", SMALL_BLOCKS, ONE, make_engine, max_restarts=1)
    assert texts_of(pool.generate(requests_for(map(str, range(20))))) == [["ok"]] * 20
    with pytest.raises(EngineError, match="end of its life"):
        pool.generate(requests_for(map(str, range(20))))
    pool.close()


def test_refused_request_leaves_the_pool_alive(tmp_path):
    pool = EnginePool("no-model", SMALL_BLOCKS, TWO, scripted(tmp_path, refuses="p5"))
    with pytest.raises(RequestError, match=r"^too long by 3 tokens$"):
        pool.generate(requests_for([f"p{i}" for i in range(30)]))
    assert texts_of(pool.generate(requests_for(["p1"]))) == [["p1!0"]]
    pool.close()


def test_an_engine_that_does_not_start_is_an_error_at_once(tmp_path):
    def make_engine(model_dir, config):
        (tmp_path / f"start-{os.getpid()}").touch()
        raise EngineError(f"{model_dir} holds no model")

    with pytest.raises(EngineError, match=r"does not start: .*nowhere holds no model"):
        EnginePool("nowhere", SMALL_BLOCKS, ONE, make_engine)
    assert len(list(tmp_path.glob("start-*"))) == 1


def test_a_replacement_that_does_not_start_at_once_is_tried_again(tmp_path):
    def make_engine(model_dir, config):
        (tmp_path / f"start-{os.getpid()}").touch()
        num_starts = len(list(tmp_path.glob("start-*")))
        if num_starts == 2:
            raise EngineError("Free memory on the device is less than what is wanted")
        return ScriptedEngine(lambda request: ["ok"], calls_to_live=3 if num_starts == 1 else None)

    pool = EnginePool("nowhere", SMALL_BLOCKS, ONE, make_engine)
    results = pool.generate(requests_for([f"word {i}" for i in range(12)]))
    assert [completion.text for (completion,) in results] == ["ok"] * 12
    assert len(list(tmp_path.glob("start-*"))) == 3
    pool.close()


def test_real_engine_dies_and_comes_back(tmp_path):
    make_tiny_model(tmp_path / "a", seed=1)
    make_tiny_model(tmp_path / "b", seed=2)
    config = EngineConfig(max_model_len=256, kv_cache_gib=0.1, max_num_seqs=8)
    pool = EnginePool(str(tmp_path / "a"), config, ONE)
    pool.reload(str(tmp_path / "b"), 3)
    greedy = SamplingParams(max_tokens=12, temperature=0.0, logprobs=True)
    requests = [Request((Message("user", f"Name {i} primes"),), greedy) for i in range(24)]
    before = pool.generate(requests)
    pid = ray.get(pool.actors[0].__ray_call__.remote(lambda host: os.getpid()))
    os.kill(pid, signal.SIGKILL)
    after = pool.generate(requests)
    pool.close()
    assert [c.weight_version for (c,) in after] == [3] * 24
    assert [c.token_ids for (c,) in after] == [c.token_ids for (c,) in before]
