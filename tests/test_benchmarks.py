"""Benchmarks in their authors' shapes and their official scores, on tiny files with answers computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spct_ray.data.validate import Limits
from spct_ray.errors import ConfigError, DataError
from spct_ray.evaluation.benchmarks import BENCHMARKS, BenchmarkSpec, find, own, parse_spec, read_benchmark
from spct_ray.evaluation.benchmarks.benchmark import Benchmark, Scoring, accuracy
from spct_ray.evaluation.judgements import Decision, Sheet, facts_of
from spct_ray.evaluation.statistics import auc
from spct_ray.records import Item


def load(tmp_path: Path, name: str, rows: list[dict[str, Any]], limits: Limits = Limits()) -> list[Item]:  # noqa: B008
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_benchmark(BenchmarkSpec(name, str(file), name), limits, None, 0)[0]


def score(name: str, items: list[Item], given: list[list[float]], **orders: Any) -> dict[str, float]:
    """Official score of `given`, one list of scores an item in the item's own order."""
    sheet = Sheet.of(items)
    scores = padded(given, sheet)
    decision = Decision(
        scores, padded(orders.get("forward", given), sheet), padded(orders.get("backward", given), sheet)
    )
    return find(name).score(Scoring(sheet, decision, np.ones(len(items))))


def padded(given: list[list[float]], sheet: Sheet) -> np.ndarray[Any, Any]:
    scores = np.zeros(sheet.option_IO.shape)
    for i, row in enumerate(given):
        scores[i, : len(row)] = row if row else math.nan
        if not row:
            scores[i] = math.nan
    return scores


def pair(subset: str, number: int) -> dict[str, Any]:
    return {"id": number, "prompt": f"Q{number}?", "chosen": "good", "rejected": "bad", "subset": subset}


def test_reward_bench_weights_subsets_and_sections(tmp_path: Path) -> None:
    rows = [pair(s, i) for i, s in enumerate(["alpacaeval-easy", "mt-bench-med", "math-prm", "hep-cpp", "hep-cpp"])]
    items = load(tmp_path, "rewardbench", rows)
    assert [item.responses for item in items] == [("good", "bad")] * 5
    # Chat: right (100 items), wrong (40): 100/140. Reasoning: math-prm a tie, 0.5 (984), hep-cpp 1/2 (164): 0.5.
    found = score("rewardbench", items, [[9, 2], [3, 4], [5, 5], [7, 1], [1, 7]])
    assert found == pytest.approx({"score": (100 / 140 + 0.5) / 2, "Chat": 100 / 140, "Reasoning": 0.5})
    # An item without any usable judgement is wrong: Reasoning is (0 * 984 + 0.5 * 164) / 1148.
    found = score("rewardbench", items, [[9, 2], [9, 4], [], [7, 1], [1, 7]])
    assert found["Reasoning"] == pytest.approx(82 / 1148)


