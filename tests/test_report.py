"""A whole report on synthetic judgements: shape, numbers that are known beforehand, escaping, absent judges."""

from __future__ import annotations

import html.parser
import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_evaluation import make_model

from spct_ray.data.store import write_items
from spct_ray.errors import ConfigError, DataError
from spct_ray.evaluation.tables import WIDTH
from spct_ray.graph.record import StepRecord, write_record
from spct_ray.graph.step import StepContext
from spct_ray.judge.orders import balanced_orders
from spct_ray.records import Item, Message, Trajectory
from spct_ray.stages import report

HOSTILE = "<script>alert('x')</script> \"quoted\" & <img src=x onerror=alert(1)>"
SKILL = {"base": 0.0, "rft": 0.9, "grpo": 1.8}
PARSED = {"base": 0.15, "rft": 0.95, "grpo": 0.99}
QUERY = "Write two sentences about {}. Wrap your whole answer in double quotes and do not use commas."
TEXT = (
    "Specific Criteria: double quotes around the whole answer (weight 60%), no commas (40%).\n"
    "Analysis: Response 1 begins with {} and ends with {}. It is wrapped. Response 2 is not wrapped.\nScores: {}"
)


def make_items(num: int, prefix: str, rng: random.Random) -> list[Item]:
    items = []
    for i in range(num):
        n = (1, 2, 2, 4)[i % 4]
        rewards = [0.0] * n
        if n > 1 or rng.random() < 0.5:
            rewards[rng.randrange(n)] = 1.0
        topic = rng.choice(("thunder", "bread", "tides", "chess", "moss"))
        responses = tuple(
            f'"The {topic} number {j} is a quiet thing that few people notice. It comes back every year."'
            for j in range(n)
        )
        if i == 0:
            responses = (HOSTILE + "0", *(HOSTILE + str(j) for j in range(1, n)))
        subset = ("quotes", "no comma", "first word", "length", HOSTILE)[i % 5 if i else 4]
        messages = (Message("user", QUERY.format(topic) if i else HOSTILE),)
        items.append(Item(f"{prefix}-{i}", messages, responses, tuple(rewards), "builtin", subset))
    return items


def judge(item: Item, model: str, k: int, order: tuple[int, ...], temperature: float, rng: random.Random) -> Trajectory:
    failure = "" if rng.random() < PARSED[model] else rng.choice(("no_box", "truncated", "wrong_count"))
    if len(item.rewards) == 1:
        scores: tuple[int, ...] = (min(10, max(1, round(rng.gauss(3 + 5 * item.rewards[0], 3 - SKILL[model])))),)
    else:
        scores = tuple(min(10, max(1, round(rng.gauss(5 + SKILL[model] * r, 1.6)))) for r in item.rewards)
    text = TEXT.format('"The', 'year."', "\\boxed{" + ", ".join(str(scores[i]) for i in order) + "}")
    return Trajectory(
        item_id=item.id,
        sample=k,
        order=order,
        text=HOSTILE if failure else text,
        scores=() if failure else scores,
        failure=failure,
        hinted=False,
        guided=False,
        temperature=temperature,
        seed=k,
        model=model,
        weight_version=0,
        prompt_tokens=100,
        completion_tokens=rng.randint(60, 160),
        stop_reason="length" if failure == "truncated" else "stop",
    )


