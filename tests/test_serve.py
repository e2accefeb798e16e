"""The gateway over HTTP (ASGI, no Ray) with an engine that writes given scores: validation, votes, failures, errors."""

import json
import re
from concurrent.futures import Future

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.config import to_plain
from spct_ray.engines.base import EngineConfig, SamplingParams
from spct_ray.errors import ConfigError, EngineError, TooLongError
from spct_ray.graph.record import StepRecord, write_record
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.serve.backends import LocalJudge
from spct_ray.serve.deployment import ReplicaConfig, ServeConfig, ServeResources, resolve
from spct_ray.serve.gateway import Gateway
from spct_ray.serve.ledger import LocalLedger
from spct_ray.serve.routes import build_app
from tests.scripted_engine import ScriptedEngine

RESPONSES = ["alpha", "beta"]
OK = {"messages": [{"role": "user", "content": "Which word?"}], "responses": RESPONSES}


class Script:
    """Answers request number i with `texts[i]`; a tuple of scores in the item's order is written in prompt order."""

    def __init__(self, *texts):
        self.texts = texts
        self.params: list[SamplingParams] = []
        self.orders: list[tuple[int, ...]] = []

    def __call__(self, request):
        shown = re.findall(r"\[Response \d+\]\n(.*)\n\[End \d+\]", request.messages[0].content)
        order = tuple(RESPONSES.index(r) if r in RESPONSES else 0 for r in shown)
        text = self.texts[len(self.params) % len(self.texts)]
        if isinstance(text, tuple):
            text = f"Scores: \\boxed{{{', '.join(str(text[i]) for i in order)}}}"
        self.params.append(request.params)
        self.orders.append(order)
        return [text]


class SilentEngine(ScriptedEngine):
    """Takes requests and never answers."""

    def submit(self, request):
        return Future()


def refuse(request):
    raise TooLongError(TOO_LONG)


TOO_LONG = "a prompt of 5000 tokens + max_tokens 100 exceeds the engine's max_model_len of 4096"


class Meta:
    """Gives `logits` in turn, or raises `error`."""

    def __init__(self, *logits, error=None):
        self.logits, self.error, self.asked = logits, error, []

    async def score(self, conversations):
        self.asked += conversations
        if self.error:
            raise self.error
        return list(self.logits)


def app_of(engine, meta=None, ready=True, ledger=None, **config):
    settings = ServeConfig("unused", judge=JudgeConfig(template="compact"), **config)

    async def judge_is_ready():
        return ready

    ledger = ledger or LocalLedger(settings.name, settings.judgements_per_minute)
    return build_app(Gateway(settings, LocalJudge(engine, settings), meta), ledger, judge_is_ready)


def client(script, meta=None, engine=None, **options):
    return TestClient(app_of(engine or ScriptedEngine(script), meta, name="grpo", **options))


def ask(script, meta=None, /, **request):
    reply = client(script, meta).post("/v1/judge", json={**OK, **request})
    assert reply.status_code == 200, reply.text
    return reply.json()


TABLE_17 = ((8, 8), (5, 9), (7, 10))


def test_plain_vote_sums_all_samples_in_the_requests_order():
    answer = ask(Script(*TABLE_17), k=3)
    assert (answer["scores"], answer["winner"], answer["winners"], answer["tie"]) == ([20, 27], 1, [1], False)
    assert answer["mean_scores"] == [20 / 3, 9]
    assert answer["used"] == [0, 1, 2]
    assert (answer["voting"], answer["voting_reason"]) == ("plain", "no meta RM is served")
    assert (answer["model"], answer["weight_version"], answer["scale"]) == ("grpo", 0, [1, 10])
    assert [s["scores"] for s in answer["samples"]] == [list(scores) for scores in TABLE_17]
    assert {tuple(s["order"]) for s in answer["samples"]} == {(0, 1), (1, 0)}
    assert [s["completion_tokens"] for s in answer["samples"]] == [len(s["text"]) for s in answer["samples"]]


def test_meta_vote_keeps_the_best_samples():
    answer = ask(Script(*TABLE_17), Meta(-15.7781, 1.3126, 1.6739), k=3, k_meta=2)
    assert (answer["scores"], answer["winner"], answer["voting"], answer["voting_reason"]) == ([12, 19], 1, "meta", "")
    assert [s["kept"] for s in answer["samples"]] == [False, True, True]
    assert [s["meta_logit"] for s in answer["samples"]] == [-15.7781, 1.3126, 1.6739]


