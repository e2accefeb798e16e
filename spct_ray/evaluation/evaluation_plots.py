"""The plots of an evaluation's page: score over samples, score over compute with the Pareto front, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator

from spct_ray.evaluation.plots import INK, RC, new_figure, to_svg

PALETTE = ("#2f6fde", "#e0662b", "#2a9d6f", "#8a94a6", "#9b5de5", "#d1495b", "#b7791f", "#0f8b8d")


def colour(place: int) -> str:
    """Of the judge at this place; colours repeat after eight."""
    return PALETTE[place % len(PALETTE)]


def score_curves(models: Mapping[str, Any], chance: float | None) -> str:
    """Official score of vote (solid) and meta vote (dashed) over k, with 95 % bands."""
    with plt.rc_context(RC):
        figure, (axes,) = new_figure(5.6, 3.9)
        ticks: set[int] = set()
        for place, (name, model) in enumerate(models.items()):
            for kind, line, marker in (("vote", "-", "o"), ("meta_vote", "--", "D")):
                points = sorted((int(k), made) for k, made in model[kind].items() if made["score"] is not None)
                if not points:
                    continue
                x = [k for k, _ in points]
                ticks |= set(x)
                low, high = zip(*(made["ci"] for _, made in points), strict=True)
                axes.fill_between(x, low, high, color=colour(place), alpha=0.12, linewidth=0)
                label = f"{name}, {'vote' if kind == 'vote' else 'meta vote'}"
                axes.plot(
                    x,
                    [made["score"] for _, made in points],
                    line,
                    marker=marker,
                    ms=4,
                    color=colour(place),
                    label=label,
                )
            if model["greedy"]["score"] is not None:
                scalar = name if not model["vote"] else None
                axes.axhline(model["greedy"]["score"], color=colour(place), lw=0.9, ls=(0, (1, 3)), label=scalar)
        if chance is not None:
            axes.axhline(chance, color=INK, lw=1, ls=":", label="chance")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), [str(k) for k in sorted(ticks)])
        axes.minorticks_off()
        axes.set(xlabel="samples k (thin dotted: greedy)", ylabel="official score")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return to_svg(figure)


def pareto_front(points: Sequence[Mapping[str, Any]], front: Sequence[Mapping[str, Any]], axis: str) -> str:
    """Every way to decide of every judge, its score over what it costs; the front is the line, its points numbered."""
    labels = {
        "tokens": "generated tokens a decision",
        "flops": "FLOPs a decision (prefill and decode)",
        "seconds": "engine seconds a decision",
    }
    with plt.rc_context(RC):
        figure, (axes,) = new_figure(5.6, 3.9)
        for place, name in enumerate(dict.fromkeys(p["judge"] for p in points)):
            mine = [p for p in points if p["judge"] == name]
            for guided, marker in ((False, "o"), (True, "D")):
                shown = [p for p in mine if p[axis] and ("meta" in p["way"]) == guided]
                axes.scatter(
                    [p[axis] for p in shown], [p["score"] for p in shown], s=22, marker=marker, alpha=0.75,
                    color=colour(place), label=f"{name}{', with meta RM' if guided else ''}" if shown else None,
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
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return to_svg(figure)


def calibration(models: Mapping[str, Any]) -> str:
    """Left: share right over the vote's lead, five bins of equal size. Right: the scores that were given."""
    with plt.rc_context(RC):
        figure, (left, right) = new_figure(5.6, 3.3, 2)
        num = len(models)
        for place, (name, model) in enumerate(models.items()):
            bins = model["margins"]
            x, y = [b["lead"] for b in bins], [b["share_right"] for b in bins]
            if model["vote"]:  # a scalar reward model's lead is on a scale of its own
                left.plot(x, y, "-o", ms=4, color=colour(place), label=name)
            histogram = model["score_histogram"]
            total = max(1, sum(histogram.values()))
            bars = [histogram.get(str(s), 0) / total for s in range(11)]
            offset = (place - (num - 1) / 2) * 0.8 / num
            right.bar([s + offset for s in range(11)], bars, width=0.8 / num, color=colour(place))
        left.set(xlabel="lead of the vote, points a sample", ylabel="share right", ylim=(0, 1.02))
        left.set_title("Margin calibration")
        right.set_title("Scores given")
        right.set(xlabel="score", ylabel="share")
        right.set_xticks(range(0, 11, 2))
        right.grid(axis="x", visible=False)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return to_svg(figure)


def meta_reliability(models: Mapping[str, Any]) -> str:
    """Share right over the meta RM's probability, a dot a bin, area by count."""
    with plt.rc_context(RC):
        figure, (axes,) = new_figure(5.6, 3.6)
        axes.plot([0, 1], [0, 1], ":", color=INK, lw=1)
        for place, (name, model) in enumerate(models.items()):
            bins = model.get("meta_rm", {}).get("reliability", [])
            if not bins:
                continue
            most = max(b["count"] for b in bins)
            x, y = [b["mean_probability"] for b in bins], [b["share_positive"] for b in bins]
            axes.plot(x, y, color=colour(place), lw=1.2, label=name)
            axes.scatter(x, y, s=[12 + 110 * b["count"] / most for b in bins], color=colour(place), alpha=0.7)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="predicted probability", ylabel="share right")
        axes.set_xticks([0.2, 0.4, 0.6, 0.8, 1.0])
        axes.legend(loc="best")
        return to_svg(figure)
