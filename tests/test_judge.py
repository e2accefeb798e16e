"""The method: golden vectors of the paper, and properties against brute force."""

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spct_ray.engines.engine_judge import EngineJudge
from spct_ray.errors import RequestError
from spct_ray.judge.judge import JudgeTask, to_trajectory
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.parse import Failure, Scale, parse_scores
from spct_ray.judge.prompt import JudgeConfig, guide, judge_messages, meta_messages, scale_of
from spct_ray.judge.rule import is_correct, reward, select
from spct_ray.judge.seeds import derive_seed
from spct_ray.judge.vote import decide, decide_single, vote
from spct_ray.records import Item, Message, Trajectory
from tests.scripted_engine import ScriptedEngine

TEN = Scale(1, 10)


def trajectory(scores=(), failure="", sample=0, hinted=False, order=(0, 1), item_id="i"):
    return Trajectory(
        item_id, sample, order, "text", tuple(scores), failure, hinted, False, 0.5, 1, "m", 0, 10, 20, "stop"
    )


def item(num=2, best=0, item_id="i"):
    responses = tuple(f"answer {j}" for j in range(num))
    rewards = tuple(float(j == best) for j in range(num))
    return Item(item_id, (Message("user", "Name a prime."),), responses, rewards)


# --- Eq. 10


@pytest.mark.parametrize(
    ("scores", "expected"), [((2, 4), True), ((6, 1), False), ((8, 8), False), ((1, 10), True), ((10, 9), False)]
)
def test_rule_golden(scores, expected):
    assert is_correct(scores, (0.0, 1.0)) is expected
    assert reward(scores, (0.0, 1.0)) == (1.0 if expected else -1.0)


def test_rule_single_response_and_no_scores():
    assert is_correct((1,), (1.0,))
    assert not is_correct((0,), (1.0,))
    assert reward((), (0.0, 1.0)) == -1.0
    with pytest.raises(ValueError, match="2 scores for 3 rewards"):
        is_correct((1, 2), (0.0, 1.0, 0.5))


@given(st.lists(st.integers(1, 10), min_size=2, max_size=6), st.integers(0, 5), st.randoms())
def test_rule_ignores_the_order_of_responses(scores, best, rng):
    best %= len(scores)
    rewards = [float(j == best) for j in range(len(scores))]
    permutation = list(range(len(scores)))
    rng.shuffle(permutation)
    shuffled = is_correct([scores[p] for p in permutation], [rewards[p] for p in permutation])
    assert shuffled == is_correct(scores, rewards) == (scores.count(max(scores)) == 1 and scores[best] == max(scores))


# --- parser


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Scores: \\boxed{7, 3}", (7, 3)),
        ("**Scores:** \\boxed{ 10 ,1 }", (10, 1)),
        ("\\boxed{1, 1} no, better \\boxed{2, 9} done", (2, 9)),
        ("Scores: 7, 3", Failure.NO_BOX),
        ("\\boxed{7, 3} and then \\boxed{8, ", Failure.NO_BOX),
        ("\\boxed{}", Failure.NOT_INTEGER),
        ("\\boxed{7.5, 3}", Failure.NOT_INTEGER),
        ("\\boxed{\\text{7}, 3}", Failure.NOT_INTEGER),
        ("\\boxed{٧, 3}", Failure.NOT_INTEGER),
        ("\\boxed{7}", Failure.WRONG_COUNT),
        ("\\boxed{7, 3, 2}", Failure.WRONG_COUNT),
        ("\\boxed{0, 3}", Failure.OUT_OF_RANGE),
        ("\\boxed{11, 3}", Failure.OUT_OF_RANGE),
        ("\\boxed{-1, 3}", Failure.OUT_OF_RANGE),
    ],
)
def test_parse(text, expected):
    assert parse_scores(text, 2, TEN) == expected


def test_parse_names_truncation():
    assert parse_scores("Analysis: and so", 2, TEN, "length") is Failure.TRUNCATED
    assert parse_scores("\\boxed{3, 4", 2, TEN, "length") is Failure.TRUNCATED
    assert parse_scores("\\boxed{3, 4} and", 2, TEN, "length") == (3, 4)
    assert parse_scores("\\boxed{3, 4}", 2, TEN, "abort") is Failure.ABORTED


@given(st.lists(st.integers(1, 10), min_size=1, max_size=8), st.text(max_size=40), st.text(max_size=40))
def test_parse_reads_back_what_was_written(scores, before, after):
    text = f"{before}\\boxed{{{', '.join(map(str, scores))}}}{after.replace(chr(92), '')}"
    assert parse_scores(text, len(scores), TEN) == tuple(scores)


@given(st.text(max_size=200))
def test_parse_never_raises(text):
    assert isinstance(parse_scores("\\boxed{" + text, 2, TEN), tuple | Failure)