def test_k_meta_defaults_to_half():
    answer = ask(Script((1, 2), (1, 3), (1, 4), (1, 5)), Meta(4.0, 3.0, 2.0, 1.0), k=4)
    assert answer["used"] == [0, 1]


def test_a_judge_that_likes_the_first_place_is_balanced_out():
    answer = ask(Script("Scores: \\boxed{9, 2}"), k=8)  # the first shown wins, whatever it is
    assert answer["scores"] == [44, 44]
    assert answer["tie"]
    assert answer["winners"] == [0, 1]
    assert answer["winner"] in (0, 1)


def test_unparsable_samples_are_named_and_left_out():
    meta = Meta(0.5, -0.5)
    answer = ask(Script((4, 6), "no box here", "\\boxed{1}", (2, 9)), meta, k=4, k_meta=4)
    assert answer["scores"] == [6, 15]
    assert answer["failures"] == {"no_box": 1, "wrong_count": 1}
    assert answer["used"] == [0, 3]
    assert [s["failure"] for s in answer["samples"]] == [None, "no_box", "wrong_count", None]
    assert [s["meta_logit"] for s in answer["samples"]] == [0.5, None, None, -0.5]
    assert [s["scores"] for s in answer["samples"]][1:3] == [None, None]
    assert len(meta.asked) == 2


def test_without_a_usable_sample_there_is_no_score():
    answer = ask(Script("nothing"), Meta(), k=2)
    assert (answer["scores"], answer["mean_scores"], answer["winner"], answer["winners"]) == (None, None, None, [])
    assert answer["failures"] == {"no_box": 2}
    assert (answer["voting"], answer["voting_reason"]) == ("plain", "no usable sample to score")


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        (Meta(error=EngineError("the meta RM's replica died")), "the meta RM failed: the meta RM's replica died"),
        (Meta(float("nan"), 1.0), "the meta RM gave a logit that is not finite"),
    ],
)
def test_without_a_working_meta_rm_the_vote_is_plain_and_says_so(meta, reason):
    answer = ask(Script((3, 5)), meta, k=2, k_meta=1)
    assert (answer["scores"], answer["voting"], answer["voting_reason"]) == ([6, 10], "plain", reason)


def test_a_single_response_has_scores_and_no_winner():
    answer = ask(Script("Scores: \\boxed{1}"), k=3, responses=["alpha"])
    assert (answer["scores"], answer["scale"], answer["winner"], answer["winners"]) == ([3], [0, 1], None, [])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**53), k=st.integers(1, 12))
def test_the_same_seed_gives_the_same_orders_and_sampling_seeds(seed, k):
    first, second = Script((5, 5)), Script((5, 5))
    answers = [ask(script, k=k, seed=seed, temperature=0.7) for script in (first, second)]
    assert first.orders == second.orders
    assert first.params == second.params
    assert {p.temperature for p in first.params} == {0.7}
    assert len({p.seed for p in first.params}) == k
    assert answers[0]["winner"] == answers[1]["winner"]
    assert answers[0]["seed"] == seed


def test_a_seed_is_chosen_and_told_when_none_is_given():
    one, two = ask(Script((5, 4))), ask(Script((5, 4)))
    assert one["seed"] != two["seed"]


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"temprature": 1}, "temprature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [USER, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"messages": [{**USER, "name": "x"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "messages.0.content"),
        ({"responses": []}, "responses"),
        ({"responses": ["a"] * 65}, "responses"),
        ({"responses": ["a", ""]}, "responses.1"),
        ({"responses": ["a", 3]}, "responses.1"),
        ({"responses": "ab"}, "responses"),
        ({"k": 0}, "k"),
        ({"k": 65}, "k"),
        ({"k": "8"}, "k"),
        ({"k": True}, "k"),
        ({"k": 2, "k_meta": 3}, "k_meta"),
        ({"k_meta": 0}, "k_meta"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**53 + 1}, "seed"),
        ({"reference": None}, "reference"),
        ({"responses": ["a", "\ud800"]}, "responses.1"),
        ({"\ud800": 1}, "body"),
    ],
)
def test_bad_requests_are_refused_with_the_path(change, path):
    script = Script((1, 2))
    reply = client(script).post("/v1/judge", content=json.dumps({**OK, **change}))
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], [d["path"] for d in error["details"]]) == (422, "invalid_request", [path])
    assert not script.params


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_bodies_that_are_no_request_are_refused(body):
    reply = client(Script((1, 2))).post("/v1/judge", content=body)
    assert (reply.status_code, reply.json()["error"]["details"][0]["path"]) == (422, "body")


