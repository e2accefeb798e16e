"""The load test's own judgement: which answers it calls wrong."""

import asyncio
import json

import pytest

from spct_ray.engines.scripted import ScriptedEngine
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Message
from spct_ray.serve.backends import LocalJudge
from spct_ray.serve.client import request
from spct_ray.serve.deployment import ServeConfig
from spct_ray.serve.gateway import Gateway
from spct_ray.serve.load import Memory, fault, growth
from spct_ray.serve.schema import JudgeRequest, parse

BODY = request([Message("user", "Name a prime.")], ["4", "7"], k=4, seed=3)


def answer_to(body, text="Scores: \\boxed{3, 8}"):
    config = ServeConfig("unused", judge=JudgeConfig(template="compact"))
    gateway = Gateway(config, LocalJudge(ScriptedEngine(lambda request: [text]), config), None)
    return asyncio.run(gateway.answer(parse(JudgeRequest, json.dumps(body))))


def test_an_answer_is_right_when_it_is_the_requests_own_and_its_sums_hold():
    alone = answer_to(BODY)
    assert alone.scores == [22, 22]  # both orders twice
    assert fault(alone, BODY, alone) == ""
    assert fault(answer_to(BODY, "Scores: \\boxed{3, 9}"), BODY, alone) == ""  # other texts are not wrong by themselves
    failed = answer_to(BODY, "none")
    assert (failed.scores, fault(failed, BODY, alone)) == (None, "")
    single = BODY | {"responses": ["7"]}
    assert fault(answer_to(single, "Scores: \\boxed{3}"), single, answer_to(single)) == ""
    assert fault(answer_to(BODY | {"responses": ["4", "77"]}), BODY, alone) == "prompts"
    assert fault(answer_to(BODY | {"seed": 4}), BODY | {"seed": 4}, alone) == ""
    assert fault(answer_to(BODY | {"k": 3}), BODY, alone) == "samples"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"scores": [22, 23]}, "sums"),
        ({"used": [0, 1, 2]}, "used samples"),
        ({"winner": None}, "winner"),
        ({"winners": [1]}, "winner"),
        ({"scores": None}, "sums"),
    ],
)
def test_an_answer_that_contradicts_itself_is_named(change, name):
    alone = answer_to(BODY)
    assert fault(alone.model_copy(update=change), BODY, alone) == name


def test_growth_is_that_of_the_second_half_whatever_is_freed_now_and_then():
    """Five minutes of 60 MiB a minute, then five of 2, and up to 90 MiB that are given back every 30 s."""
    trend = [(t, 1000.0 + min(t, 300) + max(0, t - 300) / 30) for t in range(0, 600, 2)]
    made = [Memory(t, "JudgeReplica", 1, mib + 3 * (t % 30)) for t, mib in trend]
    assert growth(made) == pytest.approx(2)
    assert growth(made[:100]) is None