def make_run(root: Path, num_items: int = 24, k_max: int = 4, num_bench: int = 8) -> dict[str, str]:
    """Directories of finished steps, as the stages write them."""
    rng = random.Random(5)
    roles = ("items", "select", "rft", "grpo", "meta", "meta_scores", *(f"evaluate_{m}" for m in SKILL))
    inputs = {role: str(root / role) for role in roles}
    for directory in inputs.values():
        Path(directory).mkdir(parents=True)
    heldout, bench = make_items(num_items, "vif", rng), make_items(num_bench, "llm", rng)
    write_items(str(root / "items" / "heldout.parquet"), heldout)
    write_items(str(root / "items" / "bench_llmbar.parquet"), bench)
    logits = []
    for model in SKILL:
        rows = []
        for item in (*heldout, *bench):
            orders = balanced_orders(len(item.responses), k_max, 1)
            made = [judge(item, model, 0, orders[0], 0.0, rng)]
            made += [judge(item, model, k, order, 0.7, rng) for k, order in enumerate(orders)]
            rows += [{"key": t.key, **t.to_row()} for t in made]
            for t in made:
                good = bool(t.scores) and (t.scores[item.best] == max(t.scores))
                logit = rng.gauss(1.0 if good else -0.6, 1.2) if t.scores else math.nan
                logits.append({"model": model, "key": t.key, "logit": logit})
        (root / f"evaluate_{model}" / "trajectories").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), root / f"evaluate_{model}" / "trajectories" / "0.parquet")
    pq.write_table(pa.Table.from_pylist(logits), root / "meta_scores" / "logits.parquet")
    counts = {"unhinted_accepted": 311, "unhinted_incorrect": 204, "unhinted_no_box": 31, "hinted_accepted": 120}
    (root / "select" / "select_report.json").write_text(json.dumps({"accepted": 431, "counts": counts}))
    rft = [{"step": s, "loss": 0.3 + 2.5 * math.exp(-s / 25) + rng.gauss(0, 0.05)} for s in range(150)]
    grpo = [
        {
            "step": s,
            "reward": 0.1 + s / 100 + rng.gauss(0, 0.1),
            "share_correct": 0.55 + s / 200 + rng.gauss(0, 0.05),
            "share_tied": 0.1 - s / 1200,
            "share_wrong": 0.3,
            "share_unparsable_no_box": 0.02,
            "share_unparsable_truncated": 0.01,
            "zero_signal_groups": 0.3 + s / 300 + rng.gauss(0, 0.05),
            "kl": 0.0004 * s + abs(rng.gauss(0, 0.002)),
            "entropy": 0.3 - s / 500,
            "completion_tokens_mean": 120 + rng.gauss(0, 4),
        }
        for s in range(60)
    ]
    for name, lines in (("rft", rft), ("grpo", grpo)):
        (root / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for place, (role, seconds) in enumerate(zip(inputs, (4.2, 1.1, 141, 203.4, 38, 12, 25, 24, 26), strict=True)):
        record = StepRecord(
            role, str(place), "f", 1, 0, {}, {}, {}, seconds=seconds, finished_at=f"2026-01-0{place + 1}"
        )
        write_record(inputs[role], record)
        (root / role / "timing.json").write_text(json.dumps({"engine_seconds": 5.0, "judgements": 100}))
    return inputs


def run_report(
    out: Path, inputs: dict[str, str], config: report.ReportConfig | None = None
) -> tuple[dict[str, Any], str, str]:
    """summary.json, index.html and the summary text."""
    out.mkdir()
    context = StepContext("report", 3, str(out), inputs, "spct run x.yaml")
    metrics = report.run(context, config or report.ReportConfig(ks=(1, 2, 4)), None)
    summary = json.loads((out / "summary.json").read_text())
    return summary, (out / "index.html").read_text(encoding="utf-8"), metrics["summary_text"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, str]) -> tuple[dict[str, Any], str, str]:
    return run_report(tmp_path_factory.mktemp("out") / "report", inputs)


def test_summary_has_the_documented_shape(whole: tuple[dict[str, Any], str, str]) -> None:
    summary, _, _ = whole
    block = summary["benchmarks"]["heldout"]
    assert list(block["models"]) == ["base", "rft", "grpo"]
    for model in (*block["models"].values(), *summary["benchmarks"]["llmbar"]["models"].values()):
        assert {"parse_rate", "tie_rate", "position_consistency", "tokens_per_judgement"} <= set(model["rates"])
        assert set(model["vote"]) == set(model["meta_vote"]) == set(model["weighted_vote"]) == {"1", "2", "4"}
        for entry in (model["greedy"], *model["vote"].values(), *model["meta_vote"].values()):
            low, high = entry["ci"]
            assert 0 <= low <= entry["score"] <= high <= 1
    assert block["num_items"] == 24
    assert block["chance"] == pytest.approx((0.5 * 3 + 0.25) / 4)
    assert 0.5 < block["models"]["grpo"]["meta_rm"]["auc"] <= 1
    assert 0 <= block["models"]["grpo"]["meta_rm"]["ece"] <= 1
    assert summary["seconds"]["grpo"] == 203.4
    assert next(iter(summary["seconds"])) == "items"
    assert summary["missing"] == []
    assert block["models"]["grpo"]["by_subset"]["n = 2"]["num_items"] == 12
    assert "GRPO - RFT, vote@4" in block["paired"]
    assert "meta vote@4 - vote@4, GRPO" in block["paired"]
    above_chance = block["paired"]["RFT - chance, greedy"]["difference"]
    assert above_chance == pytest.approx(block["models"]["rft"]["greedy"]["score"] - block["chance"])


def test_a_run_s_report_and_an_evaluation_print_the_same_digits(
    tmp_path: Path, inputs: dict[str, str], whole: tuple[dict[str, Any], str, str]
) -> None:
    """The same judgements, as `spct evaluate --stored` hands them to the report: with the models as inputs."""
    roles = {
        "items": inputs["items"],
        "evaluate_grpo": inputs["evaluate_grpo"],
        "meta_scores_grpo": inputs["meta_scores"],
        "model_grpo": str(make_model(tmp_path / "grpo" / "model").parent),
    }
    summary, page, text = run_report(tmp_path / "evaluation", roles)
    for label, block in summary["benchmarks"].items():
        of_run = whole[0]["benchmarks"][label]
        assert block["chance"] == of_run["chance"]
        for name, model in block["models"].items():
            for key in ("vote", "meta_vote", "weighted_vote", "aggregators", "by_subset", "rates", "k_meta"):
                assert _scores(model[key]) == _scores(of_run["models"][name][key])
            assert model["greedy"]["score"] == of_run["models"][name]["greedy"]["score"]
    row = next(line for line in whole[2].splitlines() if line.startswith("GRPO "))
    assert set(row.split()) <= set(text.split())
    assert f"{100 * of_run['models']['grpo']['vote']['4']['score']:.1f}" in page


