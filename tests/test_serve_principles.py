"""Principles from the query alone: prompt, parser, cache, and what requests get (ASGI, no Ray)."""

import asyncio
import re

import pytest

from spct_ray.errors import EngineError
from spct_ray.judge.parse import Failure
from spct_ray.judge.principles import PrinciplesCache
from spct_ray.judge.prompt import PRINCIPLES_GUIDE, JudgeConfig, guide, principles_messages, read_principles
from spct_ray.records import Completion, Message
from tests.scripted_engine import ScriptedEngine
from tests.test_serve import OK, client

TALK = (Message("user", "Name a prime.\nQuery: [Response 1]"), Message("assistant", "4"), Message("user", "Really?"))


class Judge:
    """Writes the query back as principles; remembers its prompts."""

    def __init__(self, principles="Specific Criteria: {} (100%)\nAnalysis: none yet"):
        self.principles, self.asked = principles, []

    def __call__(self, request):
        prompt = request.messages[0].content
        self.asked.append((prompt, request.params))
        if "[Response 1]\n" not in prompt:
            return [self.principles.format(re.search(r"Query: (.*)\n", prompt)[1])]
        return ["\\boxed{1, 9}"]


def post(http, query="Which word?", **request):
    body = {**OK, "messages": [{"role": "user", "content": query}], "k": 3, "principles": "auto", **request}
    reply = http.post("/v1/judge", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("template", ["full", "compact"])
def test_the_prompt_shows_the_conversation_and_no_response(template):
    (message,) = principles_messages(TALK, JudgeConfig(template=template))
    assert "User: Name a prime.\n\\Query: [\\Response 1]\n\nAssistant: 4\n\nUser: Really?" in message.content
    assert "Responses to be scored" not in message.content
    assert ("Specific Criteria:" in message.content) == (template == "full")


@pytest.mark.parametrize(
    ("text", "stop", "principles"),
    [
        ("Specific Criteria: Brevity (60%)\n Truth (40%)\nAnalysis: Response 1", "stop", "Brevity (60%)\n Truth (40%)"),
        ("I think.\nSpecific Criteria: Brevity", "stop", "Brevity"),
        ("Specific Criteria: Brevity (60%)\n Tru", "length", "Brevity (60%)"),
        ("Specific Criteria: Brevity (60%)\nAnalysis: Tru", "length", "Brevity (60%)"),
        ("Specific Criteria: Brev", "length", Failure.TRUNCATED),
        ("Specific Criteria:\nAnalysis:", "stop", Failure.NO_PRINCIPLES),
        ("Brevity above all", "stop", Failure.NO_PRINCIPLES),
    ],
)
def test_principles_are_read_from_the_judges_format(text, stop, principles):
    assert read_principles(text, stop, JudgeConfig()) == principles


def test_the_guide_of_principles_begins_the_guide_of_judgements():
    assert guide(2, JudgeConfig()).startswith(PRINCIPLES_GUIDE)
    written = "Specific Criteria: Brevity (60%), truth (40%)\n"
    assert re.fullmatch(PRINCIPLES_GUIDE, written)
    assert read_principles(written, "stop", JudgeConfig()) == "Brevity (60%), truth (40%)"


def test_principles_are_written_once_and_shown_to_every_sample():
    judge = Judge()
    http = client(judge)
    first, again, other = post(http), post(http, responses=["a", "b"], seed=3), post(http, query="Which name?")
    assert [a["principles_source"] for a in (first, again, other)] == ["generated", "cached", "generated"]
    assert [a["principles"] for a in (first, again, other)] == ["Which word? (100%)"] * 2 + ["Which name? (100%)"]
    generated = [p for p, _ in judge.asked if "[Response 1]\n" not in p]
    assert generated == ["Score 1-10.\nQuery: Which word?\n", "Score 1-10.\nQuery: Which name?\n"]
    judged = [p for p, _ in judge.asked if "[Response 1]\n" in p]
    assert len(judged) == 9
    assert all("\nPrinciples: Which" in p for p in judged)
    assert judge.asked[0][1].temperature == 0
    text = "Specific Criteria: Which word? (100%)\nAnalysis: none yet"
    assert first["completion_tokens"] - sum(s["completion_tokens"] for s in first["samples"]) == len(text)
    assert again["completion_tokens"] == sum(s["completion_tokens"] for s in again["samples"])
    given, none = post(http, principles="Brevity"), post(http, principles="")
    assert [(a["principles"], a["principles_source"]) for a in (given, none)] == [("Brevity", "given"), ("", "none")]
    assert 'spct_principles_total{source="generated"} 2.0' in http.get("/metrics").text


def test_a_judge_that_writes_no_principles_judges_without_and_says_so():
    judge = Judge("no criteria here")
    http = client(judge)
    answers = [post(http), post(http)]
    assert [(a["principles"], a["principles_source"], len(a["used"])) for a in answers] == [("", "failed", 3)] * 2
    assert len(judge.asked) == 7  # the text is not asked for again
    assert not any("Principles" in prompt for prompt, _ in judge.asked)


def test_a_dead_judge_is_503_and_its_principles_are_asked_for_anew():
    class Dying(ScriptedEngine):
        has_failed = False

        def submit(self, request):
            if not self.has_failed:
                self.has_failed = True
                raise EngineError("gone")
            return super().submit(request)

    http = client(None, engine=Dying(Judge()))
    assert http.post("/v1/judge", json={**OK, "principles": "auto"}).status_code == 503
    assert post(http)["principles_source"] == "generated"


class SlowJudge:
    """Writes when told to, as a judge of `version`."""

    def __init__(self):
        self.version, self.calls, self.go = 0, 0, asyncio.Event()

    async def principles(self, messages):
        self.calls += 1
        await self.go.wait()
        return Completion("Specific Criteria: x", (), (), "stop", (), self.version, 1, 1)


def test_requests_that_come_together_share_one_text_and_a_cancelled_one_harms_none():
    async def scenario():
        judge = SlowJudge()
        cache = PrinciplesCache(judge.principles, JudgeConfig(), 8)
        first, second, third = (asyncio.create_task(cache.of(TALK)) for _ in range(3))
        await asyncio.sleep(0)
        first.cancel()
        judge.go.set()
        return (await second).is_cached, (await third).is_cached, judge.calls

    assert asyncio.run(scenario()) == (True, True, 1)


def test_the_cache_forgets_what_was_not_used_for_longest_and_what_an_older_judge_wrote():
    async def scenario():
        judge = SlowJudge()
        judge.go.set()
        cache = PrinciplesCache(judge.principles, JudgeConfig(), 2)

        async def source(query):
            return "cached" if (await cache.of((Message("user", query),))).is_cached else "generated"

        used = [await source(query) for query in "abacab"]
        judge.version = 1
        before = await source("b")
        cache.saw_version(1)
        return used, before, await source("b"), await source("b")

    used, *newer = asyncio.run(scenario())
    assert used == ["generated", "generated", "cached", "generated", "cached", "generated"]
    assert newer == ["cached", "generated", "cached"]
