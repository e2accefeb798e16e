"""The tables of a report: the page shows all of them, the terminal the first few in plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spct_ray.evaluation.judgements import right_options
from spct_ray.evaluation.results import label
from spct_ray.records import Item, Trajectory, Verdict

WIDTH = 100
AGGREGATORS = {
    "sum": "sum",
    "mean": "mean",
    "median": "median",
    "majority": "majority",
    "best_by_meta": "best by meta",
    "meta_top": "meta top-k",
    "meta_weighted": "meta-weighted",
}
_VOTES = {"vote": "vote", "meta_vote": "meta", "weighted_vote": "weighted"}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a head; the first column is text, the others are numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @classmethod
    def of(cls, title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> Table:
        """From any sequences."""
        return cls(title, tuple(head), tuple(map(tuple, rows)), note)

    def text(self) -> str:
        """Aligned text, at most WIDTH wide; columns that do not fit follow below, under the first column again."""
        columns = list(zip(self.head, *self.rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        groups, used = [[0]], widths[0]
        for c in range(1, len(columns)):
            if used + 2 + widths[c] > WIDTH and len(groups[-1]) > 1:
                groups.append([0])
                used = widths[0]
            groups[-1].append(c)
            used += 2 + widths[c]
        parts = []
        for group in groups:
            lines = [
                "  ".join(
                    columns[c][r].ljust(widths[c]) if c == 0 else columns[c][r].rjust(widths[c]) for c in group
                ).rstrip()
                for r in range(len(self.rows) + 1)
            ]
            parts.append("\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]]))
        return "\n".join([*textwrap.wrap(self.title, WIDTH), *parts, *textwrap.wrap(self.note, WIDTH)])


def cell(entry: Mapping[str, Any] | None) -> str:
    """`81.2 +- 3.1`: a share in percent and half the width of its interval; `-` where there is none."""
    if not entry or not entry["ci"]:
        return "-"
    value = entry["score"] if "score" in entry else entry["accuracy"]
    low, high = entry["ci"]
    return f"{100 * value:.1f} +- {50 * (high - low):.1f}"


def percent(value: float | None) -> str:
    """`81.2`, or `-`."""
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _points(change: Mapping[str, Any], digits: int = 1) -> tuple[str, str]:
    low, high = change["ci"]
    return (
        f"{100 * change['difference']:+.{digits}f}",
        f"[{100 * low:+.{digits}f}, {100 * high:+.{digits}f}]",
    )


def headline(name: str, block: Mapping[str, Any], ks: Sequence[int]) -> Table:
    """The official score of every judge: greedy, and votes of `ks` samples."""
    models = block["models"]
    shown = [(key, k) for key in _VOTES for k in map(str, ks) if any(k in m[key] for m in models.values())]
    shown = [(key, k) for key, k in shown if key == "vote" or k != "1"]  # a meta vote of one sample is that sample
    head = ["judge", "greedy", *(f"{_VOTES[key]}@{k}" for key, k in shown), "parsed"]
    rows = [
        [label(n), cell(m["greedy"]), *(cell(m[key].get(k)) for key, k in shown), percent(m["rates"]["parse_rate"])]
        for n, m in models.items()
    ]
    rows.append(["chance", percent(block["chance"]), *[""] * (len(head) - 2)])
    title = f"{block['title']} ({name})" if name != "heldout" else "Held-out items"
    return Table.of(f"{title}: official score in % of {block['num_questions']:,} questions", head, rows)


def remarks(block: Mapping[str, Any], ks: Sequence[int]) -> list[str]:
    """What limits the scores of a benchmark: items that were dropped, failed, absent or seen in training."""
    lines = ["Prompts: " + ", ".join(f"{number:,} of {n}" for n, number in block["layout"].items()) + "."]
    dropped = {reason: number for reason, number in block.get("dropped", {}).get("counts", {}).items() if number}
    if dropped:
        lines.append("Dropped: " + ", ".join(f"{c:,} {r.replace('_', ' ')}" for r, c in dropped.items()) + ".")
    if block["absent_subsets"]:
        lines.append(f"Without a row, so not in the score: {', '.join(block['absent_subsets'])}.")
    if block.get("contaminated"):
        lines.append(f"{len(block['contaminated'])} items share an n-gram with the training queries.")
    for name, model in block["models"].items():
        if model["failures"]:
            failed = ", ".join(f"{number:,} {why.replace('_', ' ')}" for why, number in model["failures"].items())
            lines.append(f"{label(name)}: failed judgements: {failed}.")
        last = model["vote"].get(str(max(ks))) or model["greedy"]
        if last["undecided_rate"]:
            right = last["right_of_decided"]
            others = "" if right is None else f"; of the others {percent(right)} % are right"
            lines.append(
                f"{label(name)}: {percent(last['undecided_rate'])} % of the items have no parsed judgement{others}."
            )
        if model["num_in_chunks"]:
            lines.append(
                f"{label(name)}: {model['num_in_chunks']:,} items did not fit one prompt and were judged in chunks."
            )
    return lines


def differences(block: Mapping[str, Any]) -> Table:
    """Paired differences on the same items, and whether they are beyond noise."""
    rows = []
    for name, change in block["paired"].items():
        low, high = change["ci"]
        noise = "beyond noise" if low > 0 or high < 0 else "within noise"
        p = "<=" if change["p_value"] <= 0.01 else ""
        rows.append(
            (name, *_points(change), f"{p}{change['p_value']:.3f}", f"{change['won']}:{change['lost']}",
             str(change["undecided"]), noise)
        )  # fmt: skip
    head = ("difference", "points", "95 % interval", "p", "won:lost", "undecided", "")
    return Table.of("Differences of the official score on the same questions", head, rows)


def parts(block: Mapping[str, Any], top: str) -> Table:
    """The parts of the official score."""
    parts_of = {n: (m["vote"].get(top) or m["greedy"])["parts"] for n, m in block["models"].items()}
    names = list(dict.fromkeys(part for own in parts_of.values() for part in own))
    rows = [(part, *(percent(own.get(part)) for own in parts_of.values())) for part in names]
    return Table.of("Parts of the score", ("part", *map(label, parts_of)), rows, f"In %, vote@{top}.")


def aggregators(block: Mapping[str, Any], top: str) -> Table:
    """Other aggregators of the same samples."""
    models = {n: m for n, m in block["models"].items() if m["aggregators"]}
    ways = [way for way in AGGREGATORS if any(way in m["aggregators"] for m in models.values())]
    rows = [(label(n), *(cell(m["aggregators"].get(way)) for way in ways)) for n, m in models.items()]
    return Table.of(f"Aggregators of the same {top} samples", ("judge", *(AGGREGATORS[w] for w in ways)), rows)


def k_meta(block: Mapping[str, Any], ks: Sequence[int]) -> Table:
    """How many samples the meta vote should keep."""
    rows = [(label(n), *(cell(m["k_meta"].get(str(k))) for k in ks)) for n, m in block["models"].items() if m["k_meta"]]
    title = f"Meta vote@{max(ks)} by k_meta, how many of the samples it keeps"
    return Table.of(title, ("judge", *(f"k_meta {k}" for k in ks)), rows)


def adaptive(block: Mapping[str, Any], top: str) -> Table:
    """How many samples adaptive k would have drawn, and how often it decides differently from all samples."""
    rows = [
        (f"{label(name)}, {rule}", cell(entry), f"{entry['k']:.1f}", percent(entry["share_of_tokens"]),
         percent(entry["differ_from_k_max"]), "[{}, {}]".format(*map(percent, entry["differ_ci"])))
        for name, model in block["models"].items()
        for rule, entry in model["adaptive"].items()
    ]  # fmt: skip
    head = ("judge, rule", "score", "samples", f"% of vote@{top}'s tokens", "% that differ", "95 % interval")
    title = f"Adaptive voting: the service's rule for k = auto on the same {top} samples"
    return Table.of(title, head, rows)


def orders(block: Mapping[str, Any]) -> Table:
    """Balanced against independent orders of pairs."""
    rows = []
    for name, model in block["models"].items():
        for k, comparison in model["orders"].items():
            balanced, independent, change = comparison["balanced"], comparison["independent"], comparison["difference"]
            low, high = change["variance"]["ci"]
            rows.append(
                (f"{label(name)}, {k}", str(comparison["num_items"]), percent(balanced["accuracy"]),
                 percent(independent["accuracy"]), *_points(change["accuracy"], 2), f"{balanced['variance']:.4f}",
                 f"{independent['variance']:.4f}", f"[{low:+.4f}, {high:+.4f}]")
            )  # fmt: skip
    head = ("judge, k", "pairs", "balanced, %", "independent, %", "points", "95 % interval", "variance, balanced",
            "variance, independent", "95 % interval of the difference")  # fmt: skip
    note = "Half of the samples in each order (balanced), or each order by a throw of a coin (independent)."
    return Table.of("Orders of pairs at equal k", head, rows, note)


def behaviour(block: Mapping[str, Any], top: str) -> Table:
    """Rates of single samples and of votes."""
    rows = []
    for name, model in block["models"].items():
        rates, vote = model["rates"], model["vote"].get(top) or model["greedy"]
        shares = [rates[key] for key in ("parse_rate", "tie_rate", "correct_rate", "position_consistency")]
        shares += [vote[key] for key in ("tie_rate", "undecided_rate", "right_of_decided")]
        rows.append((label(name), *map(percent, shares), f"{rates['tokens_per_judgement']:.0f}"))
    head = ("judge", "parsed", "ties", "right (Eq. 10)", "position consistency", f"ties of vote@{top}", "undecided",
            "right of the decided", "tokens")  # fmt: skip
    note = "In %: single samples, then votes. Position consistency: the same responses win in another order."
    return Table.of("How the samples behave", head, rows, note)


def failures(block: Mapping[str, Any]) -> Table:
    """Sampled judgements without scores, by reason."""
    models = block["models"]
    names = sorted({reason for m in models.values() for reason in m["failures"]})
    rows = [
        (reason.replace("_", " "), *(f"{m['failures'].get(reason, 0):,}" for m in models.values())) for reason in names
    ]
    return Table.of("Failed judgements", ("reason", *map(label, models)), rows, "Named and excluded, never scored.")


def subsets(block: Mapping[str, Any], top: str) -> Table:
    """Share of items right by number of responses and by subset."""
    models = block["models"]
    first = next(iter(models.values()))["by_subset"]
    rows = [
        (name, f"{accuracy['num_items']:,}", *(cell(m["by_subset"][name]) for m in models.values()))
        for name, accuracy in first.items()
    ]
    note = f"Share of items right in %, vote@{top}."
    return Table.of("By kind of item", ("subset", "items", *map(label, models)), rows, note)


def meta_rm(block: Mapping[str, Any]) -> Table:
    """The meta RM on single samples."""
    blocks = {n: m["meta_rm"] for n, m in block["models"].items() if m.get("meta_rm")}
    quantities = {"auc": "AUC", "auc_without_ties": "AUC on judgements without a tie", "ece": "calibration error",
                  "auc_within_item": "AUC within an item", "accuracy": "accuracy",
                  "share_right": "share right"}  # fmt: skip
    rows = [(what, *(_number(meta[key]) for meta in blocks.values())) for key, what in quantities.items()]
    for name in ("random", "shortest", "longest"):
        gains = [percent(meta.get("gain_by_filter", {}).get(name)) for meta in blocks.values()]
        rows.append((f"% of its gain by keeping {name} ones", *gains))
    title = "Meta RM, against Eq. 10 on single samples"
    return Table.of(title, ("", *map(label, blocks)), rows if blocks else ())


def transfer(meta: Mapping[str, Any], blocks: Mapping[str, Any]) -> Table:
    """The meta RM in and out of its training distribution."""
    rows = []
    for judge, by_label in meta.items():
        for name, numbers in by_label.items():
            where = "in distribution" if blocks[name]["in_distribution"] else "never trained on"
            rows.append(
                (f"{label(judge)}, {name}", where, *(_number(numbers[k]) for k in ("auc", "auc_within_item", "ece")))
            )
    return Table.of("Meta RM, in and out of distribution", ("judge, items", "", "AUC", "within an item", "ECE"), rows)


def habits(by_judge: Mapping[str, Mapping[str, float | None]]) -> Table:
    """The habits of each judge, one per row (`spct_ray.data.habits`)."""
    names = next(iter(by_judge.values()), {})
    rows = [
        (name, *("-" if (value := own[name]) is None else f"{value:.2f}" for own in by_judge.values()))
        for name in names
    ]
    return Table.of("What judges do", ("a sampled judgement", *map(label, by_judge)), rows)


def of_benchmark(name: str, block: Mapping[str, Any], ks: Sequence[int]) -> list[Table]:
    """All tables of one benchmark that have rows, the most important first."""
    top = str(max(ks))
    shown = [
        headline(name, block, ks), differences(block), parts(block, top), behaviour(block, top), failures(block),
        subsets(block, top), aggregators(block, top), k_meta(block, ks), adaptive(block, top), orders(block),
        meta_rm(block),
    ]  # fmt: skip
    return [table for table in shown if table.rows]


def example(name: str, item: Item, judgement: Trajectory, verdict: Verdict, decision: int | None) -> str:
    """One item as its judge saw it, the judgement, and the result of the vote."""

    def block(title: str, text: str) -> str:
        lines = [piece for line in text.splitlines() or [""] for piece in textwrap.wrap(line, WIDTH - 14) or [""]]
        return "\n".join(f"{title if i == 0 else '':<12}  {line}".rstrip() for i, line in enumerate(lines))

    def option_name(option: int) -> str:
        if len(item.responses) == 1:
            return "right" if option else "wrong"
        return f"response {judgement.order.index(option) + 1}"

    truth = right_options(item).index(True)
    blocks = [block("query", item.messages[-1].content)]
    blocks += [block(f"response {p}", item.responses[i]) for p, i in enumerate(judgement.order, 1)]
    blocks.append(block("judgement", judgement.text))
    outcome = "no parsed judgement" if decision is None else option_name(decision)
    sums = ", ".join(str(verdict.scores[i]) for i in judgement.order) if verdict.scores else "none"
    hit = "right" if decision == truth else f"wrong: it is {option_name(truth)}"
    judged = f"sums of {len(verdict.used)} judgements: {sums} -> {outcome} ({hit})"
    heading = f"The first held-out item that {label(name)} judges {'right' if decision == truth else 'wrong'}"
    return "\n".join([heading, *blocks, block("verdict", judged)])


def summary_text(summary: Mapping[str, Any], examples: Sequence[str]) -> str:
    """The terminal's report: examples, headline and differences of each benchmark, and how to read them."""
    ks = summary["ks"]
    shown = sorted({1, max(ks)} & set(ks)) if summary["brief"] else ks
    paragraphs = []
    for name, block in summary["benchmarks"].items():
        tables = of_benchmark(name, block, ks)
        tables[0] = headline(name, block, shown)
        if summary["brief"]:  # the page has the others
            tables = [tables[0], *([differences(block)] if block["paired"] and name == "heldout" else [])]
        paragraphs += [table.text() for table in tables]
        paragraphs.append("\n".join(line for remark in remarks(block, ks) for line in textwrap.wrap(remark, WIDTH)))
    if summary["habits"]:
        paragraphs.append(habits(summary["habits"]).text())
    notes = "+- is half the 95 % bootstrap interval over questions and over which k of the samples were drawn. An item "
    notes += "without a parsed judgement counts as wrong, a tie of m as 1/m. By the meta RM, meta@k sums the best of "
    notes += "the k judgements, weighted@k all of them by their chance to be right."
    paragraphs.append("\n".join([*textwrap.wrap(notes, WIDTH), *(f"Missing: {what}." for what in summary["missing"])]))
    return "\n\n".join([*examples, *paragraphs])
