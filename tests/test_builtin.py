"""The built-in set: its kinds against hand-made texts, the promises of its items and of the program that judges."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spct_ray.data.builtin import (
    KINDS,
    NAMES,
    PARTS,
    BuiltinConfig,
    generate,
    is_heldout_combination,
    kind_named,
    random_sentence,
    render,
    requirements_of,
    words_of,
)
from spct_ray.data.program import ProgramConfig, ProgramJudge, exercises, habits, judgement
from spct_ray.errors import ConfigError, DataError
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.parse import Scale, has_three_parts, parse_scores
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.judge.rule import is_correct
from spct_ray.records import Item
from spct_ray.stages.student import phrases, write_nano

JUDGE = JudgeConfig(template="compact")
FOXES = "The 4 red foxes often waited!"
SAWS = "The four tiny saws sadly wait?"


@pytest.mark.parametrize(
    ("name", "meets", "word"),
    [
        ("a number in digits", FOXES, "4"),
        ("a number in letters", SAWS, "four"),
        ("a colour", FOXES, "red"),
        ("a size", SAWS, "tiny"),
        ("animals", FOXES, "foxes"),
        ("tools", SAWS, "saws"),
        ("a time", FOXES, "often"),
        ("a feeling", SAWS, "sadly"),
        ("the past", FOXES, "waited"),
        ("the present", SAWS, "wait"),
        ("an exclamation mark", FOXES, "!"),
        ("a question mark", SAWS, "?"),
    ],
)
def test_each_kind_checks_and_quotes(name: str, meets: str, word: str) -> None:
    kind, other = KINDS[name], SAWS if meets == FOXES else FOXES
    assert kind.check(meets)
    assert kind.evidence(meets) == word
    assert not kind.check(other)
    assert kind.opposite.check(other)
    assert kind.evidence(other) in kind.opposite.words
    assert not kind.check("Nothing of the kind.")
    assert kind.evidence("") == ""


@given(st.integers(0, 2**40), st.sampled_from(list(KINDS)), st.sampled_from(["train", "heldout"]))
def test_what_a_kind_writes_it_finds_again_and_nothing_else_changes(seed: int, name: str, split: str) -> None:
    rng = Random(seed)
    sentence = random_sentence(split, rng)  # type: ignore[arg-type]
    before = render(sentence)
    KINDS[name].write(sentence, split, rng)  # type: ignore[arg-type]
    after = render(sentence)
    assert KINDS[name].check(after)
    for other in KINDS.values():
        assert other.check(after) == (other.check(before) if other.part != KINDS[name].part else other.name == name)


@pytest.fixture(scope="module")
def items() -> tuple[list[Item], list[Item]]:
    return generate(BuiltinConfig(4000, 1500), seed=3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40))
def test_the_best_meets_all_and_each_other_response_breaks_exactly_one(seed: int) -> None:
    for item in itertools.chain(*generate(BuiltinConfig(40, 20), seed)):
        broken = [sum(not kind.check(text) for kind in requirements_of(item)) for text in item.responses]
        if len(item.responses) == 1:
            assert broken == [0 if item.rewards == (1.0,) else 2]
        else:
            assert broken == [1 - int(reward) for reward in item.rewards]
            assert sum(item.rewards) == 1
        words = [set(words_of(text)) - {"The", "!", "?"} for text in item.responses]
        assert not any(a & b for a, b in itertools.combinations(words, 2))
        assert all(kind.name in item.messages[0].content for kind in requirements_of(item))


def test_the_mix_is_as_configured(items: tuple[list[Item], list[Item]]) -> None:
    share = {n: count / len(items[0]) for n, count in Counter(len(i.responses) for i in items[0]).items()}
    assert share == pytest.approx({1: 0.12, 2: 0.63, 3: 0.25}, abs=0.02)
    assert {len(requirements_of(i)) for i in items[0]} == {3, 4}


@pytest.mark.parametrize("side", [0, 1])
def test_places_of_the_best_are_balanced(items: tuple[list[Item], list[Item]], side: int) -> None:
    places: dict[int, Counter[int]] = defaultdict(Counter)
    for item in items[side]:
        n = len(item.responses)
        places[n][item.best if n > 1 else int(item.rewards[0])] += 1
    for n, counts in places.items():
        per_place = [counts[place] for place in range(max(n, 2))]
        assert max(per_place) - min(per_place) <= 1, (n, counts)


def test_names_words_and_combinations_are_held_out(items: tuple[list[Item], list[Item]]) -> None:
    texts = [{word for i in side for text in i.responses for word in words_of(text)} for side in items]
    held = {word for kind in KINDS.values() for word in kind.words if word not in kind.train_words}
    assert not texts[0] & held
    assert held <= texts[1]
    names = [{name for i in side for name in words_of(i.messages[0].content)} for side in items]
    for split, found in zip(("train", "heldout"), names, strict=True):
        assert found & {*NAMES["train"], *NAMES["heldout"]} == set(NAMES[split])  # type: ignore[index]
    combinations = [{tuple(sorted(k.part for k in requirements_of(i))) for i in side} for side in items]
    assert not combinations[0] & combinations[1]
    assert all(map(is_heldout_combination, combinations[1]))
    for size, held_out in ((3, 4), (4, 3)):  # of 20, and of 15
        assert sum(len(c) == size for c in combinations[1]) == held_out


def test_nothing_but_what_was_asked_tells_the_best(items: tuple[list[Item], list[Item]]) -> None:
    """A guess that follows one kind, whatever the query, is right half of the time."""
    pairs = [i for i in items[0] if len(i.responses) == 2]
    for kind in KINDS.values():
        unasked = [i for i in pairs if kind.part not in {k.part for k in requirements_of(i)}]
        guesses = [
            i.best == met.index(True) for i in unasked if sum(met := [kind.check(text) for text in i.responses]) == 1
        ]
        assert abs(sum(guesses) / len(guesses) - 0.5) < 0.12, kind.name  # about 350 items: one standard error is 0.027


def test_another_process_makes_the_same_items_and_another_seed_others() -> None:
    config = BuiltinConfig(50, 20)
    code = (
        "from spct_ray.data.builtin import *; from spct_ray.data.program import *; from spct_ray.judge.prompt import *;"
        "print(*generate(BuiltinConfig(50, 20), 5), *exercises(9, JudgeConfig(template='compact'), 5))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip("\n") == " ".join(map(str, [*generate(config, 5), *exercises(9, JUDGE, 5)]))
    assert generate(config, 5) != generate(config, 6)
    assert generate(config, 5)[0] == generate(BuiltinConfig(50, 0), 5)[0]


def test_graded_items_rank_every_response_by_what_it_meets() -> None:
    config = BuiltinConfig(60, 20, (1, 2, 4), (0.2, 0.4, 0.4), (3,), (1.0,), graded=True)
    for item in itertools.chain(*generate(config, 3)):
        asked = requirements_of(item)
        met = [sum(kind.check(text) for kind in asked) for text in item.responses]
        if len(item.responses) > 1:
            assert item.rewards == pytest.approx([m / len(asked) for m in met])
            assert sorted(met, reverse=True) == [len(asked) - i for i in range(len(met))]
    with pytest.raises(ConfigError, match="4 responses need 3 requirements, but num_requirements is 2"):
        generate(replace(config, num_requirements=(2,)), 3)


def test_what_cannot_be_made_or_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_responses .* one weight per value"):
        generate(BuiltinConfig(1, 1, num_responses=(2, 4)), 0)
    with pytest.raises(ConfigError, match="a response has 6 parts"):
        generate(BuiltinConfig(1, 1, num_requirements=(7,), num_requirements_weights=(1.0,)), 0)
    with pytest.raises(DataError, match="unknown kind 'rhyme'"):
        kind_named("rhyme")
    with pytest.raises(DataError, match="'hh'"):
        requirements_of(Item("x", (), ("a",), source="hh"))


def tasks(items: list[Item], hinted: bool = False) -> list[JudgeTask]:
    return [JudgeTask(item, tuple(range(len(item.responses))), 0, 1.0, i, hinted) for i, item in enumerate(items)]


def test_the_program_without_errors_is_right_where_it_looks_at_everything(
    items: tuple[list[Item], list[Item]],
) -> None:
    thorough = ProgramJudge(ProgramConfig((0, 0, 0, 1), alien=0, finding_error=0, format_error=0), JUDGE)
    four = [item for item in items[0][:300] if len(requirements_of(item)) == 4]
    for item, t in zip(four, thorough.judge(tasks(four)), strict=True):
        assert is_correct(t.scores, item.rewards), t.text
        assert has_three_parts(t.text)
    bare = ProgramJudge(ProgramConfig(), replace(JUDGE, mode="no_principles")).judge(tasks(four[:5]))
    assert all(t.text.startswith("Analysis:") for t in bare)


def test_the_program_errs_at_its_rates(items: tuple[list[Item], list[Item]]) -> None:
    config = ProgramConfig(num_stated_weights=(0.5, 0.5), alien=0.3, favourite=0.8, finding_error=0.1, format_error=0.1)
    counts: Counter[str] = Counter()
    for hinted in (False, True):
        for task, t in zip(
            tasks(items[0], hinted), (ProgramJudge(config, JUDGE).judge(tasks(items[0], hinted))), strict=True
        ):
            counts["judgements"] += 1
            counts["failed"] += bool(t.failure)
            asked = requirements_of(task.item)
            stated = [
                part.rpartition(" (")[0].strip() for part in t.text.splitlines()[0].split(":", 1)[1].split(";")[:-1]
            ]
            counts["stated"] += len(stated)
            aliens = set(stated) - {kind.name for kind in asked}
            counts["alien"] += len(aliens)
            counts["favourite"] += len(aliens & {"a feeling", "an exclamation mark"})
            for text, line in zip(task.item.responses, t.text.splitlines()[3::2], strict=False):
                for name in stated:
                    counts["hinted" if hinted else "found"] += 1
                    answer = "yes" if KINDS[name].check(text) else "no"
                    counts["false hinted" if hinted else "false"] += f" ({name}: {answer})" not in line
    assert counts["failed"] / counts["judgements"] == pytest.approx(0.1, abs=0.02)
    assert counts["stated"] / counts["judgements"] == pytest.approx(1.5, abs=0.05)
    assert counts["alien"] / counts["stated"] == pytest.approx(0.3, abs=0.03)
    assert counts["favourite"] / counts["alien"] > 0.5  # less than 0.8: where one was asked for, it is no alien
    assert counts["false"] / counts["found"] == pytest.approx(0.1, abs=0.02)
    assert counts["false hinted"] == 0


def test_what_is_named_first_is_looked_at_first(items: tuple[list[Item], list[Item]]) -> None:
    one = ProgramJudge(ProgramConfig((1,), fading=0.5, alien=0, finding_error=0, format_error=0), JUDGE)
    four = [item for item in items[0] if len(requirements_of(item)) == 4]
    first = [requirements_of(i)[0].name in t.text[:50] for i, t in zip(four, one.judge(tasks(four)), strict=True)]
    assert sum(first) / len(first) == pytest.approx(8 / 15, abs=0.04)


def test_habits_count_what_judgements_do(items: tuple[list[Item], list[Item]]) -> None:
    four = [item for item in items[0] if len(requirements_of(item)) == 4][:200]
    thorough = ProgramConfig((0, 0, 0, 1), alien=0, finding_error=0, format_error=0)
    careless = ProgramConfig((1,), alien=1, favourite=1, finding_error=0.25, format_error=0)
    found = [
        list(habits(zip(four, ProgramJudge(config, JUDGE).judge(tasks(four)), strict=True)).values())
        for config in (thorough, careless)
    ]
    assert found[0] == [4, 4, 0, 1, 0, 1]
    assert found[1][:4] == [1, 0, 1, 0]
    assert found[1][5] == pytest.approx(0.75, abs=0.06)
    assert set(habits([]).values()) == {None}


def test_scores_are_shares_of_what_is_met() -> None:
    kinds = [KINDS[name] for name in ("animals", "a colour", "a question mark")]
    text = judgement(kinds, [FOXES, SAWS], [[True, True, False], [False, False, True]], JUDGE)
    assert text == (
        "Specific Criteria: animals (33%); a colour (33%); a question mark (33%);\nAnalysis:\n[Response 1]\n"
        "The 4 red (a colour: yes) foxes (animals: yes) often waited! (a question mark: no) total 7.\n[Response 2]\n"
        "The four tiny (a colour: no) saws (animals: no) sadly wait? (a question mark: yes) total 5.\n"
        "Scores: \\boxed{7, 5}"
    )
    alone = judgement(kinds[:2], ["Red foxes"], [[True, False]], JUDGE)  # no colour: "Red" is no word of ours
    assert alone.endswith("\nRed foxes (animals: yes) (a colour: no) total 0.\nScores: \\boxed{0}")


def test_exercises_apply_the_given_principles_to_all_words() -> None:
    made = list(exercises(800, JUDGE, 1))
    assert {word for kind in KINDS.values() for word in kind.words} <= {
        word for row in made for word in words_of(row["completion"])
    }
    ties = 0
    for row in made:
        given = row["prompt"].partition("\nPrinciples: ")[2].partition("\n")[0]
        assert row["completion"].startswith(f"Specific Criteria: {given}\nAnalysis:\n")
        n = row["prompt"].count("[End ")
        scores = parse_scores(row["completion"], n, Scale(0, 1) if n == 1 else Scale(1, 10))
        assert isinstance(scores, tuple)
        ties += n == 2 and scores[0] == scores[1]
    assert ties > 50  # a judge that never saw one would guess


def test_the_nano_tokenizer_has_a_token_for_every_phrase_and_takes_any_text(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    write_nano(str(tmp_path), phrases(), 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for row in exercises(100, JUDGE, 2):
        text = row["prompt"] + row["completion"]
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text) / 5
        assert {tokenizer.decode([i]) for i in ids if len(tokenizer.decode([i])) == 1} <= set("0123456789!?.,:;}\n")
    for text in ("Ünïcode \u3042 \t{x} <|en", "redundant  \n\n 44", ""):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


def test_every_part_has_two_kinds() -> None:
    assert Counter(kind.part for kind in KINDS.values()) == dict.fromkeys(PARTS, 2)