# --- orders


@given(st.integers(1, 7), st.integers(1, 40), st.integers(0, 10**6))
def test_orders_show_each_response_in_each_place_equally_often(num, samples, seed):
    orders = balanced_orders(num, samples, seed)
    assert len(orders) == samples
    assert all(sorted(order) == list(range(num)) for order in orders)
    for place, index in itertools.product(range(num), range(num)):
        count = sum(order[place] == index for order in orders)
        assert samples // num <= count <= -(-samples // num)
    assert orders == balanced_orders(num, samples, seed)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_orders_use_every_order_once_in_each_full_round(num, rounds, seed):
    orders = balanced_orders(num, rounds * math.factorial(num), seed)
    assert all(orders.count(order) == rounds for order in itertools.permutations(range(num)))


# --- votes


def test_vote_figure_3():
    samples = [trajectory(s, sample=k) for k, s in enumerate([(1, 5), (5, 6), (4, 8), (7, 6)])]
    assert vote("i", 2, samples).scores == (17, 25)
    guided = vote("i", 2, samples, logits=(2.0, -1.0, 1.0, -3.0), k_meta=2)
    assert (guided.scores, guided.used) == ((5, 13), (0, 2))


def test_vote_table_17():
    samples = [trajectory(s, sample=k) for k, s in enumerate([(8, 8), (5, 9), (7, 10)])]
    assert vote("i", 2, samples).scores == (20, 27)
    assert vote("i", 2, samples, logits=(-15.7781, 1.3126, 1.6739), k_meta=2).scores == (12, 19)


def test_vote_leaves_failures_out_and_counts_them():
    samples = [trajectory((3, 4)), trajectory(failure="no_box", sample=1), trajectory((2, 9), sample=2)]
    verdict = vote("i", 2, samples)
    assert (verdict.scores, verdict.used, verdict.failures) == ((5, 13), (0, 2), {"no_box": 1})
    with_meta = vote("i", 2, samples, logits=(1.0, math.nan, 0.0), k_meta=1)
    assert (with_meta.scores, with_meta.failures) == ((3, 4), {"no_box": 1})
    with pytest.raises(ValueError, match="NaN"):
        vote("i", 2, samples, logits=(math.nan, math.nan, 0.0))


def test_vote_without_a_usable_sample_has_no_scores():
    verdict = vote("i", 2, [trajectory(failure="truncated")])
    assert (verdict.scores, verdict.winners, decide(verdict, 0)) == ((), (), None)
    assert decide_single(verdict, Scale(0, 1), 0) is None


@given(
    st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10), st.floats(-5, 5)), min_size=1, max_size=8, unique=True),
    st.integers(1, 8),
    st.randoms(),
)
def test_vote_against_brute_force_and_order_of_samples(rows, k_meta, rng):
    samples = [trajectory(row[:2], sample=k) for k, row in enumerate(rows)]
    logits = [row[2] for row in rows]
    best = sorted(range(len(rows)), key=lambda k: (-logits[k], k))[:k_meta]
    expected = tuple(sum(rows[k][i] for k in best) for i in (0, 1))
    assert vote("i", 2, samples, logits, k_meta).scores == expected
    if len(set(logits)) == len(logits):
        mixed = list(range(len(rows)))
        rng.shuffle(mixed)
        assert vote("i", 2, [samples[k] for k in mixed], [logits[k] for k in mixed], k_meta).scores == expected


def test_ties_are_broken_at_random_with_the_seed():
    verdict = vote("i", 3, [Trajectory.from_row(trajectory((7, 7, 2), order=(0, 1, 2)).to_row())])
    drawn = [decide(verdict, seed) for seed in range(200)]
    assert drawn == [decide(verdict, seed) for seed in range(200)]
    assert 60 < drawn.count(0) < 140
    assert 2 not in drawn


def test_single_response_is_decided_by_its_mean():
    votes = [
        vote("i", 1, [trajectory((s,), sample=k, order=(0,)) for k, s in enumerate(scores)])
        for scores in [(1, 1, 0), (0, 0, 1), (9, 3), (5, 6)]
    ]
    assert [decide_single(v, Scale(0, 1), 0) for v in votes[:2]] == [1, 0]
    assert decide_single(votes[2], TEN, 0) == 1
    assert {decide_single(votes[3], TEN, seed) for seed in range(20)} == {0, 1}


# --- selection


