"""What a person sees of a run: on a terminal one live view of all steps, elsewhere a line for each event."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spct_ray.graph.explain import PlannedStep, format_plan
from spct_ray.graph.step import Event, format_seconds

STYLES = {"done": "green", "running": "bold cyan", "waiting": "dim", "stopped": "red"}
Say = Callable[[Event | str], None]  # shows an event, or a line that belongs to no step


@contextlib.contextmanager
def shown(planned: Sequence[PlannedStep], root: str, say: Say) -> Iterator[Say]:
    """Show the plan, and yield the function that shows what happens in the run.

    The view is live where stdout is a terminal that can move its cursor, NO_COLOR is not set, and something is left to
    run; else the plan and all events go to `say`.
    """
    console = Console()
    plain = not sys.stdout.isatty() or console.is_dumb_terminal or bool(os.environ.get("NO_COLOR"))
    if plain or all(step.state == "done" for step in planned):
        say(f"{root}\n{format_plan(planned)}")
        yield say
        return
    view = RunView(planned, root, console)
    with Live(view, console=console, refresh_per_second=4):
        try:
            yield view.say
        except BaseException:
            view.stop()
            raise


@dataclass
class _Row:
    """A step; `text` is why it will run, then how far it is."""

    state: str
    text: str
    started: float = 0.0  # of the clock
    took: str = ""
    done: int = 0
    total: int = 0
    note: str = ""


class RunView:
    """The steps as a table, and below it the last note of each step that runs."""

    def __init__(self, planned: Sequence[PlannedStep], root: str, console: Console) -> None:
        self._root, self._console = root, console
        self._rows = {s.name: _Row("done" if s.state == "done" else "waiting", s.reason) for s in planned}

    def say(self, event: Event | str) -> None:
        """Show an event in its step's row, and a line above the table."""
        if isinstance(event, str):
            self._console.print(event, markup=False, highlight=False, soft_wrap=True)
            return
        row = self._rows[event.step]
        if event.state == "running":
            row = self._rows[event.step] = _Row("running", "", time.monotonic())
        elif event.state:
            row.state, row.text, row.took = event.state, "", format_seconds(time.monotonic() - row.started)
        elif event.text:
            row.text, row.done, row.total = event.text, event.done, event.total
        row.note = event.note or row.note

    def stop(self) -> None:
        """Say of the steps that run that they were stopped."""
        for row in self._rows.values():
            row.state = "stopped" if row.state == "running" else row.state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table.grid(padding=(0, 2))
        widths = [max(map(len, self._rows)), 10, 11]
        for width in (*widths, max(10, options.max_width - sum(widths) - 2 * len(widths))):
            table.add_column(no_wrap=True, overflow="ellipsis", width=width)
        for name, row in self._rows.items():
            style, running = STYLES[row.state], row.state == "running"
            state = ProgressBar(row.total, row.done, width=10) if running and row.total else Text(row.state, style)
            took = format_seconds(time.monotonic() - row.started) if running else row.took
            table.add_row(Text(name, style), state, took, Text(row.text, style))
        yield Text(self._root, no_wrap=True, overflow="ellipsis")
        yield table
        for name, row in self._rows.items():
            if row.note and row.state in ("running", "stopped"):
                yield Text(f"{name}: {row.note}".replace("\n", " "), "dim", no_wrap=True, overflow="ellipsis")
