"""The plots of a report, drawn by matplotlib without a display, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator

from spct_ray.evaluation.results import VOTES, label

PALETTE = ("#2f6fde", "#e0662b", "#2a9d6f", "#8a94a6", "#9b5de5", "#d1495b", "#b7791f", "#0f8b8d")
INK, WRONG = "#3b4454", "#d1495b"
matplotlib.rcParams.update({
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c3c9d4",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ef",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "spct-ray",  # equal data give equal files
    "figure.constrained_layout.use": True,
})  # fmt: skip


def _svg(figure: Figure, legend_of: Axes | None = None) -> str:
    """The figure as SVG text, deterministic, with the legend of one of its axes below."""
    if legend_of is not None:
        figure.legend(*legend_of.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def colour(place: int) -> str:
    """The colour of the judge at this index; they repeat after eight."""
    return PALETTE[place % len(PALETTE)]


def score_curves(models: Mapping[str, Any], chance: float | None) -> str:
    """Official score of vote (solid), meta vote (dashed) and weighted vote (dash-dotted) over k, with 95 % bands. A
    judge that wrote nothing parsable is named, not drawn."""
    axes = (figure := Figure(figsize=(5.6, 3.9))).subplots()
    ticks: set[int] = set()
    for place, (name, model) in enumerate(models.items()):
        if not model["rates"]["parse_rate"]:
            axes.plot([], [], color=colour(place), label=f"{label(name)}: nothing parsed")
            continue
        for kind, line, marker in zip(VOTES, ("-", "--", "-."), "oDs", strict=True):
            points = sorted((int(k), entry) for k, entry in model[kind].items() if entry["ci"])
            if not points:
                continue
            x, y = [k for k, _ in points], [entry["score"] for _, entry in points]
            ticks |= set(x)
            low, high = zip(*(entry["ci"] for _, entry in points), strict=True)
            axes.fill_between(x, low, high, color=colour(place), alpha=0.12, linewidth=0)
            what = f"{label(name)}, {kind.replace('_', ' ')}"
            axes.plot(x, y, line, marker=marker, ms=4, color=colour(place), label=what)
        if model["greedy"]["score"] is not None:
            alone = None if model["vote"] else label(name)
            axes.axhline(model["greedy"]["score"], color=colour(place), lw=0.9, ls=(0, (1, 3)), label=alone)
    if chance is not None:
        axes.axhline(chance, color=INK, lw=1, ls=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)])
    axes.minorticks_off()
    axes.set(xlabel="samples k (dotted: greedy)", ylabel="official score")
    return _svg(figure, axes)


def pareto_front(points: Sequence[Mapping[str, Any]], front: Sequence[Mapping[str, Any]], axis: str) -> str:
    """Score over cost of every judge's ways to decide; the line is the Pareto front, its points are numbered."""
    labels = {
        "tokens": "generated tokens per decision",
        "flops": "FLOPs per decision (prefill and decode)",
        "seconds": "engine seconds per decision",
    }
    axes = (figure := Figure(figsize=(5.6, 3.9))).subplots()
    for place, name in enumerate(dict.fromkeys(p["judge"] for p in points)):
        mine = [p for p in points if p["judge"] == name]
        for guided, marker in ((False, "o"), (True, "D")):
            shown = [p for p in mine if p[axis] and ("meta" in p["way"]) == guided]
            axes.scatter(
                [p[axis] for p in shown], [p["score"] for p in shown], s=22, marker=marker, alpha=0.75,
                color=colour(place), label=f"{label(name)}{', with meta RM' if guided else ''}" if shown else None,
            )  # fmt: skip
    x, y = [p[axis] for p in front], [p["score"] for p in front]
    axes.step(x, y, where="post", color=INK, lw=1.1, label="Pareto front", zorder=0)
    for number, point in enumerate(front, 1):
        axes.annotate(
            str(number), (point[axis], point["score"]), textcoords="offset points", xytext=(-3, 6), fontsize=8,
            ha="right", color=INK, weight="bold",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.minorticks_off()
    axes.margins(x=0.12, y=0.12)
    axes.set(xlabel=labels[axis], ylabel="official score")
    return _svg(figure, axes)


def calibration(models: Mapping[str, Any]) -> str:
    """Left: share right over the vote's lead, five bins of equal size. Right: histogram of scores."""
    left, right = (figure := Figure(figsize=(5.6, 3.3))).subplots(1, 2)
    num = len(models)
    for place, (name, model) in enumerate(models.items()):
        bins = model["margins"]
        x, y = [b["lead"] for b in bins], [b["share_right"] for b in bins]
        if model["vote"]:  # a scalar reward model's lead is on a scale of its own
            left.plot(x, y, "-o", ms=4, color=colour(place), label=label(name))
        histogram = model["score_histogram"]
        total = max(1, sum(histogram.values()))
        bars = [histogram.get(str(s), 0) / total for s in range(11)]
        offset = (place - (num - 1) / 2) * 0.8 / num
        right.bar([s + offset for s in range(11)], bars, width=0.8 / num, color=colour(place))
    left.set(xlabel="lead of the vote, points per sample", ylabel="share right", ylim=(0, 1.02))
    left.set_title("Margin calibration")
    right.set_title("Scores given")
    right.set(xlabel="score", ylabel="share")
    right.set_xticks(range(0, 11, 2))
    right.grid(axis="x", visible=False)
    return _svg(figure, left)


def meta_reliability(models: Mapping[str, Any]) -> str:
    """Share right over the meta RM's probability, one dot per bin with area by count."""
    axes = (figure := Figure(figsize=(5.6, 3.6))).subplots()
    axes.plot([0, 1], [0, 1], ":", color=INK, lw=1)
    for place, (name, model) in enumerate(models.items()):
        bins = model.get("meta_rm", {}).get("reliability", [])
        if not bins:
            continue
        most = max(b["count"] for b in bins)
        x, y = [b["mean_probability"] for b in bins], [b["share_positive"] for b in bins]
        axes.plot(x, y, color=colour(place), lw=1.2, label=label(name))
        axes.scatter(x, y, s=[12 + 110 * b["count"] / most for b in bins], color=colour(place), alpha=0.7)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="predicted probability", ylabel="share right")
    axes.set_xticks([0.2, 0.4, 0.6, 0.8, 1.0])
    axes.legend(loc="best")
    return _svg(figure)


