"""The report's plots, drawn by matplotlib without a display and returned as SVG text.

Leaves out where the numbers come from (`spct_ray.evaluation.curves`, the steps' metrics) and the page around the plots
(`spct_ray.evaluation.page`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spct_ray.evaluation.terminal import LABELS

COLOURS = {"base": "#8a94a6", "rft": "#2f6fde", "grpo": "#e0662b"}
RIGHT, WRONG, INK, _GRID = "#2a9d6f", "#d1495b", "#3b4454", "#e6e9ef"
RC = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c3c9d4",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
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
}


def to_svg(figure: Figure) -> str:
    """The figure as SVG text, equal for equal data; closes it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def new_figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of one row of axes; sizes in inches."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, **options)
    return figure, list(axes[0])


def accuracy_curves(models: Mapping[str, Mapping[str, Any]], chance: float, over_tokens: bool) -> str:
    """Accuracy of vote (solid), meta vote (dashed) and weighted vote (dash-dotted) over k, or over the tokens written
    per decision, with 95 % bands.

    `models` has the shape of summary.json's "models". A model that wrote nothing parsable is named, not drawn.
    """
    with plt.rc_context(RC):
        figure, (axes,) = new_figure(5.6, 3.9)
        last_x: list[float] = []
        for name, block in models.items():
            if not block["parse_rate"]:
                axes.plot([], [], color=COLOURS[name], label=f"{LABELS[name]}: nothing parsed")
                continue
            for kind, line, marker in (("vote", "-", "o"), ("meta_vote", "--", "D"), ("weighted_vote", "-.", "s")):
                points = sorted((int(k), entry) for k, entry in block[kind].items())
                if not points:
                    continue
                x = [entry["tokens"] if over_tokens else k for k, entry in points]
                last_x = x
                low, high = zip(*(entry["ci"] for _, entry in points), strict=True)
                label = f"{LABELS[name]}, {kind.replace('_', ' ')}"
                y = [entry["accuracy"] for _, entry in points]
                axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.13, linewidth=0)
                axes.plot(
                    x, y, line, marker=marker, markersize=4 if kind == "vote" else 5.5, color=COLOURS[name], label=label
                )
            if over_tokens and (greedy := block["greedy"]):
                axes.plot(
                    greedy["tokens"], greedy["accuracy"], "*", markersize=12, color=COLOURS[name], mec=INK, zorder=5
                )
        axes.axhline(chance, color=INK, linewidth=1, linestyle=":", label="chance")
        if over_tokens:
            axes.plot([], [], "*", color=INK, markersize=9, label="greedy")
        axes.set_xscale("log", base=2)
        axes.set_xticks(last_x, [f"{x:,.0f}" for x in last_x])
        axes.minorticks_off()
        axes.margins(x=0.06)
        axes.set_xlabel("generated tokens per decision" if over_tokens else "samples k")
        axes.set_ylabel("accuracy")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return to_svg(figure)


def training_curves(rows: Sequence[Mapping[str, Any]], panels: Mapping[str, Sequence[str]], colour: str) -> str:
    """One panel a title, over the training step; each draws those of its metrics that `rows` (metrics.jsonl) have."""
    shown = {title: [k for k in keys if any(_is_number(r.get(k)) for r in rows)] for title, keys in panels.items()}
    shown = {title: keys for title, keys in shown.items() if keys}
    columns = min(3, max(1, len(shown)))
    num_rows = max(1, -(-len(shown) // columns))
    with plt.rc_context(RC):
        figure, axes_RC = plt.subplots(
            num_rows, columns, figsize=(max(5.6, 3.8 * columns), 2.5 * num_rows + 0.4), squeeze=False
        )
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
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
        return to_svg(figure)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def score_histograms(histograms: Mapping[str, Mapping[str, int]]) -> str:
    """Share of each score among the parsed samples with n >= 2, a panel a model."""
    with plt.rc_context(RC):
        figure, all_axes = new_figure(5.6, 3.0, max(1, len(histograms)), sharey=True)
        for axes, (name, histogram) in zip(all_axes, histograms.items(), strict=False):
            total = max(1, sum(histogram.values()))
            axes.bar(range(1, 11), [histogram.get(str(s), 0) / total for s in range(1, 11)], color=COLOURS[name])
            axes.set_title(LABELS[name])
            axes.set_xticks([1, 4, 7, 10])
            axes.set_xlim(0.3, 10.7)
            axes.grid(axis="x", visible=False)
        all_axes[0].set_ylabel("share of scores")
        figure.supxlabel("score", fontsize=10, color=INK)
        return to_svg(figure)


def meta_reliability(
    bins: Sequence[Mapping[str, float]], right_logits: Sequence[float], wrong_logits: Sequence[float]
) -> str:
    """Left: predicted probability against share right, a dot a bin, area by count. Right: logits by outcome."""
    with plt.rc_context(RC):
        figure, (left, right) = new_figure(5.6, 3.2, 2)
        left.plot([0, 1], [0, 1], ":", color=INK, linewidth=1)
        largest = max((b["count"] for b in bins), default=1)
        x, y = [b["mean_probability"] for b in bins], [b["share_positive"] for b in bins]
        left.plot(x, y, color=COLOURS["grpo"], linewidth=1.2)
        left.scatter(x, y, s=[12 + 110 * b["count"] / largest for b in bins], color=COLOURS["grpo"], alpha=0.75)
        left.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="predicted probability", ylabel="share right")
        left.set_xticks([0.2, 0.4, 0.6, 0.8, 1.0])
        left.set_title("Reliability")
        if joined := [*right_logits, *wrong_logits]:
            edges = np.linspace(min(joined), max(joined) + 1e-6, 31).tolist()
            right.hist(right_logits, edges, color=RIGHT, alpha=0.6, label="right")
            right.hist(wrong_logits, edges, color=WRONG, alpha=0.6, label="wrong")
        right.set_title("Logits by outcome")
        right.set(xlabel="meta-RM logit", ylabel="samples")
        right.legend(loc="best")
        return to_svg(figure)
