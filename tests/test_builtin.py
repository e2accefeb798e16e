"""The built-in set: its checkers against hand-made texts, and the promises of its items as properties."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spct_ray.data.builtin import BuiltinConfig, constraints_of, generate
from spct_ray.data.constraints import KINDS, Constraint, fits, words_of
from spct_ray.data.drafts import render, satisfy, vary, violate, write
from spct_ray.data.words import TOPICS, TOPICS_OF
from spct_ray.errors import ConfigError, DataError
from spct_ray.records import Item

# (constraint, a text that meets it, a text that fails it, evidence in each)
CASES = [
    (Constraint("bullets", 2), "- old hat\n- pond", "- old hat\n* pond", "- hat, - pond: 2", "- hat, * pond: 2"),
    (Constraint("numbered", 2), "1. hat\n2. pond", "1. hat\n3. pond", "1. hat, 2. pond: 2", "1. hat, 3. pond: 2"),
    (
        Constraint("json_key", "note"),
        '{"note": "a hat"}',
        '{"note": "a hat"',
        'from {"note": to hat"}',
        'from {"note": to hat"',
    ),
    (Constraint("num_sentences", 2), "A hat. So it is!", "A hat on 4.5 so.", "hat. is!: 2", "so.: 1"),
    (Constraint("num_words", 3), "the old hat.", "the hat.", "3 words", "2 words"),
    (Constraint("include", "hat"), "The old hat, maybe.", "The hats.", '"old hat"', 'no "hat"'),
    (Constraint("exclude", "hat"), "The hats.", "Hat on.", 'no "hat"', '"Hat"'),
    (Constraint("first_word", "Soon"), '"Soon, the hat"', "So soon", 'first "Soon"', 'first "So"'),
    (Constraint("last_word", "hat"), "The old hat!", "The hat on", 'last "hat"', 'last "on"'),
    (Constraint("no_commas"), "The hat.", "Soon, the hat.", "no comma", "comma ,"),
    (Constraint("number"), "On day 12.", "On day two.", "digit 1", "no digit"),
    (Constraint("end_mark", "!"), "The hat!", "The hat!?", "ends in !", "ends in !?"),
    (Constraint("end_number", 47), "The hat 47", "The hat 147", "ends with 47", "ends with 147"),
    (Constraint("title"), "<<A Hat>> The hat", "<A Hat> The hat", "starts with <<", "starts with <"),
    (Constraint("quotes"), '"The hat."', '"The" hat."', 'from " to ."', 'from " to ."'),
    (Constraint("lowercase"), "the hat 1", "the Hat", "no capital", "capital H"),
    (Constraint("uppercase"), "THE HAT 1", "THE Hat", "no small letter", "small letter a"),
]


def test_every_kind_has_a_hand_made_case() -> None:
    assert {case[0].kind for case in CASES} == set(KINDS)


@pytest.mark.parametrize(
    ("constraint", "good", "bad", "good_evidence", "bad_evidence"), CASES, ids=lambda c: str(c)[:30]
)
def test_checkers_and_evidence(
    constraint: Constraint, good: str, bad: str, good_evidence: str, bad_evidence: str
) -> None:
    assert (constraint.check(good), constraint.check(bad)) == (True, False)
    assert (constraint.evidence(good), constraint.evidence(bad)) == (good_evidence, bad_evidence)


def any_constraint() -> st.SearchStrategy[Constraint]:
    return st.sampled_from([Constraint(k, v) for k, kind in KINDS.items() for v in kind.values["train"]])


@given(any_constraint(), st.text(max_size=60))
def test_any_text_gets_a_verdict_and_evidence_on_one_line(constraint: Constraint, text: str) -> None:
    assert constraint.check(text) in (True, False)
    assert constraint.evidence(text).strip()
    assert "\n" not in constraint.evidence(text)


@settings(max_examples=400)
@given(any_constraint(), st.sampled_from(TOPICS), st.integers())
def test_satisfy_and_violate_do_what_they_say(constraint: Constraint, topic: str, seed: int) -> None:
    rng = Random(seed)
    taken = KINDS[constraint.kind].slots
    base = write(topic, taken, rng)
    good, bad = vary(base, taken, rng), vary(base, taken, rng)
    satisfy(good, constraint, rng)
    violate(bad, constraint, rng)
    assert constraint.check(render(good, topic))
    assert not constraint.check(render(bad, topic))
    assert 3 <= len(words_of(render(bad, topic))) <= 24


@pytest.fixture(scope="module")
def items() -> tuple[list[Item], list[Item]]:
    return generate(BuiltinConfig(6000, 2000), seed=3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40))
def test_right_responses_meet_all_and_wrong_ones_fail_exactly_one(seed: int) -> None:
    for item in itertools.chain(*generate(BuiltinConfig(40, 20), seed)):
        failed = [sum(not c.check(text) for c in constraints_of(item)) for text in item.responses]
        assert failed == [1 - int(reward) for reward in item.rewards], item
        assert len(set(item.responses)) == len(item.responses)
        if len(item.responses) > 1:
            assert sum(item.rewards) == 1
        assert any(
            not c.check(text) for c in constraints_of(item) for text in item.responses if c.kind == item.subset
        ) or (item.rewards == (1.0,))
        assert all(any(s in item.messages[0].content for s in c.instructions) for c in constraints_of(item))


def test_the_mix_is_as_configured(items: tuple[list[Item], list[Item]]) -> None:
    train, _ = items
    share = {n: count / len(train) for n, count in Counter(len(i.responses) for i in train).items()}
    assert share == pytest.approx({1: 0.1, 2: 0.6, 4: 0.3}, abs=0.02)
    assert {len(constraints_of(i)) for i in train} == {1, 2, 3}
    assert {i.subset for i in train} == set(KINDS)


@pytest.mark.parametrize("side", [0, 1])
def test_places_of_the_best_are_balanced_within_each_kind(items: tuple[list[Item], list[Item]], side: int) -> None:
    places: dict[tuple[int, str], Counter[int]] = defaultdict(Counter)
    for item in items[side]:
        n = len(item.responses)
        places[n, item.subset][item.best if n > 1 else int(item.rewards[0])] += 1
    for (n, kind), counts in places.items():
        per_place = [counts[place] for place in range(max(n, 2))]
        assert max(per_place) - min(per_place) <= 1, (n, kind, counts)


def test_topics_and_asked_values_are_disjoint(items: tuple[list[Item], list[Item]]) -> None:
    train, heldout = ({(c.kind, c.value) for item in side for c in constraints_of(item)} for side in items)
    assert {value for _, value in train & heldout} == {""}
    topics = [{t for t in TOPICS for item in side if t in words_of(item.messages[0].content)} for side in items]
    assert topics[0] == set(TOPICS_OF["train"])
    assert topics[1] == set(TOPICS_OF["heldout"])
    assert not topics[0] & topics[1]
    queries = [{item.messages[0].content for item in side} for side in items]
    assert not queries[0] & queries[1]


@pytest.mark.parametrize("longest", [True, False])
@pytest.mark.parametrize("unit", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_length_tells_nothing(items: tuple[list[Item], list[Item]], unit, longest: bool) -> None:  # type: ignore[no-untyped-def]
    gains = []  # over chance, ties shared
    for item in itertools.chain(*items):
        lengths = [unit(text) * (1 if longest else -1) for text in item.responses]
        top = [i for i, length in enumerate(lengths) if length == max(lengths)]
        if len(lengths) > 1:
            gains.append((item.best in top) / len(top) - 1 / len(lengths))
    assert abs(sum(gains) / len(gains)) < 0.02  # 7,200 items: one standard error is 0.006


@pytest.mark.parametrize("place", [0, -1])
def test_first_and_last_character_tell_little_without_the_query(
    items: tuple[list[Item], list[Item]], place: int
) -> None:
    """Guesses from one character, learned on train, tried on held-out, for kinds that it cannot decide."""
    decided = {"json_key", "quotes", "title", "bullets", "numbered", "end_mark", "end_number", "lowercase", "uppercase"}
    decided |= {"first_word"}
    sides = [[i for i in side if len(i.responses) == 2 and i.subset not in decided] for side in items]
    wins: Counter[str] = Counter()
    for item in sides[0]:
        for text, reward in zip(item.responses, item.rewards, strict=True):
            wins[text[place]] += 1 if reward else -1
    picks = [max((0, 1), key=lambda i: wins[item.responses[i][place]]) == item.best for item in sides[1]]
    assert abs(sum(picks) / len(picks) - 0.5) < 0.08  # about 600 items: one standard error is 0.02


def test_same_seed_same_items_and_another_seed_others() -> None:
    config = BuiltinConfig(50, 20)
    assert generate(config, 5) == generate(config, 5)
    assert generate(config, 5) != generate(config, 6)
    assert generate(config, 5)[0] == generate(BuiltinConfig(50, 0), 5)[0]


def test_ten_thousand_items_use_a_small_vocabulary(items: tuple[list[Item], list[Item]]) -> None:
    texts = [text for item in items[0] for text in (item.messages[0].content, *item.responses)]
    assert len({w.lower() for text in texts for w in words_of(text) if w.isalpha()}) < 600


def test_graded_items_rank_every_response_by_what_it_meets() -> None:
    config = BuiltinConfig(60, 20, (1, 2, 4), (0.2, 0.4, 0.4), (3,), (1.0,), graded=True)
    for item in itertools.chain(*generate(config, 3)):
        constraints = constraints_of(item)
        met = [sum(c.check(text) for c in constraints) for text in item.responses]
        if len(item.responses) == 1:
            assert item.rewards[0] == (met[0] == len(constraints))
        else:
            assert item.rewards == pytest.approx([m / len(constraints) for m in met])
            assert sorted(met, reverse=True) == [len(constraints) - i for i in range(len(met))]
    with pytest.raises(ConfigError, match="4 responses need 3 constraints, but num_constraints is 2"):
        generate(replace(config, num_constraints=(2,)), 3)


def test_kinds_can_be_chosen_and_unknown_ones_are_refused() -> None:
    chosen = generate(BuiltinConfig(30, 0, kinds=("quotes", "include")), 0)[0]
    assert {c.kind for item in chosen for c in constraints_of(item)} == {"quotes", "include"}
    with pytest.raises(ConfigError, match="quote_marks"):
        generate(BuiltinConfig(1, 1, kinds=("quote_marks",)), 0)
    with pytest.raises(ConfigError, match=r"num_responses .* one weight a value"):
        generate(BuiltinConfig(1, 1, num_responses=(2, 4)), 0)
    with pytest.raises(DataError, match="unknown constraint kind 'rhyme'"):
        Constraint("rhyme")
    with pytest.raises(DataError, match="'hh'"):
        constraints_of(Item("x", (), ("a",), source="hh"))


def test_kinds_that_decide_the_same_part_do_not_fit() -> None:
    assert not fits("uppercase", KINDS["lowercase"].slots)
    assert fits("include", KINDS["last_word"].slots)