def test_duplicate_responses_and_unicode_are_allowed():
    answer = ask(Script("\\boxed{4, 4}"), responses=["é 😀", "é 😀"], k=2)
    assert answer["scores"] == [8, 8]


def test_too_long_requests_are_413():
    reply = client(refuse).post("/v1/judge", json=OK)
    assert (reply.status_code, reply.json()["error"]["message"]) == (413, TOO_LONG)
    reply = client(Script((1, 2))).post("/v1/judge", json={**OK, "reference": "x" * ServeConfig.max_body_bytes})
    assert reply.status_code == 413
    assert str(ServeConfig.max_body_bytes) in reply.json()["error"]["message"]


def test_a_dead_engine_is_503():
    reply = client(None, engine=ScriptedEngine(Script((1, 2)), calls_to_live=3)).post("/v1/judge", json=OK)
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "unavailable")
    assert int(reply.headers["retry-after"]) > 0
    assert "end of its life" in reply.json()["error"]["message"]


def test_a_judge_that_never_answers_is_504():
    reply = client(None, engine=SilentEngine(refuse), judge_timeout_s=0.01).post("/v1/judge", json=OK)
    assert (reply.status_code, reply.json()["error"]["type"]) == (504, "timeout")


def test_other_routes():
    http = client(Script((1, 2)), Meta())
    assert http.get("/healthz").json() == {"status": "ok"}
    models = http.get("/v1/models").json()
    assert [(m["id"], m["role"]) for m in models["data"]] == [("grpo", "judge"), ("meta", "meta")]
    assert {m["object"] for m in models["data"]} | {models["object"]} == {"model", "list"}
    assert http.get("/v1/judge").status_code == 405
    assert http.get("/nothing").json()["error"]["type"] == "http"
    assert http.get("/readyz").json() == {"status": "ok"}
    unready = client(refuse, ready=False)
    assert (unready.get("/healthz").status_code, unready.get("/readyz").status_code) == (200, 503)


def finish(root, name, step_id, resources=None, inputs=(), **config):
    """Commit a step as the runner does; later calls are newer. `inputs` are (role, step, id)."""
    finish.count = getattr(finish, "count", 0) + 1
    directory = root / "steps" / f"{name}-{step_id}"
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "config.json").write_text(json.dumps({"max_position_embeddings": 640}))
    record = StepRecord(
        name=name,
        id=step_id,
        function="f",
        version=1,
        seed=0,
        config=config,
        inputs={role: {"step": step, "id": source} for role, step, source in inputs},
        resources=resources or {},
        finished_at=f"2026-01-01T00:00:{finish.count:02d}",
    )
    write_record(str(directory), record)
    return str(directory / "model")


EVALUATED = {
    "judge": {"template": "compact", "single": "binary", "max_tokens": 96},
    "single": "scale",
    "temperature": 0.7,
}


def evaluated_on(gpus):
    engine = EngineConfig(max_model_len=640, tensor_parallel=max(1, gpus))
    return to_plain(SamplingResources(gpus_per_replica=gpus, engine=engine))


