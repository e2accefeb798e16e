"""What a run prints at its end: one judged example and the table, plain ASCII frames, at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from spct_ray.evaluation.curves import right_option
from spct_ray.records import Item, Trajectory, Verdict

WIDTH = 100
LABELS = {"base": "base", "rft": "RFT", "grpo": "GRPO"}


def cell(entry: Mapping[str, Any] | None) -> str:
    """`0.812 +- 0.031`: accuracy and half the width of its interval; `-` where there is none."""
    if not entry:
        return "-"
    low, high = entry["ci"]
    return f"{entry['accuracy']:.3f} +- {(high - low) / 2:.3f}"


def table(block: Mapping[str, Any], title: str) -> str:
    """The headline table of the held-out items or of a benchmark: a row a judge."""
    models = block["models"]
    k_max = max((int(k) for model in models.values() for k in model["vote"]), default=1)
    rows = [["judge", "greedy", "one sample", f"vote@{k_max}", f"meta@{k_max}", f"weighted@{k_max}", "parsed"]]
    for name, model in models.items():
        votes = (
            model["greedy"],
            model["vote"].get("1"),
            model["vote"].get(str(k_max)),
            model["meta_vote"].get(str(k_max)),
            model["weighted_vote"].get(str(k_max)),
        )
        rows.append([LABELS[name], *map(cell, votes), f"{model['parse_rate']:.1%}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows]
    heading = f"{title}: accuracy on {block['num_items']} items (+- half the 95 % bootstrap interval)"
    return "\n".join([heading, lines[0], "-" * len(lines[0]), *lines[1:], f"chance {block['chance']:.3f}"])


def effects(block: Mapping[str, Any]) -> str:
    """What each stage added on the held-out items, in points, and whether its interval leaves out 0."""
    shown = {name: d for name, d in block["paired"].items() if LABELS["base"] not in name}
    width = max(map(len, shown), default=0)
    lines = []
    for name, d in shown.items():
        low, high = d["ci"]
        verdict = "beyond noise" if low > 0 or high < 0 else "within noise"
        lines.append(
            f"{name:<{width}}  {100 * d['difference']:+6.1f}  [{100 * low:+.1f}, {100 * high:+.1f}]  {verdict}"
        )
    return "\n".join(["Differences on the same items in points, with 95 % intervals", *lines])


def habits(found: Mapping[str, Mapping[str, float | None]]) -> str:
    """What a judgement of each judge does, a row a habit (`spct_ray.data.habits`)."""
    rows = [["A sampled judgement", *(LABELS[name] for name in found)]]
    for habit in next(iter(found.values())):
        values = [by_habit[habit] for by_habit in found.values()]
        rows.append([habit, *("-" if value is None else f"{value:.2f}" for value in values)])
    width = max(len(row[0]) for row in rows)
    return "\n".join("  ".join([row[0].ljust(width), *(cell.rjust(5) for cell in row[1:])]) for row in rows)


def example(model: str, item: Item, judgement: Trajectory, verdict: Verdict, decision: int | None) -> str:
    """One item as its judge saw it, what it wrote, and what the vote came to."""

    def block(label: str, text: str) -> str:
        lines = [piece for line in text.splitlines() or [""] for piece in textwrap.wrap(line, WIDTH - 14) or [""]]
        return "\n".join(f"{label if i == 0 else '':<12}  {line}".rstrip() for i, line in enumerate(lines))

    def name(option: int) -> str:
        if len(item.responses) == 1:
            return "right" if option else "wrong"
        return f"response {judgement.order.index(option) + 1}"

    truth = right_option(item)
    parts = [block("query", item.messages[-1].content)]
    parts += [block(f"response {p}", item.responses[i]) for p, i in enumerate(judgement.order, 1)]
    parts.append(block("judgement", judgement.text))
    outcome = "no parsed judgement" if decision is None else name(decision)
    sums = ", ".join(str(verdict.scores[i]) for i in judgement.order) if verdict.scores else "none"
    hit = "right" if decision == truth else f"wrong: it is {name(truth)}"
    judged = f"sums of {len(verdict.used)} judgements: {sums} -> {outcome} ({hit})"
    heading = f"The first held-out item that {LABELS[model]} judges {'right' if decision == truth else 'wrong'}"
    return "\n".join([heading, *parts, block("verdict", judged)])


def summary_text(summary: Mapping[str, Any], examples: Sequence[str]) -> str:
    """The examples, then a table for the held-out items and for each benchmark, and what the run did not have."""
    tables = [table(block, f"Benchmark {name}") for name, block in summary["benchmarks"].items()]
    notes = [
        "An item without a parsed judgement counts as wrong, a tie of m as 1/m. By the meta RM, meta@k",
        "sums the best of the k judgements, weighted@k all of them by their chance to be right.",
    ]
    areas = {LABELS[name]: area for name, area in summary["meta_rm"]["auc_by_judge"].items() if area is not None}
    if areas:
        found = ", ".join(f"{area:.3f} ({name})" for name, area in areas.items())
        notes.append(f"AUC of the meta RM on judgements without a tie: {found}.")
    told = [habits(summary["habits"])] if summary["habits"] else []
    notes += [f"Missing: {what}." for what in summary["missing"]]
    return "\n\n".join([*examples, *tables, table(summary, "Held-out"), effects(summary), *told, "\n".join(notes)])
