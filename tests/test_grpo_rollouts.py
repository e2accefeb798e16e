"""What GRPO asks for in a step, what the answers are worth, and what is left of the metrics after a kill."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_tokenizer

from jobs.replay import main as replay_job
from jobs.replay import replay
from spct_ray.data.store import write_items
from spct_ray.errors import ConfigError, DataError
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.parse import Failure
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.judge.rule import is_correct, is_ordered
from spct_ray.learn.batch import BatchSize
from spct_ray.learn.policy import MiniBatch, objective_of
from spct_ray.learn.train_config import OptimConfig, PolicyLoss
from spct_ray.records import Completion, Item, Message
from spct_ray.stages.grpo import (
    GrpoConfig,
    GrpoResources,
    Phases,
    run,
    trained_groups,
    with_advantages,
)
from spct_ray.stages.rollouts import (
    RewardRule,
    Rollout,
    RolloutDump,
    fitting_items,
    has_signal,
    parity_prompts,
    request_of,
    rollout_metrics,
    sample_groups,
    tasks_of_step,
    to_groups,
    with_fresh_groups,
    with_signal,
)

JUDGE = JudgeConfig(template="compact", max_tokens=99)


def make_item(number: int, num_responses: int = 2, words: int = 1) -> Item:
    responses = tuple(f"answer {i}" for i in range(num_responses))
    rewards = tuple(float(i == number % num_responses) for i in range(num_responses))
    return Item(f"item-{number}", (Message("user", "Name a prime. " * words),), responses, rewards)


TOKENIZER = make_tiny_tokenizer()


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(0, 3))
def test_parity_is_checked_where_the_items_differ(num_items: int, seed: int) -> None:
    tokenizer, judge = TOKENIZER, JudgeConfig()
    items = [
        Item(f"item-{i}", (Message("user", f"Tell me of {i * 7919} " + "in words " * i),), ("yes", "no"), (0.0, 1.0))
        for i in range(num_items)
    ]
    prompts, num_shared = parity_prompts(items, judge, tokenizer, seed)
    assert (prompts, num_shared) == parity_prompts(items, judge, tokenizer, seed)
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
    tails = [tokenizer.decode(prompt[num_shared:]) for prompt in prompts]
    lengths = [len(prompt) - num_shared for prompt in prompts]
    assert sum(lengths) >= 1000 or len(prompts) == num_items
    assert sum(lengths[:-1]) < 1000
    if num_items > 1:
        assert tokenizer.decode(prompts[0][:num_shared]).rstrip().endswith("Tell me of")
        assert all(any(f"{i * 7919} " in tail for i in range(num_items)) for tail in tails)
    else:
        assert "Tell me of 0" in tails[0]


def make_context(directory: Path) -> StepContext:
    (directory / "items").mkdir(exist_ok=True)
    inputs = {"items": str(directory / "items"), "rft": str(directory / "rft")}
    return StepContext("grpo", 1, str(directory / "out"), inputs, "spct run x.yaml")


@given(st.integers(1, 40), st.integers(1, 25), st.integers(0, 3))
def test_every_epoch_shows_every_item_once(num_items: int, num_prompts: int, seed: int) -> None:
    items = [make_item(i) for i in range(num_items)]
    num_steps = -(-3 * num_items // num_prompts)
    stream = [t.item.id for step in range(num_steps) for t in tasks_of_step(items, num_prompts, step, seed)]
    for epoch in range(3):
        assert len(set(stream[epoch * num_items : (epoch + 1) * num_items])) == num_items


def test_a_step_depends_on_seed_and_number_only() -> None:
    items = [make_item(i, num_responses=2 + 2 * (i % 2)) for i in range(30)]
    program = (
        "import json, sys; from spct_ray.records import Item; from spct_ray.stages.rollouts import tasks_of_step\n"
        "items = [Item.from_row(row) for row in json.load(sys.stdin)]\n"
        "print([t.to_row() for t in tasks_of_step(items, 8, 5, 3)])"
    )
    other = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([item.to_row() for item in items]),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert other.stdout.strip() == str([t.to_row() for t in tasks_of_step(items, 8, 5, 3)])
    assert tasks_of_step(items, 8, 5, 3) != tasks_of_step(items, 8, 5, 4)
    assert {t.seed for t in tasks_of_step(items, 8, 5, 3)}.isdisjoint(t.seed for t in tasks_of_step(items, 8, 6, 3))


def test_each_response_stands_in_each_place_equally_often_within_a_step() -> None:
    items = [make_item(i, num_responses=2 + 2 * (i % 2)) for i in range(64)]
    for num_responses in (2, 4):
        tasks = [t for t in tasks_of_step(items, 64, 0, 0) if len(t.order) == num_responses]
        for place in range(num_responses):
            assert set(Counter(t.order[place] for t in tasks).values()) == {32 // num_responses}


def test_a_group_samples_one_prompt_from_the_policy_itself() -> None:
    task = tasks_of_step([make_item(1)], 1, 0, 0)[0]
    params = request_of(task, JUDGE, 4).params
    assert (params.n, params.temperature, params.max_tokens, params.logprobs) == (4, 1.0, 99, True)


@pytest.mark.parametrize(
    ("scores_in_item_order", "outcome"),
    [((2, 4), "correct"), ((6, 1), "wrong"), ((8, 8), "tied")],  # golden vectors of Eq. 10: the second is best
)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_outcome_is_eq_10_in_the_items_order(
    scores_in_item_order: tuple[int, int], outcome: str, order: tuple[int, int]
) -> None:
    shown = ", ".join(str(scores_in_item_order[i]) for i in order)
    rollout = judged(make_item(1), order, f"Scores: \\boxed{{{shown}}}")
    assert rollout.outcome == outcome
    assert rollout.reward == (1 if outcome == "correct" else -1)
    assert (rollout.token_ids, rollout.num_prompt_tokens, rollout.weight_version) == ((7, 8, 9, 1, 2), 3, 5)


def test_a_tie_among_the_others_above_the_best_is_wrong_and_not_tied() -> None:
    assert judged(make_item(3, 4), (0, 1, 2, 3), r"\boxed{9, 9, 1, 5}").outcome == "wrong"


@pytest.mark.parametrize(
    ("item", "text", "outcome"),
    [
        (make_item(1), "no scores", "no_box"),
        (make_item(1), r"\boxed{1, 2, 3}", "wrong_count"),
        (make_item(0, 1), r"\boxed{1}", "correct"),
        (make_item(0, 1), r"\boxed{0}", "wrong"),
        (make_item(0, 1), r"\boxed{7}", "out_of_range"),
    ],
)
def test_failures_keep_their_name_and_single_responses_are_right_or_wrong(item: Item, text: str, outcome: str) -> None:
    assert judged(item, tuple(range(len(item.responses))), text).outcome == outcome


def judged(item: Item, order: tuple[int, ...], text: str, rule: RewardRule = "best", weight: float = 0.0) -> Rollout:
    return judged_groups(item, [(order, [text])], rule, weight)[0][0]


def judged_groups(
    item: Item, asked: list[tuple[tuple[int, ...], list[str]]], rule: RewardRule, weight: float = 0.0
) -> list[list[Rollout]]:
    """Groups for texts sampled in the given orders."""
    tasks = [JudgeTask(item, order, 0, 1.0, 0) for order, _ in asked]
    answers = [[Completion(t, (1, 2), (-0.5, -0.25), "stop", (7, 8, 9), 5, 3, 2) for t in texts] for _, texts in asked]
    return to_groups(tasks, answers, JUDGE, rule, weight)


def boxed(*scores: int) -> str:
    return f"\\boxed{{{', '.join(map(str, scores))}}}"


@pytest.mark.parametrize(
    ("scores", "best", "order"),
    [
        ((2, 5, 9), "correct", "correct"),
        ((5, 2, 9), "correct", "misordered"),
        ((3, 3, 9), "correct", "misordered"),  # a tie says nothing, and there is an order
        ((2, 9, 9), "tied", "tied"),
        ((2, 9, 5), "wrong", "wrong"),
    ],
)
@pytest.mark.parametrize("order_shown", list(itertools.permutations(range(3))))
def test_order_asks_for_the_whole_ranking(
    scores: tuple[int, ...], best: str, order: str, order_shown: tuple[int, ...]
) -> None:
    item = replace(make_item(0, 3), rewards=(0.1, 0.5, 0.7))
    text = boxed(*(scores[i] for i in order_shown))
    for rule, outcome in (("best", best), ("order", order)):
        rollout = judged(item, order_shown, text, rule)  # type: ignore[arg-type]
        assert (rollout.outcome, rollout.reward) == (outcome, 1 if outcome == "correct" else -1)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=6))
def test_a_ranking_against_brute_force(pairs: list[tuple[int, int]]) -> None:
    scores, rewards = [s for s, _ in pairs], [float(r) for _, r in pairs]
    if len(pairs) == 1:
        assert is_ordered(scores, rewards) == (scores[0] == rewards[0])
        return
    levels = sorted(set(rewards))
    by_level = [[s for s, r in zip(scores, rewards, strict=True) if r == level] for level in levels]
    assert is_ordered(scores, rewards) == all(max(low) < min(high) for low, high in itertools.pairwise(by_level))
    if len(pairs) == 2 and rewards[0] != rewards[1]:
        assert is_ordered(scores, rewards) == is_correct(scores, rewards)


@pytest.mark.parametrize(
    ("scores", "reward"),
    [((9, 2, 5), 1), ((9, 9, 5), 0), ((9, 9, 9), -1 / 3), ((2, 9, 9), -1), ((2, 5, 9), -1)],
)
def test_expected_pays_a_tie_what_breaking_it_at_random_would(scores: tuple[int, ...], reward: float) -> None:
    item = replace(make_item(0, 3), rewards=(1.0, 0.0, 0.0))
    assert judged(item, (0, 1, 2), boxed(*scores), "expected").reward == pytest.approx(reward)
    assert judged(item, (0, 1, 2), boxed(*scores), "best").reward == (1 if reward == 1 else -1)


def test_a_judgement_counts_in_both_orders_only_where_its_twin_is_right_too() -> None:
    right, wrong, tied, none = boxed(2, 4), boxed(4, 2), boxed(3, 3), "no scores"  # as shown in order (0, 1)
    turned = {right: boxed(4, 2), wrong: boxed(2, 4), tied: tied, none: none}
    texts = [right, right, right, wrong, none]
    twins = [right, wrong, none, tied, right]
    first, second = judged_groups(
        make_item(1), [((0, 1), texts), ((1, 0), [turned[text] for text in twins])], "both_orders"
    )
    assert [r.outcome for r in first] == ["correct", "inconsistent", "inconsistent", "wrong", "no_box"]
    assert [r.outcome for r in second] == ["correct", "wrong", "no_box", "tied", "inconsistent"]
    assert [r.reward for r in first] == [r.reward for r in second] == [1, -1, -1, -1, -1]


def test_a_single_response_has_no_second_order() -> None:
    groups = judged_groups(make_item(0, 1), [((0,), [boxed(1)]), ((0,), [boxed(0)])], "both_orders")
    assert [group[0].outcome for group in groups] == ["correct", "wrong"]


def test_both_orders_are_asked_one_after_the_other_for_half_as_many_items() -> None:
    items = [make_item(i, num_responses=1 + i % 4) for i in range(40)]
    tasks = tasks_of_step(items, 20, 3, 0, orders_per_item=2)
    assert len(tasks) == 20
    assert len({task.seed for task in tasks}) == 20
    for one, other in zip(tasks[::2], tasks[1::2], strict=True):
        assert (one.item, one.order) == (other.item, other.order[::-1])
    stream = [t.item.id for step in range(4) for t in tasks_of_step(items, 20, step, 0, orders_per_item=2)[::2]]
    assert len(set(stream)) == 40
    with pytest.raises(ConfigError, match="prompts_per_step is 7; reward both_orders asks"):
        GrpoConfig(prompts_per_step=7, reward="both_orders")


FORMED = "Specific Criteria: truth (100%)\nAnalysis: Response 2 is prime.\nScores: "


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (FORMED + boxed(2, 4), 1.25),
        (FORMED.replace("Scores:", "**Scores:**") + boxed(2, 4), 1.25),
        (boxed(2, 4), 1.0),
        (FORMED + boxed(4, 2), -0.75),
        (FORMED + boxed(4, 22), -1.0),  # the parts without scores are no judgement
        (FORMED.replace("Analysis", "Thoughts") + boxed(4, 2), -1.0),
        ("Analysis: x\nSpecific Criteria: y\nScores: " + boxed(4, 2), -1.0),
        ("Specific Criteria:\nAnalysis: Response 2 is prime.\nScores: " + boxed(2, 4), 1.0),
        (FORMED + "4, 2 " + boxed(2, 4), 1.0),
        ("<think>" + FORMED + "8</think>" + boxed(2, 4), 1.0),  # a thought is no part of the judgement
        ("<think>so</think>" + FORMED + boxed(2, 4), 1.25),
    ],
)
def test_the_format_term_is_added_to_judgements_with_scores_and_three_parts(text: str, reward: float) -> None:
    assert judged(make_item(1), (0, 1), text, weight=0.25).reward == reward
    assert judged(make_item(1), (0, 1), text).reward == (1 if reward > 0 else -1)


def test_equal_rewards_with_a_format_term_are_exactly_equal() -> None:
    """Else rounding would pass for a signal, and be scaled up to advantages of 1."""
    groups = judged_groups(
        make_item(1),
        [((0, 1), [FORMED + boxed(2, 4), FORMED + boxed(4, 2)]), ((1, 0), [FORMED + boxed(2, 4)] * 2)],
        "both_orders",
        weight=0.1,
    )
    assert [r.outcome for r in groups[0]] == ["inconsistent", "wrong"]
    assert not any(map(has_signal, groups))
    with pytest.raises(ConfigError, match="format_weight is 2; it must be at least 0 and below 2"):
        GrpoConfig(format_weight=2)
    with pytest.raises(ConfigError, match="a judgement in mode 'no_principles' has two"):
        GrpoConfig(judge=JudgeConfig(mode="no_principles"), format_weight=0.2)


def make_rollout(outcome: str, num_tokens: int = 2, stop_reason: str = "stop", version: int = 8) -> Rollout:
    reward, ids = 1.0 if outcome == "correct" else -1.0, (5,) * (3 + num_tokens)
    formed = outcome in ("correct", "wrong")
    return Rollout("i", ids, 3, (-1.0,) * num_tokens, outcome, formed, reward, stop_reason, version)  # type: ignore[arg-type]


def test_metrics_of_a_step_counted_by_hand() -> None:
    groups = [
        [make_rollout("correct"), make_rollout("tied")],
        [make_rollout("wrong"), make_rollout("truncated", num_tokens=10, stop_reason="length")],
        [make_rollout("correct"), make_rollout("correct")],
        [make_rollout("no_box", version=7), make_rollout("correct")],
    ]
    metrics = rollout_metrics(groups)
    assert metrics["reward"] == 0.0
    shares = {name: value for name, value in metrics.items() if name.startswith("share_")}
    assert shares == {
        **{f"share_unparsable_{failure}": 0 for failure in Failure},  # a reason that did not occur is listed, too
        "share_correct": 4 / 8,
        "share_tied": 1 / 8,
        "share_misordered": 0,
        "share_inconsistent": 0,
        "share_well_formed": 5 / 8,
        "share_wrong": 1 / 8,
        "share_unparsable_no_box": 1 / 8,
        "share_unparsable_truncated": 1 / 8,
    }
    assert (metrics["zero_signal_groups"], metrics["truncated"]) == (2 / 4, 1 / 8)
    assert (metrics["completion_tokens_mean"], metrics["completion_tokens_max"]) == (3.0, 10)
    assert metrics["weight_version"] == 7


def test_samples_without_signal_are_left_out_only_where_they_have_no_gradient() -> None:
    mixed = [make_rollout("correct"), make_rollout("wrong")]
    same = [make_rollout("wrong"), make_rollout("no_box")]
    objective = objective_of(PolicyLoss(), 99)
    assert [s.advantage for s in with_advantages([mixed, same], objective)] == [1, -1, 0, 0]
    rank: Any = SimpleNamespace(rank=0, world_size=1)
    for groups, beta, trained, size in (
        ([mixed, same], 0.1, [1, -1, 0, 0], BatchSize(4, 8)),
        ([mixed, same], 0.0, [1, -1], BatchSize(4, 8)),
        ([same], 0.0, [0, 0], BatchSize(2, 4)),
    ):
        batch = MiniBatch(with_advantages(groups, objective), rank, 999, beta)
        (row,) = batch.rows
        assert [values_N[0].item() for values_N in row.split(row.extras["advantages"])] == trained
        assert batch.size == size


def test_too_long_prompts_are_dropped_and_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = make_context(tmp_path)
    (tmp_path / "out").mkdir()
    items = [make_item(0), make_item(1, words=200), make_item(2)]
    write_items(str(tmp_path / "items" / "train.parquet"), items)
    make_tiny_tokenizer().save_pretrained(tmp_path / "rft" / "model")
    with pytest.raises(DataError, match="none of 3 items has a prompt of at most 5 tokens"):
        fitting_items(context, GrpoConfig(OptimConfig(lr=1e-3), JUDGE, max_prompt_tokens=5))
    config = GrpoConfig(OptimConfig(lr=1e-3), JUDGE, max_prompt_tokens=300)
    assert [item.id for item in fitting_items(context, config)] == ["item-0", "item-2"]
    assert "1 of 3 items dropped: their prompt exceeds max_prompt_tokens = 300" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "rft")  # what ranks and resumed runs read is there
    assert [item.id for item in fitting_items(context, config)] == ["item-0", "item-2"]
    assert capsys.readouterr().out == ""


def test_an_engine_without_room_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="= 5040 tokens exceed"):
        run(make_context(tmp_path), GrpoConfig(max_prompt_tokens=4000), GrpoResources())


def test_a_checkpoints_seconds_count_for_the_next_step() -> None:
    phase, groups = Phases(), [[make_rollout("correct")]]
    with phase("rollout"):
        pass
    assert phase.finish_step(groups, 2.0)["seconds_checkpoint"] == 0
    with phase("checkpoint"):
        sum(range(200_000))
    with phase("rollout"):
        pass
    line = phase.finish_step(groups, 2.0)
    assert line["seconds_step"] >= line["seconds_checkpoint"] > 0
    with phase("rollout"):
        pass
    assert phase.finish_step(groups, 2.0)["seconds_checkpoint"] == 0


@pytest.mark.parametrize("orders_per_item", [1, 2])
def test_groups_without_signal_are_refilled_in_bounded_rounds(orders_per_item: int) -> None:
    """Against a simulation: which of the asked-for items have a signal is drawn at random."""
    items = [make_item(i) for i in range(60)]
    for seed in range(40):
        rng, rounds = random.Random(seed), list[int]()
        chance = rng.choice([0.0, 0.3, 0.9])
        signal = {item.id: rng.random() < chance for item in items}

        def ask(tasks: Sequence[JudgeTask], rounds: list[int] = rounds, signal: dict[str, bool] = signal) -> Any:
            rounds.append(len(tasks))
            return [[make_rollout("correct"), make_rollout("wrong" if signal[t.item.id] else "correct")] for t in tasks]

        tasks = tasks_of_step(items, 8 * 4, 0, seed, orders_per_item)
        groups = sample_groups(tasks, ask, 8, orders_per_item)
        found, expected_rounds, asked = 0, list[int](), 0
        while found < 8 and len(expected_rounds) < 4:
            expected_rounds.append(8 - found)
            found += sum(signal[t.item.id] for t in tasks[asked : asked + 8 - found])
            asked += expected_rounds[-1]
        assert (rounds, len(groups)) == (expected_rounds, asked)
        assert len(with_signal(groups, orders_per_item)) == found <= 8
        config = GrpoConfig(prompts_per_step=8, dynamic_sampling=3)
        trained = trained_groups(groups, config)
        assert len(trained) == (found or 8)
        assert trained_groups(groups, replace(config, dynamic_sampling=0)) is groups


def test_an_item_in_two_orders_is_dropped_only_where_neither_group_has_a_signal() -> None:
    mixed, same = [make_rollout("correct"), make_rollout("wrong")], [make_rollout("wrong"), make_rollout("no_box")]
    assert with_signal([same, same, same, mixed, mixed, same], 2) == [same, mixed, mixed, same]


@pytest.mark.parametrize("orders_per_item", [1, 2])
def test_items_with_samples_from_too_old_weights_are_asked_again(orders_per_item: int) -> None:
    tasks = tasks_of_step([make_item(i) for i in range(9)], 8, 0, 0, orders_per_item)
    versions = [[3, 3], [3, 2], [3, 3], [1, 3], [2, 2], [2, 3]]
    groups = [[replace(make_rollout("wrong"), weight_version=v) for v in group] for group in versions]
    asked: list[JudgeTask] = []

    def ask(tasks: Sequence[JudgeTask]) -> list[list[Rollout]]:
        asked.extend(tasks)
        return [[replace(make_rollout("correct"), weight_version=4)] * 2 for _ in tasks]

    found = with_fresh_groups(groups, tasks, ask, 2, orders_per_item)
    again = [3] if orders_per_item == 1 else [2, 3]
    assert asked == [tasks[i] for i in again]
    assert [i for i, group in enumerate(found) if group[0].weight_version == 4] == again
    assert all(found[i] is groups[i] for i in range(6) if i not in again)
    asked.clear()
    assert with_fresh_groups(groups, tasks, ask, 1, orders_per_item) == groups
    assert not asked


def test_refills_are_further_items_of_the_same_epoch() -> None:
    items = [make_item(i) for i in range(64)]
    steps = [tasks_of_step(items, 8 * 4, step, 0) for step in range(2)]
    assert len({task.item.id for tasks in steps for task in tasks}) == 64
    assert tasks_of_step(items, 8, 0, 0) == steps[0][:8]  # the first round is as it is without refills


def test_a_dump_gives_back_what_was_sampled_and_keeps_what_is_asked_for(tmp_path: Path) -> None:
    tokenizer, dump = make_tiny_tokenizer(), RolloutDump(tmp_path)
    odd = replace(make_rollout("correct"), engine_logprobs=(-0.1, -1e-17), reward=1.1, token_ids=(5, 6, 7, 40, 41))
    groups = [[odd, make_rollout("truncated", stop_reason="length")], [make_rollout("tied")]]
    for step in (0, 7, 8, 12):
        dump.write(step, groups, tokenizer)
    dump.write(7, groups[:1], tokenizer)  # a step that is done again
    assert dump.read(8) == groups
    assert dump.read(7) == groups[:1]
    table = pq.read_table(tmp_path / "rollouts" / "step-00000008.parquet")
    assert table["text"].to_pylist()[0] == tokenizer.decode([40, 41])
    (tmp_path / "rollouts" / "step-00000013.parquet.partial").touch()  # of a killed writer
    assert dump.steps() == [0, 7, 8, 12]
    dump.prune(8)
    assert dump.steps() == [8, 12]


def test_a_replay_without_a_dump_to_start_from_says_what_to_do(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    Path(context.out).mkdir()
    RolloutDump(context.out).write(3, [[make_rollout("correct")]], make_tiny_tokenizer())
    with pytest.raises(DataError, match=r"\(dumped steps: \[3\]\); run with resources.grpo.dump_rollouts=true"):
        next(replay(context, GrpoConfig(), GrpoResources()))


def test_the_replay_job_looks_where_the_run_with_its_arguments_is(tmp_path: Path) -> None:
    demo = str(Path(__file__).parent.parent / "conf" / "demo.yaml")
    with pytest.raises(DataError, match=rf"{tmp_path}/steps/grpo-[0-9a-f]{{12}}: no checkpoint is followed by dumped"):
        replay_job(demo, [f"root={tmp_path}"], "python jobs/replay.py")
