"""The tables of a report: the page shows all of them, the terminal the first few in plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spct_ray.evaluation.judgements import right_options
from spct_ray.evaluation.results import AGGREGATORS, label
from spct_ray.records import Item, Trajectory, Verdict

WIDTH = 100
_VOTES = {"vote": "vote", "meta_vote": "meta", "weighted_vote": "weighted"}
Cells = Mapping[str, Mapping[str, str]]  # by row and column, or by column and row
Block = Mapping[str, Any]  # of a benchmark or of one judge on it, see `spct_ray.evaluation.results`


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a head; the first column is text, the others are numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @classmethod
    def of(cls, title: str, corner: str, cells: Cells, note: str = "", absent: str = "-") -> Table:
        """The table of cells by row and column."""
        names = list(dict.fromkeys(name for row in cells.values() for name in row))
        rows = [(first, *(row.get(name, absent) for name in names)) for first, row in cells.items()]
        return cls(title, (corner, *names), rows, note)

    def text(self) -> str:
        """Aligned text, at most WIDTH wide; columns that do not fit follow below, under the first column again."""
        first, *others = zip(self.head, *self.rows, strict=True)
        padded = [name.ljust(max(map(len, first))) for name in first]
        blocks = [padded]
        for column in others:
            width = 2 + max(map(len, column))
            if blocks[-1] is not padded and len(blocks[-1][0]) + width > WIDTH:
                blocks.append(padded)
            blocks[-1] = [line + cell.rjust(width) for line, cell in zip(blocks[-1], column, strict=True)]
        parts = [[line.rstrip() for line in block] for block in blocks]
        ruled = [line for part in parts for line in (part[0], "-" * max(map(len, part)), *part[1:])]
        return "\n".join([*textwrap.wrap(self.title, WIDTH), *ruled, *textwrap.wrap(self.note, WIDTH)])


def turned(cells: Cells) -> dict[str, dict[str, str]]:
    """Columns as rows, rows as columns."""
    names = dict.fromkeys(name for row in cells.values() for name in row)
    return {name: {first: row[name] for first, row in cells.items() if name in row} for name in names}


def cell(entry: Block | None) -> str:
    """`81.2 +- 3.1`: a share in percent and half the width of its interval; `-` where there is none."""
    if not entry or not entry["ci"]:
        return "-"
    low, high = entry["ci"]
    return f"{100 * (entry['score'] if 'score' in entry else entry['accuracy']):.1f} +- {50 * (high - low):.1f}"


def percent(value: float | None) -> str:
    """`81.2`, or `-`."""
    return "-" if value is None else f"{100 * value:.1f}"


def span(ends: Sequence[float], form: str = ".1f") -> str:
    """`[79.6, 82.8]`, in percent."""
    return f"[{100 * ends[0]:{form}}, {100 * ends[1]:{form}}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def title_of(name: str, block: Block) -> str:
    """What a set of items is called."""
    return "Held-out items" if name == "heldout" else f"{block['title']} ({name})"


def headline(name: str, block: Block, ks: Sequence[int]) -> Table:
    """The official score of every judge: greedy, and votes of `ks` samples."""
    models, rows = block["models"], {}
    votes = [(key, short, str(k)) for key, short in _VOTES.items() for k in ks]
    votes = [vote for vote in votes if any(vote[2] in m[vote[0]] for m in models.values())]
    votes = [vote for vote in votes if vote[0] == "vote" or vote[2] != "1"]  # a meta vote of one sample is that sample
    for n, m in models.items():
        cells = {f"{short}@{k}": cell(m[key].get(k)) for key, short, k in votes}
        rows[label(n)] = {"greedy": cell(m["greedy"]), **cells, "parsed": percent(m["rates"]["parse_rate"])}
    rows["chance"] = {"greedy": percent(block["chance"])}
    title = f"{title_of(name, block)}: official score in % of {block['num_questions']:,} questions"
    return Table.of(title, "judge", rows, absent="")


def remarks(block: Block, ks: Sequence[int]) -> list[str]:
    """What limits the scores of a benchmark: items that were dropped, failed, absent or seen in training."""
    lines = ["Prompts: " + ", ".join(f"{number:,} of {n}" for n, number in block["layout"].items()) + "."]
    if dropped := block["dropped"].get("counts"):
        lines.append(f"Dropped: {_counts(dropped)}.")
    if block["absent_subsets"]:
        lines.append(f"Without a row, so not in the score: {', '.join(block['absent_subsets'])}.")
    if block["contaminated"]:
        lines.append(f"{len(block['contaminated'])} items share an n-gram with the training queries.")
    for name, model in block["models"].items():
        if model["failures"]:
            lines.append(f"{label(name)}: failed judgements: {_counts(model['failures'])}.")
        last = _last(model, ks)
        if last["undecided_rate"]:
            right = last["right_of_decided"]
            others = "" if right is None else f"; of the others {percent(right)} % are right"
            share = percent(last["undecided_rate"])
            lines.append(f"{label(name)}: {share} % of the items have no parsed judgement{others}.")
        if number := model["num_in_chunks"]:
            lines.append(f"{label(name)}: {number:,} items did not fit one prompt and were judged in chunks.")
    return lines


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in reasons.items())


def _last(model: Block, ks: Sequence[int]) -> Block:
    """The vote of most samples, of a judge without samples its greedy judgement."""
    last: Block = model["vote"].get(str(max(ks))) or model["greedy"]
    return last


def differences(block: Block) -> Table:
    """Paired differences on the same items, and whether they are beyond noise."""
    rows = {}
    for name, change in block["paired"].items():
        (low, high), p = change["ci"], change["p_value"]
        rows[name] = {
            "points": f"{100 * change['difference']:+.1f}",
            "95 % interval": span(change["ci"], "+.1f"),
            "p": f"{'<=' * (p <= 0.01)}{p:.3f}",
            "won:lost": f"{change['won']}:{change['lost']}",
            "undecided": str(change["undecided"]),
            "": "beyond noise" if low > 0 or high < 0 else "within noise",
        }
    return Table.of("Differences of the official score on the same questions", "difference", rows)


def behaviour(block: Block, ks: Sequence[int]) -> Table:
    """Rates of single samples and of votes."""
    rows = {}
    for name, model in block["models"].items():
        rates, vote = model["rates"], _last(model, ks)
        rows[label(name)] = {
            "parsed": percent(rates["parse_rate"]),
            "ties": percent(rates["tie_rate"]),
            "right (Eq. 10)": percent(rates["correct_rate"]),
            "position consistency": percent(rates["position_consistency"]),
            f"ties of vote@{max(ks)}": percent(vote["tie_rate"]),
            "undecided": percent(vote["undecided_rate"]),
            "right of the decided": percent(vote["right_of_decided"]),
            "tokens": f"{rates['tokens_per_judgement']:.0f}",
        }
    note = "In %: single samples, then votes. Position consistency: the same responses win in another order."
    return Table.of("How the samples behave", "judge", rows, note)


def adaptive(block: Block, ks: Sequence[int]) -> Table:
    """How many samples adaptive k would have drawn, and how often it decides differently from all samples."""
    rows = {
        f"{label(name)}, {rule}": {
            "score": cell(entry),
            "samples": f"{entry['k']:.1f}",
            f"% of vote@{max(ks)}'s tokens": percent(entry["share_of_tokens"]),
            "% that differ": percent(entry["differ_from_k_max"]),
            "95 % interval": span(entry["differ_ci"]),
        }
        for name, model in block["models"].items()
        for rule, entry in model["adaptive"].items()
    }
    title = f"Adaptive voting: the service's rule for k = auto on the same {max(ks)} samples"
    return Table.of(title, "judge, rule", rows)


def orders(block: Block) -> Table:
    """Balanced against independent orders of pairs."""
    rows = {}
    for name, model in block["models"].items():
        for k, made in model["orders"].items():
            change, (low, high) = made["difference"]["accuracy"], made["difference"]["variance"]["ci"]
            rows[f"{label(name)}, {k}"] = {
                "pairs": str(made["num_items"]),
                **{f"{way}, %": percent(made[way]["accuracy"]) for way in ("balanced", "independent")},
                "points": f"{100 * change['difference']:+.2f}",
                "95 % interval": span(change["ci"], "+.2f"),
                **{f"variance, {way}": f"{made[way]['variance']:.4f}" for way in ("balanced", "independent")},
                "95 % interval of the difference": f"[{low:+.4f}, {high:+.4f}]",
            }
    note = "Half of the samples in each order (balanced), or each order by a throw of a coin (independent)."
    return Table.of("Orders of pairs at equal k", "judge, k", rows, note)


def meta_rm(block: Block) -> Table:
    """The meta RM on single samples."""
    quantities = {"auc": "AUC", "auc_without_ties": "AUC on judgements without a tie", "ece": "calibration error",
                  "auc_within_item": "AUC within an item", "accuracy": "accuracy",
                  "share_right": "share right"}  # fmt: skip
    columns = {}
    for name, meta in ((name, model["meta_rm"]) for name, model in block["models"].items() if "meta_rm" in model):
        gains = meta.get("gain_by_filter", {})
        columns[label(name)] = {what: _number(meta[key]) for key, what in quantities.items()} | {
            f"% of its gain by keeping {way} ones": percent(gains.get(way)) for way in ("random", "shortest", "longest")
        }
    return Table.of("Meta RM, against Eq. 10 on single samples", "", turned(columns))


def transfer(blocks: Block) -> Table:
    """The meta RM of each judge on each benchmark, those of its training distribution first."""
    rows = {
        f"{label(judge)}, {name}": {
            "": "in distribution" if block["in_distribution"] else "never trained on",
            "AUC": _number(block["models"][judge]["meta_rm"]["auc"]),
            "within an item": _number(block["models"][judge]["meta_rm"]["auc_within_item"]),
            "ECE": _number(block["models"][judge]["meta_rm"]["ece"]),
        }
        for judge in next(iter(blocks.values()))["models"]
        for name, block in sorted(blocks.items(), key=lambda named: not named[1]["in_distribution"])
        if "meta_rm" in block["models"][judge]
    }
    return Table.of("Meta RM, in and out of distribution", "judge, items", rows)


def habits(by_judge: Mapping[str, Mapping[str, float | None]]) -> Table:
    """The habits of each judge, one per row (`spct_ray.data.program`)."""
    columns = {label(n): {name: _number(value, 2) for name, value in own.items()} for n, own in by_judge.items()}
    return Table.of("What judges do", "a sampled judgement", turned(columns))


def of_benchmark(name: str, block: Block, ks: Sequence[int]) -> list[Table]:
    """All tables of one benchmark that have rows, the most important first."""
    top, models = max(ks), {label(n): model for n, model in block["models"].items()}
    reasons = sorted({reason for m in models.values() for reason in m["failures"]})
    shares = {n: {part: percent(value) for part, value in _last(m, ks)["parts"].items()} for n, m in models.items()}
    failures = {r.replace("_", " "): {n: f"{m['failures'].get(r, 0):,}" for n, m in models.items()} for r in reasons}
    items = {of: f"{group['num_items']:,}" for m in models.values() for of, group in m["by_subset"].items()}
    subsets = {n: {of: cell(group) for of, group in m["by_subset"].items()} for n, m in models.items()}
    ways = [way for way in AGGREGATORS if any(way in m["aggregators"] for m in models.values())]
    aggregators = {n: {AGGREGATORS[way]: cell(m["aggregators"].get(way)) for way in ways} for n, m in models.items()}
    k_meta = {n: {f"k_meta {k}": cell(m["k_meta"].get(str(k))) for k in ks} for n, m in models.items()}
    aggregators = {n: cells for n, cells in aggregators.items() if models[n]["aggregators"]}
    k_meta = {n: cells for n, cells in k_meta.items() if models[n]["k_meta"]}
    shown = [
        headline(name, block, ks),
        differences(block),
        Table.of("Parts of the score", "part", turned(shares), f"In %, vote@{top}."),
        behaviour(block, ks),
        Table.of("Failed judgements", "reason", failures, "Named and excluded, never scored."),
        Table.of("By kind of item", "subset", turned({"items": items, **subsets}),
                 f"Share of items right in %, vote@{top}."),
        Table.of(f"Aggregators of the same {top} samples", "judge", aggregators),
        Table.of(f"Meta vote@{top} by k_meta, how many of the samples it keeps", "judge", k_meta),
        adaptive(block, ks),
        orders(block),
        meta_rm(block),
    ]  # fmt: skip
    return [table for table in shown if table.rows]


def example(name: str, item: Item, judgement: Trajectory, verdict: Verdict, decision: int | None) -> str:
    """One item as its judge saw it, the judgement, and the result of the vote."""

    def option_name(option: int) -> str:
        if len(item.responses) == 1:
            return "right" if option else "wrong"
        return f"response {judgement.order.index(option) + 1}"

    truth = right_options(item).index(True)
    outcome = "no parsed judgement" if decision is None else option_name(decision)
    sums = ", ".join(str(verdict.scores[i]) for i in judgement.order) if verdict.scores else "none"
    hit = "right" if decision == truth else f"wrong: it is {option_name(truth)}"
    parts = [
        ("query", item.messages[-1].content),
        *((f"response {p}", item.responses[i]) for p, i in enumerate(judgement.order, 1)),
        ("judgement", judgement.text),
        ("verdict", f"sums of {len(verdict.used)} judgements: {sums} -> {outcome} ({hit})"),
    ]
    lines = [f"The first held-out item that {label(name)} judges {'right' if decision == truth else 'wrong'}"]
    for title, text in parts:
        wrapped = [piece for line in text.splitlines() or [""] for piece in textwrap.wrap(line, WIDTH - 14) or [""]]
        lines += [f"{title if i == 0 else '':<12}  {line}".rstrip() for i, line in enumerate(wrapped)]
    return "\n".join(lines)


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
    notes = (
        "+- is half the 95 % bootstrap interval over questions and over which k of the samples were drawn. An item "
        "without a parsed judgement counts as wrong, a tie of m as 1/m. By the meta RM, meta@k sums the best of the k "
        "judgements, weighted@k all of them by their chance to be right."
    )
    paragraphs.append("\n".join([*textwrap.wrap(notes, WIDTH), *(f"Missing: {what}." for what in summary["missing"])]))
    return "\n\n".join([*examples, *paragraphs])