def _scores(entries: dict[str, Any]) -> dict[str, Any]:
    """Without costs, which need the sizes of the models."""
    return {
        name: {k: v for k, v in e.items() if k != "cost"} if isinstance(e, dict) else e for name, e in entries.items()
    }


def test_rates_are_counted_from_the_samples(inputs: dict[str, str], whole: tuple[dict[str, Any], str, str]) -> None:
    rows = pq.read_table(Path(inputs["evaluate_rft"]) / "trajectories" / "0.parquet").to_pylist()
    sampled = [r for r in rows if r["temperature"] > 0 and r["item_id"].startswith("vif")]
    block = whole[0]["benchmarks"]["heldout"]["models"]["rft"]
    assert block["rates"]["parse_rate"] == pytest.approx(sum(r["failure"] == "" for r in sampled) / len(sampled))
    assert block["rates"]["tokens_per_judgement"] == pytest.approx(
        sum(r["completion_tokens"] for r in sampled) / len(sampled)
    )
    assert sum(block["failures"].values()) == sum(r["failure"] != "" for r in sampled)
    assert sum(block["score_histogram"].values()) == sum(len(r["scores"]) for r in sampled if len(r["order"]) > 1)


class _Tags(html.parser.HTMLParser):
    """Every element, and every attribute that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.events: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.events += [name for name, _ in attrs if name.startswith("on")]


def test_page_is_self_contained_and_escapes_hostile_text(whole: tuple[dict[str, Any], str, str]) -> None:
    page = whole[1]
    tags = _Tags()
    tags.feed(page)
    assert tags.tags.count("script") == 1  # our own filter script
    assert not tags.events
    assert tags.tags.count("img") == len(tags.sources)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in tags.sources)
    assert "alert(&#39;x&#39;)" in page
    assert "<script>alert" not in page
    for tag in ("section", "table", "article", "div", "ol", "li", "pre"):
        assert page.count(f"<{tag}") == page.count(f"</{tag}>")


def test_text_is_aligned_and_narrow(whole: tuple[dict[str, Any], str, str]) -> None:
    text = whole[2]
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.startswith("The first held-out item that GRPO judges right")
    assert "The first held-out item that GRPO judges wrong" in text
    block = whole[0]["benchmarks"]["heldout"]
    table = text[text.index("Held-out items: official score in % of 24 questions") :].splitlines()[1:]
    assert [row.split()[0] for row in table[2:6]] == ["base", "RFT", "GRPO", "chance"]
    assert len({len(row) for row in table[:5]}) == 1
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert f"{100 * block['chance']:.1f}" in table[5]
    for name, difference in block["paired"].items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
        beyond = difference["ci"][0] > 0 or difference["ci"][1] < 0
        assert line.endswith("beyond noise" if beyond else "within noise")


def test_absent_judges_are_named_and_same_inputs_give_the_same_files(tmp_path: Path, inputs: dict[str, str]) -> None:
    some = {role: inputs[role] for role in ("items", "evaluate_rft", "rft")}
    summary, page, text = run_report(tmp_path / "some", some)
    assert run_report(tmp_path / "again", some) == (summary, page, text)
    models = summary["benchmarks"]["heldout"]["models"]
    assert list(models) == ["rft"]
    assert models["rft"]["meta_vote"] == {}
    assert "meta_rm" not in models["rft"]
    for lines in (summary["missing"], page, text):
        assert any("judge grpo was not evaluated" in line for line in (lines if isinstance(lines, list) else [lines]))


def test_wrong_inputs_are_named(tmp_path: Path, inputs: dict[str, str]) -> None:
    with pytest.raises(DataError, match="no evaluated judge"):
        run_report(tmp_path / "a", {"items": inputs["items"]})
    with pytest.raises(ConfigError, match="k = 8 needs at least 8 samples per item, but 4 were drawn"):
        run_report(tmp_path / "b", inputs, report.ReportConfig(ks=(1, 8)))
    with pytest.raises(ConfigError, match="k_meta_share 0"):
        run_report(tmp_path / "c", inputs, report.ReportConfig(k_meta_share=0.0))
    other = make_run(tmp_path / "other", num_items=4, num_bench=1)
    with pytest.raises(DataError, match="judges item 'llm-1', which is in no set of items"):
        run_report(tmp_path / "d", {**inputs, "items": other["items"]})
