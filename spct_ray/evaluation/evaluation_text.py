"""What `spct evaluate` prints at its end: a table a benchmark, one of the aggregators, and the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {
    "sum": "sum",
    "mean": "mean",
    "median": "median",
    "majority": "majority",
    "best_by_meta": "best by meta",
    "meta_top": "meta top-k",
    "meta_weighted": "meta-weighted",
}


def cell(made: Mapping[str, Any] | None) -> str:
    """`0.812 +- 0.031`: score and half the width of its interval; `-` where there is none."""
    if not made or made["score"] is None or not made["ci"]:
        return "-"
    low, high = made["ci"]
    return f"{made['score']:.3f} +- {(high - low) / 2:.3f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


ORDER_HEAD = ("judge, k", "pairs", "accuracy", "independent", "points", "95 % interval", "variance over draws",
              "independent", "95 % interval of the difference")  # fmt: skip


def order_rows(block: Mapping[str, Any]) -> list[list[str]]:
    """A row a judge and k under ORDER_HEAD; see `spct_ray.evaluation.orders`."""
    rows = []
    for name, model in block["models"].items():
        for k, found in model["orders"].items():
            balanced, independent, change = found["balanced"], found["independent"], found["difference"]
            (low, high), (least, most) = change["accuracy"]["ci"], change["variance"]["ci"]
            rows.append(
                [f"{name}, {k}", str(found["num_items"]), f"{balanced['accuracy']:.3f}",
                 f"{independent['accuracy']:.3f}", f"{100 * change['accuracy']['difference']:+.2f}",
                 f"[{100 * low:+.2f}, {100 * high:+.2f}]", f"{balanced['variance']:.4f}",
                 f"{independent['variance']:.4f}", f"[{least:+.4f}, {most:+.4f}]"]
            )  # fmt: skip
    return rows


def adaptive_head(top: str) -> tuple[str, ...]:
    """The columns of `adaptive_rows`."""
    return ("judge, rule", "score", "samples", f"tokens of vote@{top}", "decisions that differ", "95 % interval")


def adaptive_rows(block: Mapping[str, Any]) -> list[list[str]]:
    """A row a judge and rule: what adaptive k would have drawn, and how often it decides otherwise than all samples."""
    return [
        [f"{name}, {rule}", cell(made), f"{made['k']:.1f}", f"{made['share_of_tokens']:.1%}",
         f"{made['differ_from_k_max']:.1%}", "[{:.1%}, {:.1%}]".format(*made["differ_ci"])]
        for name, model in block["models"].items() for rule, made in model["adaptive"].items()
    ]  # fmt: skip


def benchmark_text(label: str, block: Mapping[str, Any], ks: Sequence[int]) -> str:
    """One benchmark: headline, every aggregator at the largest k, differences between judges."""
    top = str(max(ks))
    rows = [["judge", "greedy", "one sample", f"vote@{top}", f"meta vote@{top}", "parsed"]]
    for name, model in block["models"].items():
        votes = (model["greedy"], model["vote"].get("1"), model["vote"].get(top), model["meta_vote"].get(top))
        rows.append([name, *map(cell, votes), f"{model['rates']['parse_rate']:.1%}"])
    dropped = sum(block["dropped"]["counts"].values())
    layout = ", ".join(f"{number} of {n}" for n, number in block["layout"].items())
    lines = [
        f"{block['title']} ({label}): official score of {block['num_questions']} rows, {dropped} dropped; "
        f"prompts: {layout}",
        *_table(rows),
        f"chance {block['chance']:.3f}" if block["chance"] is not None else "chance: not defined",
    ]
    for name, model in block["models"].items():
        if model["failures"]:
            failed = ", ".join(f"{number:,} {why.replace('_', ' ')}" for why, number in model["failures"].items())
            lines.append(f"{name}: failed judgements: {failed}.")
        last = model["vote"].get(top) or model["greedy"]
        if last["undecided_rate"]:
            right = (
                "" if last["right_of_decided"] is None else f"; of the others {last['right_of_decided']:.3f} are right"
            )
            lines.append(f"{name}: {last['undecided_rate']:.1%} of the items have no parsed judgement{right}.")
        if model["num_in_chunks"]:
            lines.append(f"{name}: {model['num_in_chunks']:,} items did not fit one prompt and were judged in chunks.")
    if block["absent_subsets"]:
        lines.append(f"Without a row, so not in the score: {', '.join(block['absent_subsets'])}.")
    why = ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in block["dropped"]["counts"].items())
    if why:
        lines.append(f"Dropped: {why}.")
    if block["contaminated"]:
        lines.append(f"{len(block['contaminated'])} items share an n-gram with the training queries.")
    shown = [name for name in NAMES if any(m["aggregators"].get(name) for m in block["models"].values())]
    table = [["judge", *(NAMES[name] for name in shown)]]
    for name, model in block["models"].items():
        table.append([name, *(cell(model["aggregators"].get(way)) for way in shown)])
    lines += ["", f"Aggregators of the same {top} samples", *_table(table)]
    kept = [k for k in map(str, ks) if any("k_meta" in m for m in block["models"].values())]
    if kept:
        rows = [
            [name, *(cell(model["k_meta"][k]) for k in kept)]
            for name, model in block["models"].items()
            if "k_meta" in model
        ]
        lines += ["", f"Meta vote@{top} by k_meta, how many of them it keeps", *_table([["judge", *kept], *rows])]
    if adaptive := adaptive_rows(block):
        title = f"Adaptive voting: the service's rule for k = auto on the same {top} samples"
        lines += ["", title, *_table([adaptive_head(top), *adaptive])]
    if compared := order_rows(block):
        lines += ["", "Orders of pairs at equal k: balanced against independent", *_table([ORDER_HEAD, *compared])]
    differences = [
        [f"{pair}, {way.replace('sum@', 'vote@').replace('meta_top@', 'meta vote@')}", f"{100 * d['difference']:+.1f}",
         f"[{100 * d['ci'][0]:+.1f}, {100 * d['ci'][1]:+.1f}]", f"{d['p_value']:.3f}",
         f"{d['won']} : {d['lost']}", str(d["undecided"])]
        for pair, found in block["paired"].items()
        for way, d in found.items()
    ]  # fmt: skip
    if differences:
        head = ["difference, points", "", "95 % interval", "p", "won : lost", "undecided"]
        lines += ["", *_table([head, *differences])]
    return "\n".join(lines)


def summary_text(summary: Mapping[str, Any]) -> str:
    """All benchmarks, and how to read the numbers."""
    tables = [benchmark_text(label, block, summary["ks"]) for label, block in summary["benchmarks"].items()]
    notes = [
        "An item without a parsed judgement counts as wrong. +- is half the 95 % bootstrap interval over rows and over",
        "which k of the samples were drawn. p: sign flips of the rows' credit.",
    ]
    return "\n\n".join([*tables, "\n".join(notes)])