def test_selection_rejects_wrong_and_too_easy():
    good, bad = (9, 1), (1, 9)
    mixed = select(
        item(),
        [
            trajectory(good),
            trajectory(bad, sample=1),
            trajectory(failure="no_box", sample=2),
            trajectory(good, hinted=True),
        ],
    )
    assert [t.key for t in mixed.accepted] == ["i/s0", "i/h0"]
    assert mixed.counts == {"unhinted_accepted": 1, "unhinted_incorrect": 1, "unhinted_no_box": 1, "hinted_accepted": 1}
    easy = select(item(), [trajectory(good, sample=k) for k in range(3)] + [trajectory(good, hinted=True)])
    assert easy.accepted == ()
    assert easy.counts == {"unhinted_too_easy": 3, "hinted_too_easy": 1}
    kept = select(item(), [trajectory(good, sample=k) for k in range(3)], reject_easy=False)
    assert (len(kept.accepted), kept.counts) == (3, {"unhinted_accepted": 3})
    hinted_wrong = select(item(), [trajectory(bad), trajectory((5, 5), hinted=True)])
    assert hinted_wrong.counts == {"unhinted_incorrect": 1, "hinted_incorrect": 1}


# --- prompts


@pytest.mark.parametrize("template", ["full", "compact"])
@given(order=st.permutations(range(3)))
def test_prompt_shows_the_responses_in_order(template, order):
    (turn,) = judge_messages(item(3), order, JudgeConfig(template=template))
    places = [turn.content.index(f"answer {index}\n") for index in order]
    assert places == sorted(places)
    assert turn.role == "user"


@pytest.mark.parametrize("template", ["full", "compact"])
def test_hint_names_the_place_of_the_best(template):
    config = JudgeConfig(template=template)
    (turn,) = judge_messages(item(3, best=2), (1, 2, 0), config, hint=True)
    assert "The best response is: Response 2" in turn.content
    (plain,) = judge_messages(item(3, best=2), (1, 2, 0), config)
    assert "best response is" not in plain.content
    (single,) = judge_messages(item(1), (0,), config, hint=True)
    assert "The correct score is: 1" in single.content


def test_scales():
    assert scale_of(1, JudgeConfig(single="binary")) == Scale(0, 1)
    assert scale_of(1, JudgeConfig(single="scale")) == scale_of(2, JudgeConfig()) == TEN
    assert "scale of 0 to 1" in judge_messages(item(1), (0,), JudgeConfig())[0].content


@pytest.mark.parametrize("num", [1, 2, 4])
def test_guide_admits_judgements_that_parse(num):
    config = JudgeConfig()
    box = ", ".join(["1"] * num)
    text = (
        "Specific Criteria: Uses the word given (weight 1.0)\n"
        + "Analysis: Response 1 does not use the word.\n It is short.\n"
        + f"Scores: \\boxed{{{box}}}"
    )
    assert re.fullmatch(guide(num, config), text)
    assert parse_scores(text, num, scale_of(num, config)) == (1,) * num
    assert not re.fullmatch(guide(num, config), text + " and more")


def test_meta_prompt_ends_with_the_judgement():
    user, assistant = meta_messages(item(2), (1, 0), "Scores: \\boxed{1, 2}")
    assert user.content.startswith("Please score the responses.")
    assert user.content.index("answer 1") < user.content.index("answer 0")
    assert (assistant.role, assistant.content) == ("assistant", "Scores: \\boxed{1, 2}")


# --- trajectories


@given(st.permutations(range(4)), st.lists(st.integers(1, 10), min_size=4, max_size=4))
def test_shuffling_responses_permutes_scores(order, by_item):
    text = f"\\boxed{{{', '.join(str(by_item[index]) for index in order)}}}"
    task = JudgeTask(item(4), tuple(order), 0, temperature=0.0, seed=7)
    made = to_trajectory(task, JudgeConfig(), text=text, stop_reason="stop", model="m")
    assert made.scores == tuple(by_item)
    assert made.failure == ""


def test_a_refused_request_is_a_named_failure_and_stops_no_other():
    def answer(request):
        if "answer 3" in request.messages[0].content:
            raise RequestError("a prompt of 9000 tokens exceeds 4096")
        return ["Scores: \\boxed{2, 9}"]

    judge = EngineJudge(ScriptedEngine(answer), JudgeConfig(), "m")
    tasks = [JudgeTask(item(n), tuple(range(n)), 0, temperature=1.0, seed=n) for n in (2, 4, 2)]
    made = judge.judge(tasks)
    assert [(t.failure, t.scores) for t in made] == [("", (2, 9)), ("aborted", ()), ("", (2, 9))]
    assert "9000 tokens" in made[1].text


def test_seeds_are_stable_and_apart():
    assert derive_seed(1, "item", 2) == derive_seed(1, "item", 2)
    seen = {derive_seed(run, name, k) for run in range(5) for name in ("a", "b", "1") for k in range(5)}
    assert len(seen) == 75
    assert derive_seed("ab", "c") != derive_seed("a", "bc")
    assert derive_seed("1") != derive_seed(1)
    assert derive_seed(1, "item", 2) == 3304312281833688102  # a change here changes every run