def test_reward_bench_2_best_of_four_and_ties(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": "Q", "chosen": ["g"], "rejected": ["x", "y", "z"], "subset": "Math"},
        {"id": "b", "prompt": "Q", "chosen": ["g"], "rejected": ["x", "y", "z"], "subset": "Math"},
        {"id": "tied:1", "prompt": "A colour?", "chosen": ["red", "blue"], "rejected": ["dog"], "subset": "Ties"},
        {"id": "ref:1", "prompt": "Colour of blood?", "chosen": ["red"], "rejected": ["dog"], "subset": "Ties"},
        {"id": "tied:2", "prompt": "A fruit?", "chosen": ["fig", "plum"], "rejected": ["cat"], "subset": "Ties"},
        {"id": "ref:2", "prompt": "Newton's fruit?", "chosen": ["apple"], "rejected": ["cat"], "subset": "Ties"},
    ]
    items = load(tmp_path, "rewardbench2", rows)
    assert [len(item.responses) for item in items] == [4, 4, *[1] * 10]
    assert [item.rewards[0] for item in items[2:5]] == [1, 1, 0]
    ratings = [9, 8, 4, 9, 5, 7, 4, 6, 5, 5]
    given: list[list[float]] = [[7, 7, 1, 1], [8, 3, 3, 3], *([5.5, r] for r in ratings)]
    # Math: two share the first place, 1/2, and 1: 0.75.
    # Prompt 1: tied 9 8 | 4: gap 4, spread 1, accurate; ref 9 | 5: gap 4, accurate.
    # Prompt 2: tied 7 4 | 6: gap -2, spread 3; ref 5 | 5: gap 0, not accurate.
    # 0.3 * 1/2 + 0.3 * 1/2 + 0.2 * 1/2 + 0.2 * 1/2 + 0.01 * (tanh(4/1 - 1) + tanh(-2/3 - 1)) / 2
    ties = 0.5 + 0.01 * (math.tanh(3) + math.tanh(-5 / 3)) / 2
    assert score("rewardbench2", items, given) == pytest.approx(
        {"score": (0.75 + ties) / 2, "Math": 0.75, "Ties": ties}
    )
    # Without spread (8 8 | 4) the last term is 1 for a positive gap, as tanh of infinity.
    given[2:5] = [[5.5, 8], [5.5, 8], [5.5, 4]]
    again = 0.5 + 0.01 * (1 + math.tanh(-5 / 3)) / 2
    assert score("rewardbench2", items, given)["Ties"] == pytest.approx(again)
    # 8 8 | 8: gap 0, not accurate, and 0 / 0 counts 0: 0.3 * 1/2 for the references, nothing preferred.
    given[4] = [5.5, 8]
    assert score("rewardbench2", items, given)["Ties"] == pytest.approx(0.15 + 0.01 * math.tanh(-5 / 3) / 2)
    # Prompt 1's wrong response without a rating: as if its worst right response were below it.
    given[4] = []
    assert score("rewardbench2", items, given)["Ties"] == pytest.approx(0.15 + 0.01 * (-1 + math.tanh(-5 / 3)) / 2)


RM_ROW = {"id": "r", "prompt": "Q?", "chosen": ["c1", "c2", "c3"], "rejected": ["w1", "w2", "w3"], "domain": "chat"}


def test_rm_bench_matrix(tmp_path: Path) -> None:
    (item,) = load(tmp_path, "rmbench", [RM_ROW])
    assert item.responses == ("c1", "c2", "c3", "w1", "w2", "w3")
    # right 5 6 8, wrong 4 6 7. Rows (concise, plain, markdown): 5 > 4 | not 6 | not 7; 6 > 4 | no | no; all three.
    # hard = above the diagonal (0, 0, 0) = 0; normal = (1, 0, 1) = 2/3; easy = below (1, 1, 1) = 1.
    expected = {"score": 5 / 9, "hard": 0.0, "normal": 2 / 3, "easy": 1.0, "chat": 5 / 9}
    assert score("rmbench", [item], [[5, 6, 8, 4, 6, 7]]) == pytest.approx(expected)
    # Too long for one prompt: the same as nine pairs.
    pairs = load(tmp_path, "rmbench", [RM_ROW], Limits(max_item_chars=8))
    right, wrong = (5, 6, 8), (4, 6, 7)
    assert len(pairs) == 9
    given = [[float(right[i]), float(wrong[j])] for i, j in (facts_of(p)["cell"] for p in pairs)]
    assert score("rmbench", pairs, given) == pytest.approx(expected)


def test_rm_bench_domains_weigh_equal_and_safety_is_one_of_them(tmp_path: Path) -> None:
    domains = ["chat", "chat", "math", "safety-refuse", "safety-response", "safety-response"]
    items = load(tmp_path, "rmbench", [RM_ROW | {"id": str(i), "domain": d} for i, d in enumerate(domains)])
    all_right, all_wrong = [9.0, 9, 9, 1, 1, 1], [1.0, 1, 1, 9, 9, 9]
    # chat (1 + 0) / 2, math 1, safety (0 + 1 + 1) / 3 by items, not by halves: mean of 1/2, 1 and 2/3.
    found = score("rmbench", items, [all_right, all_wrong, all_right, all_wrong, all_right, all_right])
    assert found["score"] == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    assert (found["chat"], found["math"], found["safety"]) == pytest.approx((1 / 2, 1, 2 / 3))


