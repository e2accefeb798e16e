"""Reading data: every shape on hand-made rows, refusals by name, errors with file:line, items that survive the disk."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spct_ray.data.shapes import Shape
from spct_ray.data.sources import SourceConfig, read_source, with_content
from spct_ray.data.store import ITEM_SCHEMA, read_items, write_items
from spct_ray.data.validate import Limits, Problem, find_problem
from spct_ray.errors import DataError
from spct_ray.judge.prompt import JudgeConfig, judge_messages
from spct_ray.records import Item, Message, Role

USER = {"role": "user", "content": "Name a prime."}
ASKED = (Message("user", "Name a prime."),)


def own(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "messages": [USER], "responses": ["4", "7"], "rewards": [0, 1]} | changes


def read(path: Path, rows: list[Any], **config: Any) -> tuple[list[Item], dict[str, int]]:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    items, dropped = read_source(SourceConfig("s", str(path), **config), Limits())
    return items, dropped.counts


SHAPES: list[tuple[str, dict[str, Any], Item]] = [
    (
        "own",
        own(subset="x", reference="7", principles="Primality (100%)", extra=[1]),
        Item("s:a", ASKED, ("4", "7"), (0.0, 1.0), "s", "x", "7", principles="Primality (100%)"),
    ),
    (
        "chosen_rejected",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Name a prime.\n\nAssistant: 7\n\nor 11",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Name a prime.\n\nAssistant: 4",
        },
        Item(
            "s:1",
            (Message("user", "Hi"), Message("assistant", "Yes?"), *ASKED),
            ("7\n\nor 11", "4"),
            (1.0, 0.0),
            source="s",
        ),
    ),
    (
        "helpsteer2",
        {"prompt": "Name a prime.", "response_1": "4", "response_2": "7", "preference_strength": 2, "split": "train"},
        Item("s:1", ASKED, ("4", "7"), (0.0, 2.0), source="s", strength="better"),
    ),
    (
        "helpsteer2",
        {
            "prompt": "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nName a prime.",
            "response_1": "7",
            "response_2": "4",
            "preference_strength": -1,
        },
        Item(
            "s:1",
            (Message("user", "Hi"), Message("assistant", "Yes?"), *ASKED),
            ("7", "4"),
            (1.0, 0.0),
            source="s",
            strength="slightly better",
        ),
    ),
    (
        "ultrafeedback",
        {
            "source": "evol",
            "instruction": "Name a prime.",
            "completions": [
                {"response": "4", "annotations": {"honesty": {"Rating": "2"}, "truthfulness": {"Rating": "1"}}},
                {"response": "7", "annotations": {"honesty": {"Rating": "5"}, "truthfulness": {"Rating": "4"}}},
                {"response": "9", "annotations": {"honesty": {"Rating": "3"}, "truthfulness": {"Rating": "1"}}},
                {"response": "1", "overall_score": 3},
            ],
        },
        Item("s:1", ASKED, ("4", "7", "9", "1"), (1.5, 4.5, 2.0, 3.0), source="s", subset="evol"),
    ),
    (
        "chosen_rejected",
        {
            "chosen": [USER, {"role": "assistant", "content": "7"}],
            "rejected": [USER, {"role": "assistant", "content": "4"}],
        },
        Item("s:1", ASKED, ("7", "4"), (1.0, 0.0), source="s"),
    ),
    (
        "chosen_rejected",
        {"id": 5, "prompt": "Name a prime.", "chosen": "7", "rejected": "4"},
        Item("s:5", ASKED, ("7", "4"), (1.0, 0.0), source="s"),
    ),
    (
        "chosen_rejected",
        {"prompt": [USER], "chosen": [{"role": "assistant", "content": "7"}], "rejected": "4"},
        Item("s:1", ASKED, ("7", "4"), (1.0, 0.0), source="s"),
    ),
]


def test_every_shape_has_a_row() -> None:
    assert {shape for shape, _, _ in SHAPES} == set(get_args(Shape))


@pytest.mark.parametrize(("shape", "row", "expected"), SHAPES, ids=[f"{s}-{i}" for i, (s, _, _) in enumerate(SHAPES)])
def test_shapes_are_detected_and_read(tmp_path: Path, shape: str, row: dict[str, Any], expected: Item) -> None:
    assert read(tmp_path / "a.jsonl", [row]) == ([expected], {})
    assert read(tmp_path / "a.jsonl", [row], shape=shape) == ([expected], {})


ROWS = [own(id=str(i), rewards=[i, 7.5]) for i in range(3)]


def test_every_format_gives_the_same_items(tmp_path: Path) -> None:
    expected, _ = read(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "array.json").write_text(json.dumps(ROWS))
    (tmp_path / "lines.json").write_bytes((tmp_path / "a.jsonl").read_bytes())
    for name in ("a.jsonl.gz", "a.parquet", "array.json", "lines.json"):
        assert read_source(SourceConfig("s", str(tmp_path / name)), Limits())[0] == expected
    assert read_source(SourceConfig("s", str(tmp_path / "a.parquet"), limit=2), Limits())[0] == expected[:2]


def test_a_change_in_the_middle_of_a_large_file_is_another_content(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(66 * 2**20)
    before = with_content(SourceConfig("s", str(path))).content
    with path.open("r+b") as file:
        file.seek(33 * 2**20)
        file.write(b"x")
    assert with_content(SourceConfig("s", str(path))).content not in (before, "")
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    assert with_content(SourceConfig("s", str(copy))) != with_content(SourceConfig("s", str(path)))  # by path alone
    assert with_content(SourceConfig("s", str(copy))).content == with_content(SourceConfig("s", str(path))).content


def test_items_have_a_digest(tmp_path: Path) -> None:
    items = read(tmp_path / "a.jsonl", ROWS)[0]
    digests = [write_items(str(tmp_path / "x.parquet"), one) for one in (items, items, items[::-1], items[1:])]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.slow  # importing datasets takes seconds
def test_a_hub_data_set_gives_the_same_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder stands in for a hub id: the same library call, no network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub"
    folder.mkdir()
    expected, _ = read(folder / "train.jsonl", ROWS)
    assert read_source(SourceConfig("s", str(folder), kind="hub"), Limits())[0] == expected
    with pytest.raises(DataError, match=r"hub data set .*split 'test'.* cannot be loaded"):
        read_source(SourceConfig("s", str(folder), kind="hub", split="test"), Limits())
    with pytest.raises(DataError, match=r"hub data set .*absent.* cannot be loaded"):
        read_source(SourceConfig("s", str(tmp_path / "absent"), kind="hub"), Limits())


PROBLEMS: list[tuple[Problem, dict[str, Any]]] = [
    (Problem.INVALID_UNICODE, own(responses=["4", "\ud800"])),
    (Problem.INVALID_UNICODE, own(principles="\ud800")),
    (Problem.UNKNOWN_ROLE, own(messages=[{"role": "narrator", "content": "x"}, USER])),
    (Problem.LAST_MESSAGE_NOT_USER, own(messages=[USER, {"role": "assistant", "content": "7"}])),
    (Problem.LAST_MESSAGE_NOT_USER, own(messages=[])),
    (Problem.EMPTY_MESSAGE, own(messages=[{"role": "user", "content": " \n"}])),
    (Problem.NO_RESPONSES, own(responses=[], rewards=[])),
    (Problem.NO_RESPONSES, {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi\n\nAssistant: Yes"}),
    (Problem.EMPTY_RESPONSE, own(responses=["4", " "])),
    (Problem.DUPLICATE_RESPONSES, own(responses=["7", "7 "])),
    (Problem.REWARD_COUNT, own(rewards=[1])),
    (Problem.REWARD_NOT_FINITE, own(rewards=[0, math.nan])),
    (Problem.REWARD_NOT_FINITE, own(rewards=[0, math.inf])),
    (Problem.NO_UNIQUE_BEST, own(responses=["4", "7", "11"], rewards=[0, 1, 1])),
    (
        Problem.NO_UNIQUE_BEST,
        {"prompt": "Name a prime.", "response_1": "3", "response_2": "7", "preference_strength": 0},
    ),
    (Problem.REWARD_NOT_BINARY, own(responses=["7"], rewards=[0.5])),
    (Problem.TOO_MANY_RESPONSES, own(responses=[str(i) for i in range(17)], rewards=list(range(17)))),
    (Problem.TOO_LONG, own(responses=["4", "7" * 10_001])),
    (Problem.TOO_LONG, own(messages=[{"role": "user", "content": "x" * 20_001}])),
    (Problem.TOO_LONG, own(responses=[str(i) + "7" * 9_000 for i in range(5)], rewards=[0, 0, 0, 0, 1])),
    (Problem.TOO_LONG, own(principles="x" * 40_000)),
    (
        Problem.PROMPTS_DIFFER,
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Ho\n\nAssistant: B"},
    ),
    (
        Problem.REWARD_NOT_FINITE,
        {
            "instruction": "Name a prime.",
            "completions": [{"response": "4", "annotations": {"a": {"Rating": "N/A"}}}, {"response": "7", "rating": 2}],
        },
    ),
]


@pytest.mark.parametrize(("problem", "row"), PROBLEMS, ids=[f"{p}-{i}" for i, (p, _) in enumerate(PROBLEMS)])
def test_refused_items_are_counted_by_name_with_their_line(
    tmp_path: Path, problem: Problem, row: dict[str, Any]
) -> None:
    path = tmp_path / "a.jsonl"
    good: dict[str, Any] = {
        "instruction": "Hi",
        "completions": [{"response": "a", "rating": 1}, {"response": "b", "rating": 2}],
    }
    if "messages" in row:
        good = own(id="good")
    elif "chosen" in row:
        good = {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"}
    elif "response_1" in row:
        good = {"prompt": "Name a prime.", "response_1": "4", "response_2": "7", "preference_strength": 3}
    path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    items, dropped = read_source(SourceConfig("s", str(path)), Limits())
    assert len(items) == 1
    assert dropped.counts == {problem: 1}
    assert dropped.first == {problem: f"{path}:2"}


def test_repeated_ids_are_dropped(tmp_path: Path) -> None:
    items, counts = read(tmp_path / "a.jsonl", [own(), own(responses=["5", "6"]), own(id=None)])
    assert [item.id for item in items] == ["s:a", "s:3"]
    assert counts == {Problem.DUPLICATE_ID: 1}


def test_single_responses_need_a_reward_of_0_or_1() -> None:
    for reward, problem in ((0.0, None), (1.0, None), (2.0, Problem.REWARD_NOT_BINARY)):
        assert find_problem(Item("a", ASKED, ("7",), (reward,)), Limits()) == problem


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([own(), "{not json"], r"a\.jsonl:2: cannot be read as JSON lines"),
        ([own(), "[1, 2]"], r"a\.jsonl:2: expected a JSON object, found list"),
        ([{"question": "?"}], r"a\.jsonl:1: columns question fit no known shape"),
        ([own(), own(id="b", rewards=["1", "0"])], r"a\.jsonl:2: 'rewards' must be a number, found str: '1'"),
        ([own(rewards=[True, False])], r"a\.jsonl:1: 'rewards' must be a number, found bool"),
        ([own(responses="7")], r"a\.jsonl:1: 'responses' must be a list, found str"),
        ([own(responses=[7, "4"])], r"a\.jsonl:1: 'responses' must be text, found int"),
        ([own(messages=["Name a prime."])], r"a\.jsonl:1: 'messages' must hold \{role, content\} objects"),
        ([own(), {"id": "b", "messages": [USER], "responses": ["4", "7"]}], r"a\.jsonl:2: no column 'rewards'"),
        ([{"chosen": "Hi", "rejected": "Ho"}], r"a\.jsonl:1: 'chosen' has no .*Human:' turn"),
        (
            [{"prompt": "x", "response_1": "4", "response_2": "7", "preference_strength": 9}],
            r"a\.jsonl:1: 'preference_strength' must be one of -3\.\.3, found 9",
        ),
        ([{"instruction": "x", "completions": [{"response": "7"}]}], r"a\.jsonl:1: a completion has neither"),
        ([own(rewards=[1, 1])], r"a\.jsonl: no usable item; dropped by reason: .*no_unique_best"),
        ([], r"a\.jsonl: no usable item.*the file is empty"),
    ],
)
def test_malformed_rows_stop_with_file_and_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl", rows)


def test_broken_files_stop_with_their_name(tmp_path: Path) -> None:
    packed = gzip.compress("".join(json.dumps(own(id=str(i))) + "\n" for i in range(5000)).encode())
    files = {
        "cut.jsonl.gz": packed[: len(packed) // 2],
        "plain.jsonl.gz": b'{"id": 1}\n',
        "latin.jsonl": '{"id": "é"}\n'.encode("latin-1"),
        "text.parquet": b"not parquet",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_source(SourceConfig("s", str(tmp_path / name)), Limits())
    with pytest.raises(DataError, match="no such file"):
        read_source(SourceConfig("s", str(tmp_path / "absent.jsonl")), Limits())
    pq.write_table(pa.table({"messages": ["x"], "responses": ["y"], "rewards": [1.0]}), tmp_path / "flat.parquet")
    with pytest.raises(DataError, match=r"flat\.parquet:row 1: 'messages' must be a list"):
        read_source(SourceConfig("s", str(tmp_path / "flat.parquet")), Limits())


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
ITEMS = st.builds(
    Item,
    id=TEXT,
    messages=st.lists(st.builds(Message, st.sampled_from(get_args(Role)), TEXT), max_size=3).map(tuple),
    responses=st.lists(TEXT, max_size=4).map(tuple),
    rewards=st.lists(st.floats(allow_nan=False), max_size=4).map(tuple),
    **dict.fromkeys(("source", "subset", "reference", "strength", "facts", "principles"), TEXT),
)


@settings(max_examples=15)
@given(items=st.lists(ITEMS, max_size=5))
def test_items_survive_the_disk(tmp_path_factory: pytest.TempPathFactory, items: list[Item]) -> None:
    path = tmp_path_factory.mktemp("items") / "items.parquet"
    write_items(str(path), items)
    assert read_items(str(path)) == items
    assert [p.name for p in path.parent.iterdir()] == ["items.parquet"]


def test_every_field_of_an_item_is_stored() -> None:
    assert ITEM_SCHEMA.names == [field.name for field in dataclasses.fields(Item)]


def test_principles_of_a_file_reach_the_judge(tmp_path: Path) -> None:
    given, _ = read(tmp_path / "a.jsonl", [own(principles="Primality (100%)\n\\boxed{1}")])
    write_items(str(tmp_path / "items.parquet"), given)
    (item,) = read_items(str(tmp_path / "items.parquet"))
    for template in ("full", "compact"):
        config = JudgeConfig(template=template)
        (message,) = judge_messages(item, (1, 0), config)
        (plain,) = judge_messages(dataclasses.replace(item, principles=""), (1, 0), config)
        assert "Primality (100%)\n\\boxed {1}" in message.content
        assert "rinciples" not in plain.content


def test_reading_something_else_as_items_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    for name in ("a.parquet", "absent.parquet"):
        with pytest.raises(DataError, match=name):
            read_items(str(tmp_path / name))


@given(ITEMS)
def test_an_accepted_item_has_one_best_response(item: Item) -> None:
    if find_problem(item, Limits()) is None:
        assert len(item.rewards) == len(item.responses) >= 1
        assert len(item.rewards) == 1 or sorted(item.rewards)[-1] > sorted(item.rewards)[-2]
        assert item.messages[-1].role == "user"


REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not REAL.is_dir(), reason="optional data ../shared/data is not on this machine")
@pytest.mark.parametrize("path", sorted(REAL.glob("*.jsonl.gz")), ids=lambda p: p.name)
def test_real_files_are_read(path: Path) -> None:
    items, dropped = read_source(SourceConfig("real", str(path)), Limits())
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(items) + sum(dropped.counts.values()) == len(rows)
    ties = sum(len(r["rewards"]) > 1 and sorted(r["rewards"])[-1] == sorted(r["rewards"])[-2] for r in rows)
    assert dropped.counts.get(Problem.NO_UNIQUE_BEST, 0) <= ties <= sum(dropped.counts.values())
