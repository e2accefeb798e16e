"""The robustness suite's result as text and as a page. Everything that came from data or models is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from spct_ray.evaluation.style import SCRIPT, STYLE

_SHOWN = 6  # fooled items of each judge and probe on the page; all are in pairs.parquet


def _cell(made: Mapping[str, Any] | None) -> str:
    if not made or made["rate"] is None:
        return "-"
    low, high = made["ci"]
    return f"{made['rate']:.3f} [{low:.3f}, {high:.3f}]"


def _ways(judge: Mapping[str, Any]) -> list[str]:
    return [way for way in judge if not way.endswith("clean accuracy")]


def text(result: Mapping[str, Any]) -> str:
    """A table a judge: share fooled by each probe, under greedy and vote."""
    parts = []
    for name, judge in result["judges"].items():
        ways = _ways(judge)
        probes = list(dict.fromkeys(probe for way in ways for probe in judge[way]))
        rows = [["probe", *ways, "items", "undecided"]]
        for probe in probes:
            found = [judge[way].get(probe) for way in ways]
            first = next(made for made in found if made)
            rows.append([probe, *map(_cell, found), str(first["num_items"]), str(first["undecided"])])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows]
        clean = ", ".join(f"{way} {judge[f'{way} clean accuracy']:.3f}" for way in ways)
        head = f"{name}: share fooled, 95 % intervals ({result['num_items']} items; accuracy as they are: {clean})"
        parts.append("\n".join([head, lines[0], "-" * len(lines[0]), *lines[1:]]))
    return "\n\n".join(parts)


def render(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The page: bars by probe, and fooled items to read, filtered by judge and probe."""
    panels = []
    for name, judge in result["judges"].items():
        for way in _ways(judge):
            body = "".join(
                f"<tr><th scope=row title='{escape(made['what'])}'>{escape(probe)}<br><small>{escape(made['what'])}"
                f"</small></th><td>{_cell(made)}</td><td>{made['num_items']}</td><td class=barcell>"
                f"<span class=bar style='width:{100 * (made['rate'] or 0):.1f}%'></span></td></tr>"
                for probe, made in judge[way].items()
            )
            clean = f"Accuracy as the items are: {judge[f'{way} clean accuracy']:.3f}."
            panels.append(
                f"<section class='panel wide'><h3>{escape(name)}, {escape(way)}</h3><p class=note>{clean}</p>"
                "<div class=scroll><table class='bars sortable'><thead><tr><th>probe</th><th>share fooled</th>"
                f"<th>items</th><th></th></tr></thead><tbody>{body}</tbody></table></div></section>"
            )
    fooled = [row for row in rows if row["probe"] != "clean" and row["scores"] and row["credit"] < 1]
    shown, seen = [], dict[tuple[str, str, str], int]()
    for row in fooled:
        key = (row["judge"], row["way"], row["probe"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= _SHOWN:
            shown.append(_sample(row))
    probes, judges = (list(dict.fromkeys(row[key] for row in fooled)) for key in ("probe", "judge"))
    filters = "".join(_filter(key, names) for key, names in (("judge", judges), ("probe", probes)))
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'><title>Robustness</title>"
        f"<style>{STYLE}</style></head><body><main><header class=top><h1>Robustness</h1><p>What should not move a "
        f"judge, on {result['num_items']:,} items. A tie fools half; undecided items are counted apart.</p></header>"
        f"<div class=grid>{''.join(panels)}</div><h2>Fooled</h2><p class=filters>{filters}</p>"
        f"<div class=samples>{''.join(shown)}</div></main><script>{SCRIPT}</script></body></html>\n"
    )


def _filter(key: str, names: Sequence[str]) -> str:
    buttons = "".join(
        f"<button type=button data-{key}='{escape(value)}' aria-pressed={'true' if not value else 'false'}>"
        f"{escape(label)}</button>"
        for value, label in (("", "all"), *((n, n) for n in names))
    )
    return f"<span class=group data-key={key}>{buttons}</span>"


def _sample(row: Mapping[str, Any]) -> str:
    responses = "".join(
        f"<li><header>Response {'<em class=best>best</em>' if i == row['best'] else ''}<b>{score:g}</b></header>"
        f"<pre>{escape(text)}</pre></li>"
        for i, (text, score) in enumerate(zip(row["responses"], row["scores"], strict=True))
    )
    return (
        f"<article class=sample data-judge='{escape(row['judge'])}' data-probe='{escape(row['probe'])}'><header>"
        f"{escape(row['judge'])}<span class=tag>{escape(row['way'])}</span><span class='badge wrong'>"
        f"{escape(row['probe'])}</span></header><pre class=query>{escape(row['query'])}</pre><ol>{responses}</ol>"
        "</article>"
    )