def test_rmb_needs_the_single_best(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "Q?"}]

    def answers(*texts: str) -> list[dict[str, str]]:
        return [{"llm_name": "m", "answer": text} for text in texts]

    good, bad, worse = answers("good", "bad", "worse")
    rows: list[dict[str, Any]] = [
        {"pair_uid": "p1", "conversation_input": turn, "chosen": good, "reject": bad,
         "category_path": "Pairwise_set/Helpfulness/Chat"},
        {"pair_uid": "p2", "conversation_input": turn, "chosen": good, "reject": bad,
         "category_path": "Pairwise_set/Harmlessness/S1"},
        {"bon_uid": "b1", "conversation_input": turn, "bon_best": good, "loser_list": [bad, worse],
         "category_path": "BoN_set/Helpfulness/Chat"},
        {"bon_uid": "b2", "conversation_input": turn, "bon_best": good, "loser_list": [bad, worse],
         "category_path": "BoN_set/Helpfulness/Chat"},
    ]  # fmt: skip
    items = load(tmp_path, "rmb", rows)
    # pairs: right; tied, so wrong. Best of n: 8 > 7, 2 right; 7 = 7 wrong: 1/2. Mean of 1, 0, 1/2.
    found = score("rmb", items, [[8, 2], [5, 5], [8, 7, 2], [7, 7, 1]])
    assert found == pytest.approx(
        {"score": 0.5, "Helpfulness pairwise": 1, "Harmlessness pairwise": 0, "Helpfulness best of n": 0.5}
    )
    # Asked in pairs, a best-of-n row counts once and only if every pair is right.
    split = load(tmp_path, "rmb", rows[2:], Limits(max_responses=2))
    assert len(split) == 4
    assert score("rmb", split, [[8, 7], [8, 2], [9, 1], [7, 7]])["score"] == pytest.approx(0.5)


def test_judge_bench_counts_over_both_orders(tmp_path: Path) -> None:
    rows = [
        {
            "pair_id": str(i),
            "question": "Q?",
            "response_A": "a",
            "response_B": "b",
            "label": label,
            "source": source,
            "response_model": "gpt" if i < 3 else "claude",
        }
        for i, (label, source) in enumerate(
            [("A>B", "mmlu-pro-law"), ("B>A", "mmlu-pro-law"), ("A>B", "livebench-math"), ("A>B", "livecodebench")]
        )
    ]
    items = load(tmp_path, "judgebench", rows)
    assert [item.responses[0] for item in items] == ["a", "b", "a", "a"]  # the right one first
    # right right: +2. right tie: +1, right too. right wrong: 0, not right. none wrong: -1.
    forward: list[list[float]] = [[8, 2], [8, 2], [8, 2], []]
    backward: list[list[float]] = [[6, 5], [5, 5], [2, 8], [2, 8]]
    found = score("judgebench", items, forward, forward=forward, backward=backward)
    assert found == pytest.approx(
        {"score": 0.5, "knowledge": 1, "math": 0, "coding": 0, "both_right": 0.25, "inconsistent": 0.75,
         "gpt": 2 / 3, "claude": 0}
    )  # fmt: skip
    # A tie in one order and no verdict in the other sum to 0 and are not the same.
    tied = score("judgebench", items[:1], [[5, 5]], forward=[[5, 5]], backward=[[]])
    assert (tied["score"], tied["inconsistent"]) == (0, 1)


def test_ppe_preference_drops_ties(tmp_path: Path) -> None:
    base = {"prompt": "Q?", "response_1": "one", "response_2": "two"}
    file = tmp_path / "p.jsonl"
    winners = ["model_a", "model_b", "tie", "tie (bothbad)"]
    file.write_text("".join(json.dumps(base | {"question_id": w, "winner": w}) + "\n" for w in winners))
    items, dropped = read_benchmark(BenchmarkSpec("ppe_preference", str(file), "p"), Limits(), None, 0)
    assert [item.responses[0] for item in items] == ["one", "two"]
    assert dropped.counts == {"no_unique_best": 2}
    assert dropped.first == {"no_unique_best": f"{file}:3"}


def test_ppe_correctness_pairs_and_best_of_k(tmp_path: Path) -> None:
    row = {"question_id": "q", "prompt": "2 + 2?", "response_1": "5", "response_2": "4", "response_3": "four",
           "scores": [False, True, True], "sampled_conflict_pairs": [[0, 1], [2, 0]], "subset": "math"}  # fmt: skip
    hopeless = row | {"question_id": "h", "scores": [False, False, False], "sampled_conflict_pairs": []}
    items = load(tmp_path, "ppe_correctness", [row, hopeless])
    assert [item.responses for item in items] == [("4", "5"), ("four", "5"), ("4", "four", "5")]
    # pairs 1 and 0; of the three answers a wrong one shares the first place with a right one: 1/2.
    found = score("ppe_correctness", items, [[9, 2], [2, 9], [7, 1, 7]])
    assert found == pytest.approx({"score": 0.5, "math": 0.5, "best of k": 0.5})


