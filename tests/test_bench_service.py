"""The benches of the service: which answers the load test calls wrong, and what the bench of principles counts."""

import asyncio
import json
import re

import pytest

from jobs.bench.load import Memory, fault, growth
from jobs.bench.principles import credit, measure, report, rubric
from spct_ray.data.builtin import BuiltinConfig, generate
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.records import Item, Message
from spct_ray.serve.backends import LocalJudge
from spct_ray.serve.client import request
from spct_ray.serve.deployment import ServeConfig
from spct_ray.serve.gateway import Gateway
from spct_ray.serve.schema import JudgeRequest, parse
from tests.scripted_engine import ScriptedEngine

ASKED = (Message("user", "Name a prime."),)
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


def test_the_effect_of_principles_is_measured_on_the_same_items(capsys):
    """A judge that is right where it is shown principles, and else finds both responses equal."""
    config = ServeConfig("m", judge=JudgeConfig(template="compact", single="scale"))
    items = generate(BuiltinConfig(0, 6, num_responses=(2,), num_responses_weights=(1.0,)), 1)[1]
    right = {item.responses[item.best] for item in items}
    asked = []

    def judge(request):
        prompt = request.messages[0].content
        asked.append(prompt)
        shown = re.findall(r"\[Response \d\]\n(.*?)\n\[End \d\]", prompt, re.DOTALL)
        if not shown:
            return ["Specific Criteria: x" + "y" * 40]
        scores = [9 if text in right else 1 for text in shown] if "\nPrinciples: " in prompt else [5, 5]
        return [f"\\boxed{{{', '.join(map(str, scores))}}}"]

    passes, alone = asyncio.run(measure(config, ScriptedEngine(judge), items, k=2, runs=2))
    report(items, passes, alone, 2)
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert sum("[Response 1]" not in prompt for prompt in asked) == 2 * 2 * 6  # once a query, pass and gateway
    assert sum(f"Principles: {rubric(items[0])}\n" in prompt for prompt in asked) >= 2 * 2 * 2
    own, generated, cached, given = (found[way] for way in ("own", "generated", "cached", "given"))
    assert [row["shown"] for row in (own, generated, cached, given)] == [0, 1, 1, 1]
    assert [row["accuracy"] for row in (own, generated, cached, given)] == [0.5, 1, 1, 1]
    assert (cached["difference"], cached["difference_ci"], cached["parsed"]) == (0.5, [0.5, 0.5], 1)
    assert generated["written"] == pytest.approx(cached["written"] + len("Specific Criteria: x" + "y" * 40) / 2)
    assert own["read"] < cached["read"] < generated["read"]


def test_a_single_response_is_right_on_its_side_of_the_scale_and_no_verdict_is_wrong():
    answer = answer_to(BODY)
    good, bad = (Item("i", ASKED, ("a",), (reward,)) for reward in (1.0, 0.0))
    for mean, shares in ((7.0, (1.0, 0.0)), (5.5, (0.5, 0.5)), (2.0, (0.0, 1.0))):
        verdict = answer.model_copy(update={"mean_scores": [mean], "scale": (1, 10)})
        assert (credit(good, verdict), credit(bad, verdict)) == shares
    assert credit(good, None) == credit(good, answer.model_copy(update={"mean_scores": None})) == 0
    pair = Item("i", ASKED, ("a", "b"), (0.0, 1.0))
    means = ([2.0, 5.5], [5.5, 2.0], [4.0, 4.0])
    assert [credit(pair, answer.model_copy(update={"mean_scores": mean})) for mean in means] == [1, 0, 0.5]
