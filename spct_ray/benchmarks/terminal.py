"""What a run prints at its end: one judged example and the table, plain ASCII frames, at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from spct_ray.benchmarks.curves import right_option
from spct_ray.records import Item, Trajectory, Verdict

WIDTH = 100
LABELS = {"base": "base", "rft": "RFT", "grpo": "GRPO"}


def cell(entry: Mapping[str, Any] | None) -> str:
    """`0.812 +- 0.031`: accuracy and half the width of its interval; `-` where there is none."""
    if not entry:
        return "-"
    low, high = entry["ci"]
    return f"{entry['accuracy']:.3f} +- {(high - low) / 2:.3f}"


def table(summary: Mapping[str, Any]) -> str:
    """The headline table of summary.json."""
    models = summary["models"]
    k_max = max((int(k) for block in models.values() for k in block["vote"]), default=1)
    head = ["judge", "greedy", "one sample", f"vote@{k_max}", f"meta vote@{k_max}", "parsed"]
    rows = [head]
    for name, block in models.items():
        votes = (block["greedy"], block["vote"].get("1"), block["vote"].get(str(k_max)))
        meta = block["meta_vote"].get(str(k_max))
        rows.append([LABELS[name], *(cell(v) for v in (*votes, meta)), f"{block['parse_rate']:.1%}"])
    widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
    lines = [
        "  ".join(v.ljust(w) if c == 0 else v.rjust(w) for c, (v, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    auc = summary["meta_rm"]["auc"]
    return "\n".join(
        [
            f"Held-out accuracy on {summary['num_items']} items (+- half the 95 % bootstrap interval)",
            *lines,
            f"chance {summary['chance']:.3f}; an item without a parsed judgement counts as wrong"
            + (f"; meta RM: AUC {auc:.3f}, ECE {summary['meta_rm']['ece']:.3f}" if auc is not None else ""),
            *(f"missing: {what}" for what in summary["missing"]),
        ]
    )


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
    return "\n".join([f"One judged example ({LABELS[model]})", *parts, block("verdict", judged)])


def summary_text(summary: Mapping[str, Any], examples: Sequence[str]) -> str:
    """Examples, an empty line each, then the table."""
    return "\n\n".join([*examples, table(summary)])
