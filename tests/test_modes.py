"""Judge modes: golden prompts and replies, how several prompts make one judgement, thoughts, and who refuses what."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spct_ray.config import load
from spct_ray.engines.base import Request, SamplingParams
from spct_ray.engines.engine_judge import EngineJudge
from spct_ray.errors import ConfigError, DataError, EngineError, RequestError, TooLongError
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.modes import MODES, ModeName
from spct_ray.judge.parse import Failure, Scale, after_thinking, parse_scores, read_best, read_verdict
from spct_ray.judge.prompt import JudgeConfig, judge_messages, meta_messages, scale_of
from spct_ray.records import Completion, Item, Message, Trajectory
from spct_ray.serve.deployment import ServeConfig
from spct_ray.stages.recipe import Recipe, build_steps
from tests.scripted_engine import ScriptedEngine

ASKED = (Message("user", "Name a prime."),)
TEN = Scale(1, 10)


def item(num: int = 3, **changes: Any) -> Item:
    return Item("i", ASKED, tuple(f"answer {i}" for i in range(num)), (1.0, *[0.0] * (num - 1)), **changes)


def prompt(mode: ModeName, num: int = 3, template: Any = "compact", **changes: Any) -> str:
    config = JudgeConfig(template=template, single="scale", mode=mode)
    return judge_messages(item(num, **changes), range(num), config)[0].content


SHOWN = "Query: Name a prime.\n{}[Response 1]\nanswer 0\n[End 1]\n[Response 2]\nanswer 1\n[End 2]\n"
COMPACT: list[tuple[ModeName, dict[str, str], str]] = [
    ("list", {}, "Score 1-10.\n" + SHOWN.format("")),
    ("pairwise", {}, "Name the better: 1, 2 or tie.\n" + SHOWN.format("")),
    ("best", {}, "Name the best: 1-2.\n" + SHOWN.format("")),
    ("reference", {"reference": "7"}, "Score 1-10.\n" + SHOWN.format("Reference: 7\n")),
    ("principles", {"principles": "Truth"}, "Score 1-10.\n" + SHOWN.format("Principles: Truth\n")),
    ("no_principles", {"principles": "Truth"}, "Score 1-10.\n" + SHOWN.format("")),
]


@pytest.mark.parametrize(("mode", "given", "expected"), COMPACT, ids=[mode for mode, _, _ in COMPACT])
def test_compact_prompts(mode: ModeName, given: dict[str, str], expected: str) -> None:
    assert prompt(mode, 2, **given) == expected


FULL = """You are a skilled expert at scoring responses. {task}

{how}