def test_realmistake_auc_and_f1(tmp_path: Path) -> None:
    labels = ["no_error", "no_error", "error", "error"]
    rows = [{"input": f"Q{i}", "llm_response": "r", "error_label": label} for i, label in enumerate(labels)]
    items = load(tmp_path, "realmistake", rows)
    # right 8 4, wrong 4 2: pairs 8>4, 8>2, 4=4 (1/2), 4>2 -> 3.5 of 4. Below 5.5 is an error: 3 found, 2 of 2 true.
    found = score("realmistake", items, [[5.5, 8], [5.5, 4], [5.5, 4], [5.5, 2]])
    assert found == pytest.approx({"score": 3.5 / 4, "error F1": 2 * 2 / (3 + 2), "rated": 1})
    # An unrated item is no part of the area: 8 and 4 against 4, 1.5 of 2.
    found = score("realmistake", items, [[5.5, 8], [5.5, 4], [5.5, 4], []])
    assert found == pytest.approx({"score": 1.5 / 2, "error F1": 2 * 1 / (2 + 2), "rated": 0.75})


def test_realmistake_f1_is_a_mean_over_tasks_and_response_models(tmp_path: Path) -> None:
    for task, models in {"facts": ("gpt", "llama"), "math": ("gpt",)}.items():
        (tmp_path / task).mkdir()
        for model in models:
            rows = [{"input": f"{i}", "llm_response": "r", "label": "error", "metadata": {"llm_response_model": model}}
                    for i in range(2)]  # fmt: skip
            (tmp_path / task / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, _ = read_benchmark(BenchmarkSpec("realmistake", str(tmp_path), "r"), Limits(), None, 0)
    assert [(i.subset, facts_of(i)["response model"]) for i in items[::2]] == [
        ("facts", "gpt"), ("facts", "llama"), ("math", "gpt"),
    ]  # fmt: skip
    # facts/gpt: both found, 1. facts/llama: one of two, 2 / (1 + 2). math/gpt: none, 0. All together: 6 / (3 + 6).
    found = score("realmistake", items, [[5.5, r] for r in (2, 3, 2, 9, 8, 9)])
    assert found == pytest.approx({"error F1": (1 + 2 / 3 + 0) / 3, "rated": 1})


def test_llmbar_means_of_subsets_without_case_studies(tmp_path: Path) -> None:
    for folder in ("Natural", "Adversarial/Neighbor", "CaseStudy"):
        (tmp_path / folder).mkdir(parents=True)
        rows = [{"input": f"Q{i}", "output_1": "x", "output_2": "y", "label": 1 + i % 2} for i in range(2)]
        (tmp_path / folder / "dataset.json").write_text(json.dumps(rows))
    items, _ = read_benchmark(BenchmarkSpec("llmbar", str(tmp_path), "llmbar"), Limits(), None, 0)
    assert [(i.subset, i.responses[0]) for i in items[:2]] == [("Neighbor", "x"), ("Neighbor", "y")]
    # Neighbor: both wrong; CaseStudy both right; Natural one tie, one right: 3/4.
    found = score("llmbar", items, [[1, 2], [1, 2], [9, 1], [9, 1], [5, 5], [9, 1]])
    assert found == pytest.approx(
        {"score": 0.375, "Natural": 0.75, "Neighbor": 0.0, "adversarial": 0.0, "CaseStudy": 1.0}
    )


def test_weights_are_the_same_as_repeated_items(tmp_path: Path) -> None:
    """The bootstrap gives multiplicities instead of copies."""
    rng = np.random.default_rng(0)
    subsets = ["alpacaeval-easy", "mt-bench-hard", "donotanswer", "hep-go", "math-prm"]
    items = load(tmp_path, "rewardbench", [pair(s, i) for i, s in enumerate(subsets * 3)])
    for name in ("rewardbench", "own", "judgebench", "llmbar"):
        given = rng.integers(1, 10, (len(items), 2)).astype(float)
        weight = rng.integers(0, 3, len(items))
        copies = np.repeat(np.arange(len(items)), weight)
        many = Sheet.of([items[i] for i in copies])
        once = find(name).score(Scoring(Sheet.of(items), Decision(given, given, given), weight.astype(float)))
        decision = Decision(given[copies], given[copies], given[copies])
        assert once == pytest.approx(find(name).score(Scoring(many, decision, np.ones(len(copies)))))
    scores, positive = rng.integers(0, 4, 40).astype(float), rng.random(40) < 0.5
    pairs = [(a, b) for a in scores[positive] for b in scores[~positive]]
    expected = np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs])
    assert auc(scores, positive, np.ones(40)) == pytest.approx(expected)


