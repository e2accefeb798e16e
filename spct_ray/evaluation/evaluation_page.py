"""The page of `spct evaluate`: judges side by side, every table sortable, judgements to read. Self-contained; all that
came from data or models is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from spct_ray.evaluation import evaluation_plots as plots
from spct_ray.evaluation.evaluation_text import NAMES, ORDER_HEAD, adaptive_head, adaptive_rows, order_rows
from spct_ray.evaluation.style import SCRIPT, STYLE

Cells = Sequence[Sequence[str]]


def _table(head: Sequence[str], rows: Cells, note: str = "", kind: str = "") -> str:
    body = "".join(
        f"<tr><th scope=row>{r[0]}</th>{''.join(c if c.startswith('<td') else f'<td>{c}</td>' for c in r[1:])}</tr>"
        for r in rows
    )
    titles = "".join(f"<th scope=col>{escape(h)}</th>" for h in head)
    below = f"<p class=note>{note}</p>" if note else ""
    table = f"<table class='sortable {kind}'><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class=scroll>{table}</div>{below}"


def _score(made: Mapping[str, Any] | None) -> str:
    if not made or made.get("score") is None or not made["ci"]:
        return "–"
    low, high = made["ci"]
    return f"<b>{100 * made['score']:.1f}</b> <i>{100 * low:.1f}–{100 * high:.1f}</i>"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}&thinsp;%"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _judge(name: str, names: Sequence[str]) -> str:
    return f"<span class=dot style='background:{plots.colour(names.index(name))}'></span>{escape(name)}"


def _panel(title: str, body: str, wide: bool = False) -> str:
    return f"<section class='panel{' wide' if wide else ''}'><h3>{escape(title)}</h3>{body}</section>"


def _chart(title: str, svg: str, note: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    return _panel(title, f"<img alt='{escape(title)}' src='data:image/svg+xml;base64,{data}'><p class=note>{note}</p>")


def _overview(summary: Mapping[str, Any], names: Sequence[str]) -> str:
    top = str(max(summary["ks"]))
    rows = []
    for name in names:
        cells = [_judge(name, names)]
        for block in summary["benchmarks"].values():
            model = block["models"][name]
            cells += [_score(model["greedy"]), _score(model["meta_vote"].get(top) or model["vote"].get(top))]
        about = summary["judges"][name]
        weights = "–" if about["weights"] is None else f"{about['weights']:,}"
        rows.append([*cells, weights, f"{about['completion_tokens']:.0f}"])
    head = ["judge"]
    for block in summary["benchmarks"].values():
        head += [f"{block['title']}, greedy", f"best vote@{top}"]
    note = (
        "Official scores in %, with 95&thinsp;% intervals. Best vote: guided by the meta RM where the judge has one. "
        "The one score of a scalar reward model stands under greedy."
    )
    return _table([*head, "weights", "tokens a judgement"], rows, note)


def _scores(block: Mapping[str, Any], names: Sequence[str], ks: Sequence[int]) -> str:
    top = [str(k) for k in ks]
    rows = [
        [_judge(n, names), _score(m["greedy"]), *(_score(m["vote"].get(k)) for k in top),
         *(_score(m["meta_vote"].get(k)) for k in top if int(k) > 1)]
        for n, m in block["models"].items()
    ]  # fmt: skip
    layout = ", ".join(f"{number:,} of {n}" for n, number in block["layout"].items())
    dropped = ", ".join(f"{c} {name.replace('_', ' ')}" for name, c in block["dropped"]["counts"].items()) or "none"
    leak, absent = block["contaminated"], ", ".join(block["absent_subsets"])
    known = "not checked" if leak is None else f"{len(leak)} items share 13 words with a training query"
    note = (
        f"{block['num_questions']:,} rows; prompts: {layout}; dropped: {dropped}; contamination: {known}; chance "
        f"{_percent(block['chance'])}. An item without any parsed judgement counts as wrong."
        + (f" Without a row, so not in the score: {absent}." if absent else "")
    )
    head = ["judge", "greedy", *(f"vote@{k}" for k in top), *(f"meta vote@{k}" for k in top if int(k) > 1)]
    return _table(head, rows, escape(note).replace("&amp;thinsp;", "&thinsp;"))


def _parts(block: Mapping[str, Any], names: Sequence[str], top: str) -> str:
    found = {n: (m["vote"].get(top) or m["greedy"])["parts"] for n, m in block["models"].items()}
    parts = list(dict.fromkeys(p for own in found.values() for p in own))
    rows = [
        [_judge(n, names), *(f"{100 * own[p]:.1f}" if p in own else "–" for p in parts)] for n, own in found.items()
    ]
    return _table(["judge", *parts], rows, f"What the official score is made of, vote@{top}, in %.") if parts else ""


def _aggregators(block: Mapping[str, Any], names: Sequence[str], top: str) -> str:
    ways = [w for w in NAMES if any(m["aggregators"].get(w) for m in block["models"].values())]
    rows = [
        [_judge(n, names), *(_score(m["aggregators"].get(w)) for w in ways)]
        for n, m in block["models"].items()
        if m["aggregators"]
    ]
    return _table(["judge", *(NAMES[w] for w in ways)], rows, f"The same {top} samples, put together in other ways.")


def _k_meta(block: Mapping[str, Any], names: Sequence[str], ks: Sequence[int]) -> str:
    rows = [
        [_judge(n, names), *(_score(m["k_meta"][str(k)]) for k in ks)]
        for n, m in block["models"].items()
        if "k_meta" in m
    ]
    note = f"Meta vote@{max(ks)}: how many of the samples it keeps."
    return _table(["judge", *(f"k_meta = {k}" for k in ks)], rows, note) if rows else ""


def _orders(block: Mapping[str, Any], names: Sequence[str]) -> str:
    note = (
        "Pairs at equal k: half of the samples in each order (balanced), or each order by a throw of a coin "
        "(independent). Variance: of an item's outcome over draws of k samples."
    )
    rows = [[escape(row[0]), *row[1:]] for row in order_rows(block)]
    return _table(ORDER_HEAD, rows, note) if rows else ""


def _adaptive(block: Mapping[str, Any], names: Sequence[str], top: str) -> str:
    note = (
        f"The service's rule on the same samples: it stops when by its model at most the share of decisions that is "
        f"called error differs from those of all {top}."
    )
    rows = [[escape(row[0]), *row[1:]] for row in adaptive_rows(block)]
    return _table(adaptive_head(top), rows, note) if rows else ""


def _behaviour(block: Mapping[str, Any], names: Sequence[str], top: str) -> str:
    keys = ("parse_rate", "tie_rate", "correct_rate", "position_consistency")
    rows = []
    for n, m in block["models"].items():
        vote = m["vote"].get(top) or m["greedy"]
        failures = "<br>".join(f"{c:,} {f.replace('_', ' ')}" for f, c in m["failures"].items()) or "none"
        flips = m["rates"]["position_consistency"]
        shown = [_percent(m["rates"][k]) for k in keys[:3]] + [_percent(None if flips is None else 1 - flips)]
        chunks = f"{m['num_in_chunks']:,}"
        rows.append(
            [
                _judge(n, names),
                *shown,
                _percent(vote["tie_rate"]),
                _percent(vote["undecided_rate"]),
                _percent(vote["right_of_decided"]),
                failures,
                chunks,
            ]
        )
    head = [
        "judge",
        "parsed",
        "ties",
        "right (Eq. 10)",
        "position flips",
        f"ties of vote@{top}",
        "undecided",
        "right of the decided",
        "failures",
        "items in chunks",
    ]
    return _table(head, rows, "Shares of single samples, then of votes. A failed judgement is left out, never scored.")


def _paired(block: Mapping[str, Any]) -> str:
    rows = [
        [escape(f"{pair}, {way.replace('sum@', 'vote@').replace('meta_top@', 'meta vote@')}"),
         f"<b>{100 * d['difference']:+.1f}</b> <i>{100 * d['ci'][0]:+.1f} … {100 * d['ci'][1]:+.1f}</i>",
         f"{d['p_value']:.3f}", str(d["won"]), str(d["lost"]), str(d["equal"]), str(d["undecided"])]
        for pair, found in block["paired"].items() for way, d in found.items()
    ]  # fmt: skip
    head = ["comparison", "points", "p", "won", "lost", "equal", "undecided"]
    note = "Official score on the same rows; p by sign flips of the rows' credit; items that one of the two left "
    return _table(head, rows, note + "undecided stand apart.") if rows else ""


def _heat(block: Mapping[str, Any], names: Sequence[str], top: str) -> str:
    first = next(iter(block["models"].values()))["by_subset"]
    rows = []
    for subset, entry in first.items():
        cells = []
        for name in names:
            found = block["models"][name]["by_subset"][subset]
            value, (low, high) = found["accuracy"], found["ci"]
            shade = f"rgba(42,157,111,{0.75 * (value - 0.5) * 2:.2f})" if value >= 0.5 else (
                f"rgba(209,73,91,{0.75 * (0.5 - value) * 2:.2f})"
            )  # fmt: skip
            cells.append(
                f"<td style='background:{shade}'><b>{100 * value:.1f}</b> <i>{100 * low:.0f}–{100 * high:.0f}</i></td>"
            )
        rows.append([escape(subset), f"{entry['num_items']:,}", *cells])
    return _table(["subset", "items", *names], rows, f"Share of items right, vote@{top}, in %.", "heat")


_META = {
    "auc": "AUC",
    "auc_within_item": "AUC within an item",
    "accuracy": "accuracy",
    "ece": "calibration error (ECE)",
}


def _meta(block: Mapping[str, Any], names: Sequence[str]) -> str:
    """A row a quantity, a column a judge."""
    found = {n: m["meta_rm"] for n, m in block["models"].items() if "meta_rm" in m}
    if not found:
        return ""
    rows = [[what, *(_number(meta[key]) for meta in found.values())] for key, what in _META.items()]
    rows.append(["samples that are right", *(_percent(meta["share_right"]) for meta in found.values())])
    for name, kept in (("random", "random ones"), ("shortest", "the shortest"), ("longest", "the longest")):
        gains = [_percent(meta["gain_by_filter"][name]) for meta in found.values()]
        rows.append([f"share of its gain that keeping {kept} gives", *gains])
    note = "Against Eq. 10 on single samples. Its gain: of the meta vote over the plain vote; – where there is none."
    return _table(["", *found], rows, note)


def _transfer(summary: Mapping[str, Any], names: Sequence[str]) -> str:
    """The meta RM where it was trained and where it never was, side by side."""
    if not summary["meta_rm"]:
        return ""
    labels = list(next(iter(summary["meta_rm"].values())))
    head = ["judge"]
    for label in labels:
        kind = "in distribution" if summary["benchmarks"][label]["in_distribution"] else "never trained on"
        head += [f"{label}: AUC ({kind})", "within an item", "ECE"]
    rows = [
        [_judge(n, names), *(_number(of[label][key]) for label in labels for key in ("auc", "auc_within_item", "ece"))]
        for n, of in summary["meta_rm"].items()
    ]
    return _table(head, rows, "AUC of 0.5 is chance. In distribution: items held out of the run's own data.")


def _sample(row: Mapping[str, Any], names: Sequence[str]) -> str:
    kind = row["outcome"] if row["outcome"] in ("right", "wrong", "tied") else "failure"
    responses = "".join(
        f"<li><header>Response {place} {'<em class=best>right</em>' if good else ''}<b>{score}</b></header>"
        f"<pre>{escape(text)}</pre></li>"
        for place, (text, score, good) in enumerate(row["responses"], 1)
    )
    logit = "" if row["logit"] is None else f"<span class=tag>meta logit {row['logit']:.2f}</span>"
    subset = f"<span class=tag>{escape(row['subset'])}</span>" if row["subset"] else ""
    return (
        f"<article class=sample data-judge='{escape(row['judge'])}' data-benchmark='{escape(row['benchmark'])}' "
        f"data-outcome='{kind}'><header>{_judge(row['judge'], names)}"
        f"{subset}{logit}"
        f"<span class='badge {kind}'>{escape(row['outcome'].replace('_', ' '))}</span></header>"
        f"<pre class=query>{escape(row['query'])}</pre><ol>{responses}</ol><h4>Judgement</h4>"
        f"<pre>{escape(row['text']) or '(empty)'}</pre></article>"
    )


def _filters(groups: Mapping[str, Sequence[str]]) -> str:
    def group(key: str, values: Sequence[str]) -> str:
        buttons = "".join(
            f"<button type=button data-{key}='{escape(v)}' aria-pressed={'false' if v else 'true'}>{escape(v or 'all')}"
            "</button>"
            for v in ("", *values)
        )
        return f"<span class=group data-key={key}>{buttons}</span>"

    return f"<p class=filters>{''.join(group(key, values) for key, values in groups.items())}</p>"


_COSTS = {
    "tokens": "written tokens",
    "flops": "2 × weights × tokens, read and written",
    "seconds": "of the engine as measured, at this evaluation's batch sizes; without the meta RM's",
}


def render(summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """The page; `summary` is summary.json's content, `samples` the judgements to show (see `stages.compare`)."""
    names, top = list(summary["judges"]), str(max(summary["ks"]))
    first = _panel("All benchmarks", _overview(summary, names), wide=True)
    if transfer := _transfer(summary, names):
        first += _panel("Meta RM, in and out of distribution", transfer, wide=True)
    body = [f"<div class=grid>{first}</div>"]
    for label, block in summary["benchmarks"].items():
        points = [p for p in summary["points"] if p["benchmark"] == label]
        charts = [_chart("Score over samples", plots.score_curves(block["models"], block["chance"]),
                         "Bands: 95&thinsp;% intervals over rows and draws of k samples.")]  # fmt: skip
        note = "Is a vote that leads by more more often right?"
        charts.append(_chart("Margins and scores", plots.calibration(block["models"]), note))
        for axis, what in _COSTS.items():
            front = summary["pareto"][label][axis]
            listed = "; ".join(f"{i} {p['judge']}, {p['way']}" for i, p in enumerate(front, 1))
            note = f"Cost of a decision: {what}. The front: {escape(listed)}."
            charts.append(
                _chart(f"Score over {axis.replace('flops', 'FLOPs')}", plots.pareto_front(points, front, axis), note)
            )
        tables = [
            ("Scores", _scores(block, names, summary["ks"])), ("Parts", _parts(block, names, top)),
            ("Aggregators", _aggregators(block, names, top)), ("Adaptive voting", _adaptive(block, names, top)),
            ("How many samples the meta vote keeps", _k_meta(block, names, summary["ks"])),
            ("Balanced orders", _orders(block, names)),
            ("Is the difference real?", _paired(block)), ("Behaviour", _behaviour(block, names, top)),
        ]  # fmt: skip
        if meta := _meta(block, names):
            reliability = plots.meta_reliability(block["models"])
            charts += [_chart("Meta RM reliability", reliability, "Dots: area by count.")]
            tables.append(("Meta RM", meta))
        after = [("By subset", _heat(block, names, top))]
        wide = [[_panel(t, b, wide=True) for t, b in part if b] for part in (tables, after)]
        body.append(
            f"<h2>{escape(block['title'])} <small>{escape(label)}</small></h2>"
            f"<div class=grid>{''.join(wide[0])}{''.join(charts)}{''.join(wide[1])}</div>"
        )
    groups = {
        "benchmark": list(summary["benchmarks"]),
        "judge": [name for name in names if any(row["judge"] == name for row in samples)],
        "outcome": ["right", "wrong", "tied", "failure"],
    }
    shown = "".join(_sample(row, names) for row in samples)
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>Evaluation</title><style>{STYLE}</style></head><body><main><header class=top><h1>Evaluation</h1>"
        f"<p>{', '.join(map(escape, names))}. Click a column to sort by it.</p></header>{''.join(body)}"
        "<h2>Judgements</h2><p class=note>Right, wrong, tied and failed ones in turn, not in proportion; all are in"
        f" samples.parquet.</p>{_filters(groups)}<div class=samples>{shown}</div></main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
