"""The page of a report: one HTML file without external resources, from report.html.j2 with autoescape."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from spct_ray.evaluation.tables import Table


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
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    remarks: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Samples:
    """Judgements to show. A row has the keys of `filters`, "tags", "outcome", "badge", "query" (turns), "responses"
    ({"text", "score", "mark"}) and, if there is one, "text", the judgement."""

    rows: Sequence[Mapping[str, Any]]
    filters: Sequence[str]
    note: str


def render(
    title: str, about: Mapping[str, str], sections: Sequence[Section], samples: Samples, missing: Sequence[str] = ()
) -> str:
    """The page as HTML."""
    # StrictUndefined: a misspelt name is an error, not an empty cell.
    environment = Environment(
        loader=PackageLoader("spct_ray.evaluation", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        about=about,
        sections=sections,
        samples=samples.rows,
        filters={key: sorted({str(row[key]) for row in samples.rows}) for key in samples.filters},
        missing=missing,
        samples_note=samples.note,
    )
