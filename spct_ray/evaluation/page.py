"""The report as one HTML file without external resources. Everything that came from data or models is escaped.

Leaves out the numbers (`spct_ray.evaluation.curves`) and the plots (`spct_ray.evaluation.plots`).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from spct_ray.evaluation.style import SCRIPT, STYLE
from spct_ray.evaluation.terminal import LABELS
from spct_ray.records import Item, Trajectory


@dataclass(frozen=True, slots=True)
class Chart:
    """One plot with its caption; `wide` ones take the whole row."""

    title: str
    caption: str
    svg: str
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One judgement to show. `outcome` is "right", "wrong", "tied" or a failure's name."""

    model: str
    item: Item
    judgement: Trajectory
    outcome: str


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A table of HTML cells: the first column is text, the others are numbers."""
    cells = "".join(f"<tr><th scope=row>{r[0]}</th>{''.join(f'<td>{c}</td>' for c in r[1:])}</tr>" for r in rows)
    titles = "".join(f"<th scope=col>{escape(h)}</th>" for h in head)
    note = f"<p class=note>{caption}</p>" if caption else ""
    table = f"<table class=sortable><thead><tr>{titles}</tr></thead><tbody>{cells}</tbody></table>"
    return f"<div class=scroll>{table}</div>{note}"


def _bars(values: Mapping[str, float], unit: str = "") -> str:
    """Names, numbers and bars relative to the largest."""
    largest = max(values.values(), default=0) or 1
    rows = [
        (
            escape(name.replace("_", " ")),
            f"{_number(value)}{unit}",
            f"<span class=bar style='width:{max(0.0, 100 * value / largest):.1f}%'></span>",
        )
        for name, value in values.items()
    ]
    body = "".join(f"<tr><th scope=row>{n}</th><td>{v}</td><td class=barcell>{b}</td></tr>" for n, v, b in rows)
    return f"<table class=bars><tbody>{body}</tbody></table>"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}&thinsp;%"


def _accuracy(entry: Mapping[str, Any] | None) -> str:
    if not entry:
        return "–"
    low, high = entry["ci"]
    return f"<b>{100 * entry['accuracy']:.1f}</b> <i>{100 * low:.1f}–{100 * high:.1f}</i>"


def _dot(name: str) -> str:
    return f"<span class='dot {name}'></span>{LABELS[name]}"


def _headline(block: Mapping[str, Any]) -> str:
    models, ks = block["models"], sorted({int(k) for m in block["models"].values() for k in m["vote"]})
    top = [k for k in ks[-1:] if k > 1]  # of guided votes the curves show the rest, and the table fits a screen
    guided = {"meta": "meta_vote", "weighted": "weighted_vote"}
    head = ["judge", "greedy", *(f"vote@{k}" for k in ks), *(f"{way}@{k}" for way in guided for k in top)]
    rows = [
        [
            _dot(name),
            _accuracy(m["greedy"]),
            *(_accuracy(m["vote"].get(str(k))) for k in ks),
            *(_accuracy(m[key].get(str(k))) for key in guided.values() for k in top),
        ]
        for name, m in models.items()
    ]
    caption = (
        f"Accuracy in % with 95&thinsp;% bootstrap intervals over {block['num_items']:,} items; chance is "
        f"{_percent(block['chance'])}. vote@1 is one sample. An item without any parsed judgement counts as wrong, a "
        "tie of m as 1/m. By the meta RM, meta@k sums the best of the k judgements, weighted@k all of them, each times "
        "-log of its chance to be wrong."
    )
    return _table(head, rows, caption)


def _rates(block: Mapping[str, Any]) -> str:
    names = ("parse_rate", "tie_rate", "correct_rate", "position_consistency")
    head = ["judge", "parsed", "ties", "right (Eq. 10)", "position consistency", "tokens a judgement"]
    rows = [
        [_dot(name), *(_percent(m[key]) for key in names), f"{m['tokens_per_judgement']:.0f}"]
        for name, m in block["models"].items()
    ]
    return _table(
        head,
        rows,
        "Shares of single samples. Ties: the highest score is shared (n ≥ 2). Position consistency: of two "
        "parsed greedy judgements (or samples, where there is one order) of one item that saw different orders, how "
        "often the same responses win.",
    )


def _paired(paired: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            escape(name),
            f"<b>{100 * d['difference']:+.1f}</b>",
            f"{100 * d['ci'][0]:+.1f} … {100 * d['ci'][1]:+.1f}",
            f"{d['p_value']:.3f}",
        ]
        for name, d in paired.items()
    ]
    caption = "Percentage points on the same items; p by random sign flips."
    return _table(["comparison", "difference", "95 % interval", "p"], rows, caption)


def _failures(models: Mapping[str, Any]) -> str:
    names = sorted({f for m in models.values() for f in m["failures"]})
    if not names:
        return "<p>Every judgement could be parsed.</p>"
    rows = [[escape(f.replace("_", " ")), *(f"{m['failures'].get(f, 0):,}" for m in models.values())] for f in names]
    return _table(["reason", *(LABELS[m] for m in models)], rows, "Sampled judgements without scores, by reason.")


def _subsets(models: Mapping[str, Any], k_max: int) -> str:
    first = next(iter(models.values()))["by_subset"]
    rows = [
        [escape(s), f"{entry['num_items']:,}", *(_accuracy(m["by_subset"][s]) for m in models.values())]
        for s, entry in first.items()
    ]
    return _table(["subset", "items", *(LABELS[m] for m in models)], rows, f"Accuracy in % of vote@{k_max}.")


def _sample(sample: Sample) -> str:
    item, judged = sample.item, sample.judgement
    kind = sample.outcome if sample.outcome in ("right", "wrong", "tied") else "failure"
    responses = []
    for place, index in enumerate(judged.order, 1):
        score = f"{judged.scores[index]}" if judged.scores else "–"
        if len(item.responses) > 1:
            truth = "<em class=best>best</em>" if index == item.best else ""
        else:
            truth = f"<em class=best>truth: {'right' if item.rewards[0] > 0.5 else 'wrong'}</em>"
        text = f"<pre>{escape(item.responses[index])}</pre>"
        responses.append(f"<li><header>Response {place} {truth}<b>{score}</b></header>{text}</li>")
    turns = "".join(
        f"<pre class=query>{escape(m.content if len(item.messages) == 1 else f'{m.role}: {m.content}')}</pre>"
        for m in item.messages
    )
    tags = "".join(f"<span class=tag>{escape(t)}</span>" for t in (item.subset, f"n = {len(item.responses)}") if t)
    return (
        f"<article class=sample data-model='{sample.model}' data-outcome='{kind}'><header>{_dot(sample.model)}{tags}"
        f"<span class='badge {kind}'>{escape(sample.outcome.replace('_', ' '))}</span></header>{turns}"
        f"<ol>{''.join(responses)}</ol><h4>Judgement</h4><pre>{escape(judged.text) or '(empty)'}</pre></article>"
    )


def _filters(samples: Sequence[Sample]) -> str:
    def group(key: str, names: Sequence[tuple[str, str]], chosen: str) -> str:
        buttons = "".join(
            f"<button type=button data-{key}='{value}' aria-pressed={'true' if value == chosen else 'false'}>{text}"
            "</button>"
            for value, text in (("", "all"), *names)
        )
        return f"<span class=group data-key={key}>{buttons}</span>"

    models = list(dict.fromkeys(s.model for s in samples))
    outcomes = [(o, o) for o in ("right", "wrong", "tied", "failure")]
    by_model = group("model", [(m, LABELS[m]) for m in models], models[-1] if models else "")
    return f"<p class=filters>{by_model}{group('outcome', outcomes, '')}</p>"


def _cards(summary: Mapping[str, Any], k_max: int) -> str:
    name, best = list(summary["models"].items())[-1]
    vote, auc = best["vote"][str(k_max)], summary["meta_rm"]["auc_without_ties"]
    facts = [
        (f"{LABELS[name]}, vote@{k_max}", _percent(vote["accuracy"]), f"chance {_percent(summary['chance'])}"),
        ("parsed judgements", _percent(best["parse_rate"]), f"{best['tokens_per_judgement']:.0f} tokens each"),
        ("position consistency", _percent(best["position_consistency"]), "same winner in another order"),
    ]
    if (meta := best["meta_vote"].get(str(k_max))) is not None:
        facts.insert(1, (f"{LABELS[name]}, meta vote@{k_max}", _percent(meta["accuracy"]), "guided by the meta RM"))
    if auc is not None:
        facts.append(("meta-RM AUC", f"{auc:.3f}", "judgements without a tie"))
    return "".join(f"<div class=card><span>{a}</span><strong>{b}</strong><small>{c}</small></div>" for a, b, c in facts)


def _habits(found: Mapping[str, Mapping[str, float | None]]) -> str:
    rows = [
        [escape(habit), *("–" if (value := by_habit[habit]) is None else f"{value:.2f}" for by_habit in found.values())]
        for habit in next(iter(found.values()))
    ]
    return _table(["a judgement", *(LABELS[name] for name in found)], rows, "Means and shares over parsed samples.")


def _panel(title: str, body: str, wide: bool = False) -> str:
    return f"<section class='panel{' wide' if wide else ''}'><h3>{escape(title)}</h3>{body}</section>"


def render(
    summary: Mapping[str, Any], charts: Sequence[Chart], selection: Mapping[str, float], samples: Sequence[Sample]
) -> str:
    """The page; `summary` is summary.json's content, `selection` counts of the cold start by reason (may be empty)."""
    models = summary["models"]
    k_max = max(int(k) for m in models.values() for k in m["vote"])
    drawn = [
        _panel(
            c.title,
            f"<img alt='{escape(c.title)}' src='data:image/svg+xml;base64,"
            f"{base64.b64encode(c.svg.encode()).decode()}'><p class=note>{escape(c.caption)}</p>",
            c.wide,
        )
        for c in charts
    ]
    left = _panel("Failed judgements", _failures(models))
    if summary["seconds"]:
        left += _panel("Seconds by step", _bars(summary["seconds"], "&thinsp;s"))
    right = _panel("Selection for the cold start", _bars(selection)) if selection else ""
    tables = [_panel("Is the difference real?", _paired(summary["paired"])), f"<div>{left}</div><div>{right}</div>"]
    benchmarks = "".join(
        _panel(f"Benchmark: {name}", _headline(block) + _rates(block), wide=True)
        for name, block in summary["benchmarks"].items()
    )
    missing = "".join(f"<li>{escape(what)}</li>" for what in summary["missing"])
    shown = f"{_filters(samples)}<div class=samples>{''.join(map(_sample, samples))}</div>"
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>Judge report</title><style>{STYLE}</style></head><body><main>"
        "<header class=top><h1>Judge report</h1><p>Held-out items judged by each stage of self-principled critique "
        f"tuning: {', '.join(LABELS[m] for m in models)}.</p></header>"
        + (f"<ul class=missing>{missing}</ul>" if missing else "")
        + f"<div class=cards>{_cards(summary, k_max)}</div><div class=grid>"
        + _panel("Accuracy", _headline(summary), wide=True)
        + _panel("How the samples behave", _rates(summary), wide=True)
        + (_panel("What judges do", _habits(summary["habits"])) if summary["habits"] else "")
        + "".join(drawn)
        + "".join(tables)
        + _panel("By kind of item", _subsets(models, k_max), wide=True)
        + benchmarks
        + "</div><h2>Judgements</h2><p class=note>First samples of items drawn by the seed, so that right, wrong, "
        "tied and failed ones of the last judge take turns: not in proportion. Responses stand in the order in which "
        f"the judge saw them.</p>{shown}</main><script>{SCRIPT}</script></body></html>\n"
    )