def training_curves(rows: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[str]], colour: str) -> str:
    """One panel per title over the training step, with those of its metrics that are in `rows` (metrics.jsonl)."""
    shown = {title: [k for k in keys if any(_is_number(r.get(k)) for r in rows)] for title, keys in panels.items()}
    shown = {title: keys for title, keys in shown.items() if keys}
    columns = min(3, max(1, len(shown)))
    num_rows = max(1, -(-len(shown) // columns))
    size = (max(5.6, 3.8 * columns), 2.5 * num_rows + 0.4)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1))
    axes_RC = figure.subplots(num_rows, columns, squeeze=False)
    for axes, (title, keys) in zip(axes_RC.flat, shown.items(), strict=False):
        for key, shade in zip(keys, (colour, INK, WRONG), strict=False):
            points = [(r.get("step", i), r[key]) for i, r in enumerate(rows) if _is_number(r.get(key))]
            x, y = np.array(points, dtype=float).T
            window = max(5, len(y) // 25) if len(y) >= 10 else 1
            padded = np.pad(y, (window // 2, (window - 1) // 2), "edge")
            smooth = np.convolve(padded, np.ones(window) / window, "valid")
            if window > 1:
                axes.plot(x, y, color=shade, alpha=0.25, linewidth=0.8)
            axes.plot(x, smooth, color=shade, linewidth=1.6, label=key.removeprefix("share_").replace("_", " "))
            if key == "loss" and min(y) > 0 and max(y) > 20 * min(y):  # else the first steps are all one sees
                axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("step")
        if len(keys) > 1:
            axes.legend(loc="best", fontsize=8)
    for axes in axes_RC.flat[len(shown) :]:
        axes.set_axis_off()
    return _svg(figure)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
