"""Votes as answers tell them: what is shown to the judge, adaptive k, budgets, meta scores (ASGI, no Ray)."""

import asyncio
import contextlib
import math
import re

import pytest

from spct_ray.cli import format_answer
from spct_ray.errors import EngineError
from spct_ray.records import Item, Message, Trajectory
from spct_ray.serve.deployment import ServeConfig
from spct_ray.serve.gateway import _Scorer
from spct_ray.serve.schema import JudgeAnswer, JudgeRequest
from tests.scripted_engine import ScriptedEngine
from tests.test_serve import OK, TABLE_17, Meta, Script, SilentEngine, ask, client, refuse


def test_principles_and_reference_reach_the_judge():
    seen = []
    engine = ScriptedEngine(lambda r: [seen.append(r.messages[0].content) or "\\boxed{1, 2}"])
    reply = client(None, engine=engine).post(
        "/v1/judge", json={**OK, "k": 1, "principles": "Brevity (100%)", "reference": "beta"}
    )
    assert reply.status_code == 200
    assert "\nPrinciples: Brevity (100%)\nReference: beta\n[Response 1]" in seen[0]


def test_confidence_tokens_and_versions():
    answer = ask(Script(*TABLE_17), k=3, seed=1)
    assert 0.9 < answer["confidence"] <= 1  # only a resample of three (8, 8) ties
    assert answer["completion_tokens"] == sum(s["completion_tokens"] for s in answer["samples"])
    assert [s["weight_version"] for s in answer["samples"]] == [0, 0, 0]
    assert answer["stopped"] == "k"
    assert ask(Script((1, 2)), k=1)["confidence"] is None
    assert ask(Script("\\boxed{1}"), k=3, responses=["alpha"])["confidence"] is None


def test_adaptive_k_stops_when_the_winner_is_settled():
    script = Script((1, 9), (2, 9), (1, 10), (2, 10))
    answer = ask(script, k="auto", seed=3)
    assert (answer["stopped"], answer["num_samples"], answer["winner"]) == ("settled", 4, 1)
    assert len(script.params) == 4
    undecided = Script((5, 6), (6, 5))
    answer = ask(undecided, k="auto", seed=3)
    assert (answer["stopped"], answer["num_samples"]) == ("k", ServeConfig.k_auto_max)


def test_adaptive_k_looks_at_the_samples_that_the_meta_rm_keeps():
    """The two best of each four say 9 : 1, the others 1 : 9."""

    class ByScore:
        async def score(self, conversations):
            return [1.0 if "boxed{9, 1}" in c[1].content else 0.0 for c in conversations]

    texts = ("Scores: \\boxed{9, 1}", "Scores: \\boxed{1, 9}")
    answer = ask(Script(*texts), ByScore(), k="auto", seed=3)
    assert answer["voting"] == "meta"
    assert answer["stopped"] in ("settled", "k")
    assert answer["num_samples"] >= 8  # of four it keeps two, too few to look at
    assert all(s["text"] == texts[0] for s in answer["samples"] if s["kept"])


def test_a_budget_of_tokens_begins_no_further_round():
    answer = ask(Script((1, 2)), k=64, budget={"tokens": 1})
    assert (answer["stopped"], answer["num_samples"]) == ("budget", 4)
    answer = ask(Script((1, 2)), k=64, budget={"tokens": 10**6})
    assert (answer["stopped"], answer["num_samples"]) == ("k", 64)


class HalfSilentEngine(SilentEngine):
    """Answers every second request."""

    def submit(self, request):
        self.count = getattr(self, "count", 0) + 1
        return ScriptedEngine.submit(self, request) if self.count % 2 else SilentEngine.submit(self, request)


def test_a_budget_of_time_votes_over_what_is_there():
    engine = HalfSilentEngine(lambda r: ["\\boxed{3, 3}"])
    reply = client(None, engine=engine).post("/v1/judge", json={**OK, "k": 4, "budget": {"milliseconds": 50}})
    answer = reply.json()
    assert (answer["stopped"], answer["scores"], answer["used"]) == ("budget", [6, 6], [0, 1])
    assert [s["sample"] for s in answer["samples"]] == [0, 2]
    nothing = client(None, engine=SilentEngine(refuse))
    reply = nothing.post("/v1/judge", json={**OK, "budget": {"milliseconds": 20}})
    assert (reply.status_code, reply.json()["error"]["type"]) == (504, "timeout")