def test_own_shape_serves_any_benchmark_of_pairs(tmp_path: Path) -> None:
    row = {"id": "i", "messages": [{"role": "user", "content": "Q?"}], "responses": ["bad", "good"],
           "rewards": [0, 1], "subset": "hep-go"}  # fmt: skip
    items = load(tmp_path, "rewardbench", [row])
    assert score("rewardbench", items, [[2, 9]]) == {"score": 1.0, "Reasoning": 1.0}


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("rewardbench", [pair("hep-cpp", 0), pair("hep-gogo", 1)], [":2", "'subset'", "'hep-gogo'", "'hep-go'"]),
        ("rewardbench", [{"prompt": "Q?", "chosen": "x"}], [":1", "no column 'rejected'", "found chosen, prompt"]),
        ("rmbench", [RM_ROW | {"chosen": ["one"]}], [":1", "'chosen' must hold 3", "found 1"]),
        ("judgebench", [{"question": "Q", "response_A": "a", "response_B": "b", "label": "A"}], ["'label'", "'A'"]),
        ("realmistake", [{"input": "Q", "llm_response": 3, "label": "error"}], ["'llm_response' must be text"]),
        ("rewardbench2", [{"id": "7", "prompt": "Q", "chosen": ["a"], "rejected": ["b"], "subset": "Ties"}], ["ref:"]),
        ("rmb", [{"conversation_input": [], "category_path": "Other/Chat"}], ["Helpfulness or Harmlessness"]),
        ("ppe_preference", [{"winner": "c"}], ["'winner'", "'c'"]),
    ],
)
def test_wrong_rows_name_file_row_and_column(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], words: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        load(tmp_path, name, rows)
    assert str(tmp_path / f"{name}.jsonl") in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_unknown_benchmarks_suggest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'rewardbench'"):
        parse_spec("reward-bnch")
    with pytest.raises(ConfigError, match="did you mean 'ppe_preference'"):
        parse_spec("ppe-preferences")
    with pytest.raises(ConfigError, match="known are heldout, judgebench,"):
        parse_spec("zzz=file")
    with pytest.raises(ConfigError, match="llmbar=PATH"):
        parse_spec("llmbar")
    with pytest.raises(ConfigError, match="no such file"):
        parse_spec(f"llmbar={tmp_path}/nothing")
    assert parse_spec("rewardbench") == BenchmarkSpec("rewardbench", "", "rewardbench")
    assert all(b.title and (b.hub or b.read) for b in BENCHMARKS.values())


def test_limit_keeps_whole_questions_and_the_same_ones(tmp_path: Path) -> None:
    rows = [RM_ROW | {"id": str(i), "prompt": f"Q{i}"} for i in range(5)]
    file = tmp_path / "m.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = BenchmarkSpec("rmbench", str(file), "m")
    few, _ = read_benchmark(spec, Limits(max_item_chars=9), 2, 7)
    assert len(few) == 18
    assert few == read_benchmark(spec, Limits(max_item_chars=9), 2, 7)[0]
    assert len({facts_of(item)["question"] for item in few}) == 2


OUTSIDE = Benchmark("Outside", (), own.read, accuracy)


def test_a_benchmark_from_outside_the_package_goes_by_its_import_path(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"id": "a", "messages": [{"role": "user", "content": "q"}], "responses": ["x", "y"], "rewards": [1, 0]}
    file.write_text(json.dumps(row) + "\n")
    name = f"{__name__}:OUTSIDE"
    spec = parse_spec(f"{name}={file}")
    assert (spec.name, spec.label) == (name, "OUTSIDE")
    items, _ = read_benchmark(spec, Limits(), None, 1)
    assert [item.id for item in items] == ["OUTSIDE:a"]
    assert find(name) is OUTSIDE
    with pytest.raises(ConfigError, match="has no attribute 'MISSING'"):
        find(f"{__name__}:MISSING")
    with pytest.raises(ConfigError, match="is a type, expected a Benchmark"):
        find("pathlib:Path")