def test_a_run_serves_its_last_evaluated_judge_with_the_meta_rm_that_scored_it(tmp_path):
    (tmp_path / "steps").mkdir()
    rft = finish(tmp_path, "rft_2", "r1")
    with pytest.raises(ConfigError, match=r"no finished evaluation of grpo or rft; finish the run \(`spct run`\)"):
        resolve(str(tmp_path))
    judge = [("judge", "rft_2", "r1")]
    finish(tmp_path, "evaluate_rft", "e1", evaluated_on(0), judge, **EVALUATED)
    config = resolve(str(tmp_path))
    assert (config.judge_model, config.name, config.meta_model) == (rft, "rft_2", None)
    finish(tmp_path, "meta", "m1")
    finish(tmp_path, "evaluate_grpo", "e2", evaluated_on(0), [("judge", "grpo", "g1")], **EVALUATED)
    finish(
        tmp_path, "meta_scores", "s1", {"gpus_per_replica": 0}, [("meta", "meta", "m1"), ("x", "evaluate_grpo", "e2")]
    )
    grpo = finish(tmp_path, "grpo", "g2")
    finish(tmp_path, "evaluate_grpo", "e3", evaluated_on(2), [("judge", "grpo", "g2")], **EVALUATED)
    (tmp_path / "steps" / "grpo-unfinished").mkdir()
    config = resolve(str(tmp_path))
    assert (config.judge_model, config.name) == (grpo, "grpo")
    assert config.meta_model is None  # m1 scored the older judge g1
    assert config.judge == JudgeConfig(template="compact", single="scale", max_tokens=96)
    assert config.temperature == 0.7
    assert config.resources.engine == EngineConfig(max_model_len=640, tensor_parallel=2)
    assert (config.resources.judge.num_gpus, config.resources.meta.num_gpus) == (2, None)
    meta = finish(tmp_path, "meta", "m2")
    finish(
        tmp_path, "meta_scores", "s2", {"gpus_per_replica": 1}, [("meta", "meta", "m2"), ("x", "evaluate_grpo", "e3")]
    )
    config = resolve(str(tmp_path))
    assert (config.meta_model, config.resources.meta.num_gpus) == (meta, 1)
    assert resolve(f"{tmp_path}:rft").judge_model == rft
    with pytest.raises(ConfigError, match="a run's judges are base, rft, grpo, not 'sft'"):
        resolve(f"{tmp_path}:sft")
    words = ["resources.judge.num_gpus=null", "resources.engine.tensor_parallel=1", "temperature=0.2"]
    config = resolve(str(tmp_path), words)
    assert (config.resources.judge.num_gpus, config.resources.engine.max_model_len) == (None, 640)
    assert (config.judge_model, config.temperature, config.resources.meta.num_cpus) == (grpo, 0.2, 0.5)
    with pytest.raises(ConfigError, match=r"override 'resources.engine.tensor_parallel=4'.* but 2 are asked for"):
        resolve(str(tmp_path), ["resources.engine.tensor_parallel=4"])


def test_a_model_directory_or_a_configuration_can_be_served(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    config = resolve(str(tmp_path))
    assert (config.judge_model, config.name, config.judge.max_tokens) == (str(tmp_path), tmp_path.name, 256)
    assert resolve("conf/serve.yaml").resources.host == "127.0.0.1"
    assert resolve(str(tmp_path), ["resources.engine.tensor_parallel=2"]).resources.engine.tensor_parallel == 2
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="no run"):
        resolve(str(tmp_path))


def test_the_defaults_fit_two_cores_and_what_does_not_fit_is_told_by_name():
    ServeResources().on([{"CPU": 2.0}]).check_room([{"CPU": 2.0}], meta=True)
    wide = ServeResources(judge=ReplicaConfig(min_replicas=2, num_cpus=4), meta=ReplicaConfig(num_gpus=1))
    with pytest.raises(ConfigError, match=r"8\.1 CPUs are asked for \(gateway 0\.1, judge 8\), and there are 2"):
        wide.check_room([{"CPU": 2.0}], meta=False)
    with pytest.raises(ConfigError, match=r"1 GPUs are asked for \(meta 1;.*and there are none"):
        wide.check_room([{"CPU": 16.0}], meta=True)


def test_a_judge_takes_its_engines_gpus_a_meta_rm_one_and_a_gateway_none_where_there_are_any():
    pair = EngineConfig(tensor_parallel=2)
    nodes = [{"CPU": 16.0, "GPU": 2.0}] * 2
    where = ServeResources(judge=ReplicaConfig(min_replicas=0), engine=pair).on(nodes)
    assert (where.judge.num_gpus, where.meta.num_gpus, where.gateway.num_gpus) == (2, 1, 0)
    where.check_room(nodes, meta=True)
    with pytest.raises(ConfigError, match=r"3 GPUs are asked for \(judge 2, meta 1;.*there are 2: .*num_gpus=0\.7"):
        where.check_room(nodes[:1], meta=True)  # also where no replica runs at first: one could never start
    with pytest.raises(ConfigError, match="takes 2 GPUs, but 0 are asked for; where there are no GPUs"):
        ServeResources(engine=pair).on([{"CPU": 16.0}])
    smaller = EngineConfig(gpu_memory_utilization=0.65)
    stated = ServeResources(judge=ReplicaConfig(num_gpus=0.7), meta=ReplicaConfig(num_gpus=0.3), engine=smaller)
    assert stated.on(nodes).judge.num_gpus == 0.7
    stated.on(nodes).check_room([{"CPU": 16.0, "GPU": 1.0}], meta=True)