def test_the_servers_own_time_out_is_no_budget():
    engine = HalfSilentEngine(lambda r: ["\\boxed{3, 3}"])
    http = client(None, engine=engine, judge_timeout_s=0.05)
    reply = http.post("/v1/judge", json={**OK, "k": 4, "budget": {"milliseconds": 60_000}})
    assert (reply.status_code, reply.json()["error"]["type"]) == (504, "timeout")


class SlowMeta:
    """Scores after `seconds`, or once `go` is set."""

    def __init__(self, seconds=60.0):
        self.seconds, self.go = seconds, asyncio.Event()

    async def score(self, conversations):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.go.wait(), self.seconds)
        return [1.0] * len(conversations)


@pytest.mark.parametrize(("k", "stopped"), [(4, "k"), ("auto", "budget")])
def test_meta_scores_are_waited_for_no_longer_than_a_budget_of_time(k, stopped):
    reply = client(Script((1, 9)), SlowMeta()).post("/v1/judge", json={**OK, "k": k, "budget": {"milliseconds": 100}})
    answer = reply.json()
    assert (reply.status_code, answer["winner"], answer["num_samples"]) == (200, 1, 4)
    assert (answer["voting"], answer["voting_reason"]) == ("plain", "the meta RM did not answer within 0.1 s")
    reply = client(Script((1, 9)), SlowMeta(0.01)).post(
        "/v1/judge", json={**OK, "k": 4, "budget": {"milliseconds": 9999}}
    )
    assert (reply.json()["voting"], reply.json()["stopped"]) == ("meta", "k")


def test_a_budget_that_ends_while_samples_are_scored_loses_no_score():
    async def scenario():
        meta = SlowMeta()
        scorer = _Scorer(meta, Item("i", (Message("user", "q"),), ("a", "b")), 60)
        made = [Trajectory("i", k, (0, 1), "t", (1, 9), "", False, False, 0.5, k, "m", 0, 1, 1, "stop") for k in (0, 1)]
        scorer.add(made)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await scorer.logits(made)
        meta.go.set()
        return await scorer.logits(made)

    assert asyncio.run(scenario()) == ([1.0, 1.0], "")


def test_meta_scores_of_samples_that_came_apart_go_to_their_own_samples():
    class ByText:
        calls = 0

        async def score(self, conversations):
            ByText.calls += 1
            return [float(re.findall(r"\d+", c[1].content)[-1]) for c in conversations]

    answer = ask(Script((1, 2)), ByText(), k="auto", seed=1)
    assert ByText.calls > 1
    assert all(s["meta_logit"] == float(re.findall(r"\d+", s["text"])[-1]) for s in answer["samples"])
    broken = Meta(error=EngineError("gone"))
    answer = ask(Script((1, 9)), broken, k="auto", seed=1)
    assert (answer["voting"], answer["voting_reason"]) == ("plain", "the meta RM failed: gone")
    assert (answer["stopped"], answer["winner"]) == ("settled", 1)


def test_a_weighted_vote_counts_every_sample_and_takes_no_k_meta():
    http = client(Script(*TABLE_17), Meta(-15.7781, 1.3126, 1.6739), meta_vote="weighted")
    answer = http.post("/v1/judge", json={**OK, "k": 3}).json()
    assert (answer["voting"], answer["used"], answer["winner"]) == ("weighted", [0, 1, 2], 1)
    weights = [math.log1p(math.exp(logit)) for logit in (-15.7781, 1.3126, 1.6739)]
    means = [sum(w * s[i] for w, s in zip(weights, TABLE_17, strict=True)) / sum(weights) for i in (0, 1)]
    assert answer["mean_scores"] == pytest.approx(means)
    assert answer["scores"] == pytest.approx([3 * mean for mean in means])
    assert answer["confidence"] > 0.95  # a resample of (8, 8) alone ties
    told = format_answer(JudgeAnswer.model_validate(answer), JudgeRequest.model_validate(OK))
    assert "3 of 3 samples counted; failures: none; voting: weighted by the meta RM" in told
    assert f"response 1: sum {3 * means[0]:5.4g}, mean {means[0]:5.2f}  alpha" in told
    reply = http.post("/v1/judge", json={**OK, "k": 3, "k_meta": 2})
    (detail,) = reply.json()["error"]["details"]
    assert (reply.status_code, detail["path"]) == (422, "k_meta")
    assert "meta_vote: weighted" in detail["message"]
    plain = client(Script(*TABLE_17), meta_vote="weighted").post("/v1/judge", json={**OK, "k": 3}).json()
    assert (plain["voting"], plain["scores"]) == ("plain", [20, 27])
