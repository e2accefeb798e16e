"""The items stage: nothing leaks between train, held-out and benchmarks, and the report accounts for every item."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spct_ray.config import load
from spct_ray.data.builtin import BuiltinConfig
from spct_ray.data.sources import SourceConfig
from spct_ray.data.store import judged_files, read_items
from spct_ray.data.validate import decontaminate, query_text, split_heldout
from spct_ray.errors import ConfigError, DataError
from spct_ray.graph.step import StepContext
from spct_ray.records import Item, Message
from spct_ray.stages import unseen
from spct_ray.stages.items import ItemsConfig, run


def ask(*turns: str, item_id: str = "a") -> Item:
    return Item(item_id, tuple(Message("user", turn) for turn in turns), ("x", "y"), (0.0, 1.0))


QUERIES = st.lists(st.text("ab ", min_size=1, max_size=6), max_size=30)


@given(QUERIES, st.floats(0, 0.9), st.integers(0, 9))
def test_a_query_is_never_on_both_sides(queries: list[str], share: float, seed: int) -> None:
    items = [ask(query, item_id=str(i)) for i, query in enumerate(queries)]
    train, heldout = split_heldout(items, share, seed)
    assert sorted(item.id for item in [*train, *heldout]) == sorted(item.id for item in items)
    assert not {query_text(i) for i in train} & {query_text(i) for i in heldout}
    shuffled = Random(seed).sample(items, len(items))
    assert {i.id for i in split_heldout(shuffled, share, seed)[1]} == {i.id for i in heldout}
    assert {i.id for i in split_heldout(items[::2], share, seed)[1]} == {i.id for i in heldout} & {
        i.id for i in items[::2]
    }


def test_the_share_is_kept_and_depends_on_the_seed() -> None:
    items = [ask(f"question {i}", item_id=str(i)) for i in range(4000)]
    heldout = split_heldout(items, 0.1, 0)[1]
    assert 330 < len(heldout) < 470  # 400 +- 3.7 standard errors
    assert heldout != split_heldout(items, 0.1, 1)[1]
    assert split_heldout(items, 0.0, 0)[1] == []


WORDS = " ".join(f"w{i}" for i in range(40))


def test_thirteen_shared_words_in_a_row_are_contamination_and_twelve_are_not() -> None:
    words = WORDS.split()
    protected = [ask(WORDS, item_id="bench")]
    inside = ask(f"so: {' '.join(words[5:18]).upper()}!", item_id="13")
    below = ask(f"so {' '.join(words[5:17])} no", item_id="12")
    later_turn = ask("hello", " ".join(words[20:36]), item_id="turn")
    clean, overlaps = decontaminate([inside, below, later_turn], protected, 13)
    assert [item.id for item in clean] == ["12"]
    assert [(o.item.id, o.protected.id) for o in overlaps] == [("13", "bench"), ("turn", "bench")]
    assert overlaps[0].words == " ".join(words[5:18])


def test_short_queries_overlap_only_when_equal() -> None:
    protected = [ask("What is 2 + 2?"), ask("???")]
    train = [ask("what is 2+2"), ask("What is 2 + 2, please?"), ask("what is"), ask("!!!"), ask("???")]
    clean, overlaps = decontaminate(train, protected)
    assert [o.item for o in overlaps] == [train[0], train[4]]
    assert clean == train[1:4]


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=8), st.lists(st.sampled_from("abc"), max_size=20)
)
def test_decontamination_agrees_with_a_search_in_text(train: list[list[str]], bench: list[str]) -> None:
    n = 4
    items = [ask(" ".join(words), item_id=str(i)) for i, words in enumerate(train)]
    clean, _ = decontaminate(items, [ask(" ".join(bench))], n)
    for item, words in zip(items, train, strict=True):
        if len(words) < n or len(bench) < n:
            leaks = words == bench
        else:
            text = f" {' '.join(bench)} "
            leaks = any(f" {' '.join(words[i : i + n])} " in text for i in range(len(words) - n + 1))
        assert (item in clean) != leaks


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(number: int, query: str, rewards: tuple[float, ...] = (0, 1)) -> dict[str, Any]:
    responses = [f"r{i}" for i in range(len(rewards))]
    return {
        "id": str(number),
        "messages": [{"role": "user", "content": query}],
        "responses": responses,
        "rewards": rewards,
    }


def context(out: Path) -> StepContext:
    out.mkdir()
    return StepContext(name="items", seed=1, out=str(out), inputs={}, command="spct run")


def test_the_stage_accounts_for_every_item_and_keeps_the_benchmark_out(tmp_path: Path) -> None:
    leaked = "count the primes below one hundred and explain in one line how you did it"
    rows = [row(i, f"question number {i}") for i in range(200)]
    rows += [row(200, "a tie", (1, 1)), row(201, leaked), *(row(300 + i, f"question number {i}") for i in range(50))]
    config = ItemsConfig(
        builtin=BuiltinConfig(40, 10),
        sources=(SourceConfig("mine", write_rows(tmp_path / "mine.jsonl", rows)),),
        benchmarks=(SourceConfig("b1", write_rows(tmp_path / "b1.jsonl", [row(0, f"Please {leaked}!")])),),
        heldout_share=0.2,
        heldout_size=15,
    )
    metrics = run(context(tmp_path / "out"), config, None)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "bench_b1.parquet",
        "data_report.json",
        "heldout.parquet",
        "train.parquet",
    ]
    train, heldout, bench = (read_items(str(out / f"{n}.parquet")) for n in ("train", "heldout", "bench_b1"))
    assert not {query_text(i) for i in train} & {query_text(i) for i in (*heldout, *bench)}
    assert len({i.id for i in (*train, *heldout, *bench)}) == len(train) + len(heldout) + len(bench)
    assert sum(i.source == "builtin" for i in train) == 40
    assert sum(i.source == "mine" for i in heldout) == 15

    report = json.loads((out / "data_report.json").read_text())
    dropped = report["dropped"]["mine"]
    assert report["kept"] == {"train": len(train), "heldout": len(heldout), "bench_b1": 1} == metrics["kept"]
    assert dropped["counts"]["no_unique_best"] == 1
    assert dropped["counts"]["contaminated"] == 1
    assert "mine:201 shares with b1:0: count the primes" in dropped["first"]["contaminated"]
    mine = sum(sides.get("mine", 0) for sides in report["kept_by_source"].values())
    assert mine + sum(dropped["counts"].values()) == len(rows)

    assert metrics["content"].keys() == report["kept"].keys()
    assert run(context(tmp_path / "again"), config, None)["content"] == metrics["content"]
    for name in ("train.parquet", "heldout.parquet", "data_report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_without_sources_the_builtin_set_alone_is_written(tmp_path: Path) -> None:
    run(context(tmp_path / "out"), ItemsConfig(builtin=BuiltinConfig(20, 5)), None)
    assert len(read_items(str(tmp_path / "out" / "train.parquet"))) == 20
    assert len(read_items(str(tmp_path / "out" / "heldout.parquet"))) == 5


def unseen_after(given: Path, out: Path, config: unseen.UnseenConfig) -> None:
    out.mkdir(exist_ok=True)
    made = StepContext(name="unseen", seed=1, out=str(out), inputs={"items": str(given)}, command="spct run")
    unseen.run(made, config, None)


def test_unseen_sets_are_of_other_sizes_beside_some_held_out_items(tmp_path: Path) -> None:
    trained = BuiltinConfig(60, 20, (2,), (1.0,), (3,), (1.0,))
    run(context(tmp_path / "items"), ItemsConfig(builtin=trained), None)
    sets = {
        "five": BuiltinConfig(99, 12, (2,), (1.0,), (5,), (1.0,)),
        "three": BuiltinConfig(99, 9, (3,), (1.0,), (2,), (1.0,)),
        "same": trained,
    }
    unseen_after(tmp_path / "items", tmp_path / "out", unseen.UnseenConfig(sets, heldout_size=8))
    files = judged_files(str(tmp_path / "out"))
    assert list(files) == ["heldout", "five", "same", "three"]
    items = {name: read_items(str(file)) for name, file in files.items()}
    assert items["heldout"] == read_items(str(tmp_path / "items" / "heldout.parquet"))[:8]
    assert {(len(i.responses), len(json.loads(i.facts))) for i in items["five"]} == {(2, 5)}
    assert {(len(i.responses), len(json.loads(i.facts))) for i in items["three"]} == {(3, 2)}
    assert {len(items[name]) for name in ("five", "three", "same")} == {12, 9, 20}
    # One judge judges them all: ids differ, and a set of the run's own kinds is not its held-out set again.
    assert len({i.id for found in items.values() for i in found}) == 8 + 12 + 9 + 20
    assert not {query_text(i) for i in items["same"]} <= {query_text(i) for i in items["heldout"]}
    # What reads the items step reads this one as well, also after a second attempt and in a root that was moved.
    unseen_after(tmp_path / "items", tmp_path / "out", unseen.UnseenConfig(sets, heldout_size=8))
    (tmp_path / "moved").mkdir()
    for name in ("items", "out"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert (tmp_path / "moved/out/train.parquet").is_symlink()
    assert len(read_items(str(tmp_path / "moved/out/train.parquet"))) == 60
    assert len(read_items(str(tmp_path / "moved/items/heldout.parquet"))) == 20  # not cut through a link
    (tmp_path / "moved/items").rename(tmp_path / "items")
    for name in ("heldout", "a/b"):
        with pytest.raises(ConfigError, match=f"'{name}' is no free name"):
            unseen_after(tmp_path / "items", tmp_path / name.replace("/", "_"), unseen.UnseenConfig({name: trained}))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"sources": (SourceConfig("builtin", "x"),)}, ConfigError, "'builtin' is taken"),
        ({"benchmarks": (SourceConfig("a/b", "x"),)}, ConfigError, "'a/b'"),
        ({"heldout_share": 1.0}, ConfigError, "heldout_share"),
        ({"decontaminate_words": 0}, ConfigError, "decontaminate_words"),
        ({"builtin": None}, DataError, "no training item is left"),
    ],
)
def test_bad_configurations_are_refused(
    tmp_path: Path, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(context(tmp_path / "out"), ItemsConfig(**config), None)


def test_the_configuration_loads_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "builtin: {size_train: 10, num_responses: [2], num_responses_weights: [1.0]}\n"
        "sources: [{name: hh, path: Anthropic/hh-rlhf, kind: hub, data_dir: helpful-base, limit: 5}]\n"
        "benchmarks: [{name: b, path: b.jsonl}]\n"
    )
    config = load(ItemsConfig, str(tmp_path / "c.yaml"), ["heldout_share=0.5"])
    assert config.builtin == BuiltinConfig(10, num_responses=(2,), num_responses_weights=(1.0,))
    assert config.sources == (SourceConfig("hh", "Anthropic/hh-rlhf", kind="hub", data_dir="helpful-base", limit=5),)
    assert config.benchmarks == (SourceConfig("b", "b.jsonl"),)
    assert config.heldout_share == 0.5