#### General criteria ####
1. Instruction"""
STRICT = "Before scoring, analyse step by step, and score as strictly as you can."
ANCHORS = "1 means useless or harmful, 6 means acceptable with clear shortcomings, 10 means flawless."
SCALE = f"Scoring is on a scale of 1 to 10. {ANCHORS}\n{STRICT}"
OWN = "further criteria that are specific to the query and that you state first with their weights"
TEXTS: list[tuple[ModeName, dict[str, str], str, str, str]] = [
    ("list", {}, f"By the general criteria below, and by {OWN}, give each of the 2 responses an overall score.", SCALE,
     "Specific Criteria: <further criteria that matter for this query, each with its weight>\n"
     "Analysis: <compare the responses by the general and the specific criteria>\nScores: \\boxed{x1, x2}\n"),
    ("pairwise", {}, f"By the general criteria below, and by {OWN}, say which of the two responses is better.",
     "Before you decide, analyse step by step, as strictly as you can; their order does not count.\n"
     "Answer with v = 1 or v = 2 for the better response, or v = tie when neither is better.",
     "Verdict: \\boxed{v}\n"),
    ("best", {}, f"By the general criteria below, and by {OWN}, find the best of the 2 responses.",
     "Before you decide, analyse step by step, as strictly as you can.\nAnswer with the number j of a response.",
     "Best response: \\boxed{j}\n"),
    ("reference", {"reference": "7"},
     f"By the general criteria below, and by {OWN}, give each of the 2 responses an overall score. The reference "
     "answer is correct: a response that contradicts it is wrong.", SCALE, "Scores: \\boxed{x1, x2}\n"),
    ("principles", {"principles": "Truth"},
     "By the general criteria below, and by the principles that are given for the query, give each of the 2 responses "
     "an overall score.", SCALE,
     "Specific Criteria: <those of the given principles that matter here, each with its weight>\n"
     "Analysis: <compare the responses by the general and the specific criteria>\nScores: \\boxed{x1, x2}\n"),
    ("no_principles", {}, "By the general criteria below, give each of the 2 responses an overall score.", SCALE,
     "#### Output format ####\nAnalysis: <compare the responses by the general criteria>\nScores: \\boxed{x1, x2}\n"),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "given", "task", "how", "end"), TEXTS, ids=[text[0] for text in TEXTS])
def test_full_prompts(mode: ModeName, given: dict[str, str], task: str, how: str, end: str) -> None:
    found = prompt(mode, 2, "full", **given)
    assert found.startswith(FULL.format(task=task, how=how))
    assert found.endswith(end)
    assert isinstance(parse_scores(found, 2, TEN, read=MODES[mode].read), Failure)  # quoted, it gives no score


def test_every_mode_rates_a_single_response_as_list_does() -> None:
    for mode in MODES:
        if not MODES[mode].needs and not MODES[mode].writes_principles and MODES[mode].criteria:
            assert prompt(mode, 1, "full") == prompt("list", 1, "full")
        assert scale_of(1, JudgeConfig(mode=mode, single="scale")) == TEN


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("Best response: \\boxed{2}", (0, 1, 0)),
        ("\\boxed{1} no, \\boxed{ 3 }", (0, 0, 1)),
        ("\\boxed{4}", Failure.OUT_OF_RANGE),
        ("\\boxed{0}", Failure.OUT_OF_RANGE),
        ("\\boxed{1, 2}", Failure.WRONG_COUNT),
        ("\\boxed{j}", Failure.NOT_INTEGER),
        ("It is the second.", Failure.NO_BOX),
    ],
)
def test_the_index_of_the_best(reply: str, scores: tuple[int, ...] | Failure) -> None:
    assert parse_scores(reply, 3, Scale(0, 1), read=read_best) == scores


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("Verdict: \\boxed{1}", (2, 0)),
        ("\\boxed{ 2}", (0, 2)),
        ("\\boxed{Tie}", (1, 1)),
        ("\\boxed{v}", Failure.NOT_A_VERDICT),
        ("\\boxed{1, 2}", Failure.NOT_A_VERDICT),
        ("\\boxed{1", Failure.NO_BOX),
    ],
)
def test_verdicts_on_pairs(reply: str, scores: tuple[int, ...] | Failure) -> None:
    assert parse_scores(reply, 2, Scale(0, 2), read=read_verdict) == scores


@pytest.mark.parametrize(
    ("text", "thinks", "stop", "expected"),
    [
        ("<think>\\boxed{1, 9}</think>\n\nScores: \\boxed{9, 1}", False, "stop", (9, 1)),
        ("\n<think>\n</think>\\boxed{9, 1}", True, "stop", (9, 1)),
        ("perhaps \\boxed{1, 9}</think>\\boxed{9, 1}", True, "stop", (9, 1)),  # opened by the chat template
        ("<think>I say \\boxed{1, 9}", False, "length", Failure.TRUNCATED_THINKING),
        ("<think>I say \\boxed{1, 9}", False, "stop", Failure.TRUNCATED_THINKING),
        ("I say \\boxed{1, 9} but", True, "length", Failure.TRUNCATED_THINKING),
        ("<think>yes</think>Scores: \\boxed{9", False, "length", Failure.TRUNCATED),
        ("<think>\\boxed{1, 9}</think>I refuse.", False, "stop", Failure.NO_BOX),
        ("\\boxed{9, 1}", True, "stop", (9, 1)),  # did not think this time
        ("It says <think> \\boxed{9, 1}", False, "stop", (9, 1)),  # quoted, not leading
    ],
)
def test_thoughts_are_no_part_of_the_judgement(text: str, thinks: bool, stop: Any, expected: Any) -> None:
    assert parse_scores(text, 2, TEN, stop, thinks=thinks) == expected


def test_the_meta_rm_reads_no_thought() -> None:
    assert meta_messages(item(2), (0, 1), "<think>hm</think>\n\nScores: \\boxed{9, 1}")[1].content == (
        "Scores: \\boxed{9, 1}"
    )
    assert after_thinking("plain") == "plain"


def judged(
    config: JudgeConfig, answer: Any, *tasks: JudgeTask, seen: list[Request] | None = None, guided: bool = False
) -> list[Trajectory]:
    def reply(request: Request) -> list[str]:
        if seen is not None:
            seen.append(request)
        return [answer(request.messages[0].content)]

    return EngineJudge(ScriptedEngine(reply), config, "m", guided).judge(tasks)


def task(num: int = 3, order: tuple[int, ...] = (2, 0, 1), sample: int = 0, **changes: Any) -> JudgeTask:
    return JudgeTask(item(num, **changes), order, sample, 0.5, 7)


def test_single_ratings_are_one_prompt_a_response() -> None:
    def rate(text: str) -> str:
        return f"Scores: \\boxed{{{text.split('answer ')[1][0]}}}" if "answer 0" not in text else "\\boxed{9}"

    seen: list[Request] = []
    (made,) = judged(JudgeConfig(mode="single", single="scale"), rate, task(), seen=seen)
    assert (made.scores, made.order, made.failure, made.seed) == ((9, 1, 2), (2, 0, 1), "", 7)
    assert len({r.params.seed for r in seen}) == len(seen) == 3
    assert all(r.messages[0].content.count("Begin of Response") == 1 for r in seen)
    assert made.prompt_tokens == sum(len(r.messages[0].content) for r in seen)
    assert made.text.startswith("(response 3)\nScores: \\boxed{2}\n\n(response 1)")


def test_pairs_add_up_and_fail_by_name() -> None:
    """answer 0 beats both, 1 and 2 tie: 2 + 2, 1 and 1 points, in any order."""

    def compare(text: str) -> str:
        first, second = (text.split("Response ")[p].split("answer ")[1][0] for p in (1, 2))
        return f"\\boxed{{{'1' if first == '0' else '2' if second == '0' else 'tie'}}}"

    config = JudgeConfig(template="compact", mode="pairwise")
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        (made,) = judged(config, compare, task(order=order))
        assert made.scores == (4, 1, 1)
    assert scale_of(3, config) == Scale(0, 4)
    (made,) = judged(config, lambda text: "\\boxed{1}" if "answer 2" in text else "\\boxed{x}", task(order=(0, 1, 2)))
    assert (made.failure, made.scores) == ("not_a_verdict", ())
    seen: list[Request] = []
    (made,) = judged(config, lambda text: "\\boxed{1}", task(2, (1, 0)), seen=seen)
    assert (made.scores, made.text, len(seen)) == ((0, 2), "\\boxed{1}", 1)


def test_a_refused_part_is_an_aborted_judgement() -> None:
    def answer(request: Request) -> list[str]:
        if "answer 1" in request.messages[0].content:
            raise RequestError("a prompt of 9000 tokens")
        return ["\\boxed{5}"]

    judge = EngineJudge(ScriptedEngine(answer), JudgeConfig(mode="single", single="scale"), "m")
    made = judge.judge([task(), task(2, (0, 1)), replace(task(1, (0,)))])
    assert [t.failure for t in made] == ["aborted", "aborted", ""]
    assert "9000" in made[0].text


def test_responses_that_do_not_fit_one_prompt_are_judged_in_chunks_on_one_scale() -> None:
    quality, seen = [8, 3, 6, 5, 2, 7], []

    def answer(request: Request, fits: int) -> list[str]:
        shown = [int(found) for found in re.findall(r"answer (\d)", request.messages[0].content)]
        if len(shown) > fits:
            raise TooLongError(f"{len(shown)} responses")
        seen.append(len(shown))
        mood = len(seen) % 2  # a prompt's scores depend on the company
        return [f"Scores: \\boxed{{{', '.join(str(quality[i] + mood) for i in shown)}}}"]

    def made(fits: int, in_chunks: bool = True, **config: Any) -> list[Trajectory]:
        engine = ScriptedEngine(partial(answer, fits=fits))
        judge = EngineJudge(engine, JudgeConfig(single="scale", **config), "m", in_chunks=in_chunks)
        return judge.judge([task(6, (2, 0, 5, 1, 4, 3)), task(2, (1, 0)), task(6, (0, 1, 2, 3, 4, 5), 1)])

    for fits, num_prompts in ((5, 2), (4, 2), (3, 4), (2, 5)):  # two anchors, in pairs one
        for one in made(fits)[::2]:
            assert [score - one.scores[0] for score in one.scores] == [q - quality[0] for q in quality]
            assert (one.num_prompts, one.failure) == (num_prompts, "")
            assert one.text.count("Scores:") == num_prompts
    assert {one.num_prompts for one in made(6)} == {1}
    assert [one.failure for one in made(1)] == ["too_long"] * 3
    assert [one.failure for one in made(5, in_chunks=False)] == ["too_long", "", "too_long"]
    assert [one.failure for one in made(5, mode="best")] == ["too_long", "wrong_count", "too_long"]
    (first,) = (one for one in made(4)[:1])
    assert Trajectory.from_row(first.to_row()) == first
    assert Trajectory.from_row({k: v for k, v in first.to_row().items() if k != "num_prompts"}).num_prompts == 1


def test_principles_are_written_once_a_query_and_without_the_responses() -> None:
    def answer(text: str) -> str:
        return "\\boxed{9, 1, 1}" if "answer" in text else "Specific Criteria: Primality (100%)"

    seen: list[Request] = []
    config = JudgeConfig(template="compact", mode="query_principles")
    first, second = judged(config, answer, task(), task(sample=1), seen=seen)
    asked = [r for r in seen if "answer" not in r.messages[0].content]
    assert [(r.messages[0].content, r.params.temperature) for r in asked] == [
        ("Score 1-10.\nQuery: Name a prime.\n", 0.0)
    ]
    assert all("Principles: Primality (100%)\n" in r.messages[0].content for r in seen if r not in asked)
    assert first.scores == second.scores == (1, 1, 9)
    assert first.text == "Specific Criteria: Primality (100%)\n\n\\boxed{9, 1, 1}"
    assert first.completion_tokens == second.completion_tokens + len("Specific Criteria: Primality (100%)")
    assert first.item_id == "i"
    (none,) = judged(config, lambda text: " Specific Criteria: ", task())
    assert (none.failure, none.scores) == ("no_principles", ())
    (cut,) = judged(replace(config, max_tokens=5), answer, task())
    assert cut.failure == "truncated"


def test_thoughts_have_a_budget_of_their_own() -> None:
    seen: list[Request] = []
    config = JudgeConfig(max_tokens=30, thinking_tokens=50)
    (made,) = judged(config, lambda text: "hm</think>\\boxed{9, 1, 1}", task(), seen=seen)
    assert seen[0].params.max_tokens == 80
    assert made.text.startswith("<think>hm</think>")  # what the template opened is told
    (made,) = judged(config, lambda text: "x" * 99, task())
    assert made.failure == "truncated_thinking"


def test_who_refuses_what(tmp_path: Path) -> None:
    for mode in ("reference", "principles"):
        with pytest.raises(DataError, match=f"'{mode}' with every item, but i has none"):
            prompt(mode)
    with pytest.raises(ConfigError, match="leave guided out"):
        judged(JudgeConfig(mode="best"), str, guided=True)
    with pytest.raises(ConfigError, match="cannot be served"):
        ServeConfig("m", judge=JudgeConfig(mode="pairwise"))
    trained = {mode for mode in MODES if MODES[mode].is_trainable}
    assert trained == {"list", "reference", "principles", "no_principles"}
    for mode in MODES:
        recipe = Recipe(str(tmp_path), judge=JudgeConfig(mode=mode))
        if mode in trained:
            assert build_steps(recipe)
        else:
            with pytest.raises(ConfigError, match="as in list, reference, principles, no_principles"):
                build_steps(recipe)
    (tmp_path / "c.yaml").write_text("root: x\njudge: {mode: bests}\n")
    with pytest.raises(ConfigError, match=r"judge\.mode"):
        load(Recipe, str(tmp_path / "c.yaml"))


class PendingEngine(ScriptedEngine):
    """Answers when told to."""

    def __init__(self) -> None:
        super().__init__(lambda request: [""])
        self.asked: list[Future[Any]] = []

    def submit(self, request: Request) -> Future[Any]:
        self.asked.append(Future())
        return self.asked[-1]


def written(text: str) -> tuple[Completion, ...]:
    return ScriptedEngine(lambda request: [text]).submit(Request(ASKED, SamplingParams(max_tokens=99))).result()


async def asked_of(engine: PendingEngine, num: int) -> None:
    """Until the engine was asked so many times."""
    while len(engine.asked) < num:
        await asyncio.sleep(0)


def test_cancelling_a_judgement_cancels_all_its_prompts() -> None:
    async def scenario(mode: ModeName) -> list[bool]:
        engine = PendingEngine()
        one = asyncio.create_task(EngineJudge(engine, JudgeConfig(mode=mode), "m").judge_one(task()))
        await asked_of(engine, 1)
        if mode == "query_principles":
            engine.asked[0].set_result(written("Specific Criteria: Primality"))
            await asked_of(engine, 2)  # the judgement is asked for once the principles are there
        one.cancel()
        await asyncio.wait([one])
        await asyncio.sleep(0)  # in which the engine is told
        return [future.cancelled() for future in engine.asked]

    assert asyncio.run(scenario("single")) == [True] * 3
    assert asyncio.run(scenario("query_principles")) == [False, True]


def test_cancelling_a_judgement_leaves_the_others_of_its_query_their_principles() -> None:
    async def scenario() -> list[str]:
        engine = PendingEngine()
        judge = EngineJudge(engine, JudgeConfig(mode="query_principles"), "m")
        first, second = (asyncio.create_task(judge.judge_one(task(sample=k))) for k in range(2))
        await asked_of(engine, 1)
        first.cancel()
        await asyncio.wait([first])
        engine.asked[0].set_result(written("Specific Criteria: Primality"))
        later = asyncio.create_task(judge.judge_one(task(sample=2)))
        await asked_of(engine, 3)
        for future in engine.asked[1:]:
            future.set_result(written("\\boxed{9, 1, 1}"))
        return [made.text.split("\n")[0] for made in (await second, await later)]

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == ["Specific Criteria: Primality"] * 2


def test_a_dead_engine_ends_a_judgement_of_several_prompts_once() -> None:
    async def scenario() -> None:
        engine = PendingEngine()
        one = asyncio.create_task(EngineJudge(engine, JudgeConfig(mode="pairwise"), "m").judge_one(task()))
        await asked_of(engine, 3)
        for future in engine.asked:
            future.set_exception(EngineError("died"))
        with pytest.raises(EngineError, match="died"):
            await one

    asyncio.run(scenario())
