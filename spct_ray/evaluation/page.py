"""The page of a report: one HTML file without external resources, from report.html.j2 with autoescape."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from spct_ray.evaluation import plots, tables
from spct_ray.evaluation.tables import Table

GRPO_PANELS = {
    "Reward": ("reward",),
    "Share of rollouts": ("share_correct", "share_tied", "share_unparsable"),
    "Groups without signal": ("zero_signal_groups",),
    "KL to the RFT judge": ("kl",),
    "Entropy of sampled tokens": ("entropy",),
    "Tokens per judgement": ("completion_tokens_mean",),
}
COSTS = {
    "tokens": "written tokens; the meta RM reads but writes none",
    "flops": "2 × weights × tokens, read and written",
    "seconds": "of the engine as measured, without the meta RM's",
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot with title and note; a `wide` one takes the whole row."""

    title: str
    note: str
    svg: str
    wide: bool = False

    @property
    def data(self) -> str:
        """The plot in base64."""
        return base64.b64encode(self.svg.encode()).decode()


@dataclass(frozen=True, slots=True)
class Section:
    """Tables and charts under one title; the first two tables precede the charts, the others are folded away."""

    title: str
    tables: Sequence[Table]
    charts: Sequence[Chart] = ()
    remarks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Samples:
    """Judgements to show. A row has the keys of `filters`, "tags", "outcome", "badge", "query" (turns), "responses"
    ({"text", "score", "mark"}) and, if there is one, "text", the judgement."""

    rows: Sequence[Mapping[str, Any]]
    filters: Sequence[str]
    note: str


def of_benchmark(name: str, block: Mapping[str, Any], ks: Sequence[int]) -> Section:
    """All of one benchmark."""
    models = block["models"]
    charts = [
        Chart(
            "Score over samples", "Bands: 95 % intervals over questions and draws of k samples.",
            plots.score_curves(models, block["chance"]),
        ),
        Chart("Margins and scores", "Is a vote that leads by more more often right?", plots.calibration(models)),
    ]  # fmt: skip
    for axis, what in COSTS.items():
        if front := block["pareto"][axis]:
            told = "; ".join(f"{number}: {point['judge']}, {point['way']}" for number, point in enumerate(front, 1))
            svg = plots.pareto_front(block["points"], front, axis)
            charts.append(Chart(f"Score over {axis}", f"Cost: {what}. Pareto front: {told}.", svg))
    if any(m.get("meta_rm", {}).get("reliability") for m in models.values()):
        note = "Share right over the predicted probability."
        charts.append(Chart("Meta RM: reliability", note, plots.meta_reliability(models)))
    found = tables.of_benchmark(name, block, ks)
    return Section(tables.title_of(name, block), found, charts, tables.remarks(block, ks))


def of_training(grpo: Sequence[Mapping[str, Any]], rft: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The curves of the training steps that have any, by their metrics.jsonl."""
    charts = []
    if grpo:
        rows = [
            {**row, "share_unparsable": sum(v for k, v in row.items() if k.startswith("share_unparsable_"))}
            for row in grpo
        ]
        svg = plots.training_curves(rows, GRPO_PANELS, plots.colour(2))
        charts.append(Chart("GRPO", "Each step's value, and its running mean.", svg, wide=True))
    if rft:
        svg = plots.training_curves(rft, {"Loss": ("loss",)}, plots.colour(1))
        charts.append(Chart("Rejective fine-tuning", "Loss per judgement token, and its running mean.", svg))
    return charts


def render(
    title: str, about: Mapping[str, str], sections: Sequence[Section], samples: Samples, missing: Sequence[str] = ()
) -> str:
    """The page as HTML."""
    # StrictUndefined: a misspelt name is an error, not an empty cell.
    environment = Environment(
        loader=PackageLoader("spct_ray.evaluation", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    filters = {key: sorted({str(row[key]) for row in samples.rows}) for key in samples.filters}
    return environment.get_template("report.html.j2").render(
        title=title, about=about, sections=sections, samples=samples, filters=filters, missing=missing
    )
