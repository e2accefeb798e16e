"""What a person sees of a run: on a terminal one live view of all steps, elsewhere a line for each thing that happens.

Both show the same lines, those of the runner and of the steps' logs; the live view sorts them by step.
"""

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
from spct_ray.graph.step import PROGRESS, format_seconds

STYLES = {"done": "green", "running": "bold cyan", "waiting": "dim", "stopped": "red"}


@contextlib.contextmanager
def shown(planned: Sequence[PlannedStep], root: str, say: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Show the plan, and yield the function that shows a line of the run.

    The view is live where stdout is a terminal that can move its cursor, NO_COLOR is not set, and something is left to
    run; else the plan and all lines go to `say`.
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
    started: float = 0.0  # of the clock, while it runs
    took: str = ""
    done: int = 0
    total: int = 0
    note: str = ""


class RunView:
    """The steps as a table, and below it the last note of each step that runs."""

    def __init__(self, planned: Sequence[PlannedStep], root: str, console: Console) -> None:
        self._root, self._console = root, console
        self._rows = {s.name: _Row("done" if s.state == "done" else "waiting", s.reason) for s in planned}

    def say(self, line: str) -> None:
        """Show a line: in its step's row, or above the table where it belongs to no step."""
        name, bracket, message = line.removeprefix("[").partition("] ")
        row = self._rows.get(name) if bracket else None
        if row is None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif message in ("starts", "resumes"):
            self._rows[name] = _Row("running", "", time.monotonic())
        elif message.startswith("done in "):
            row.state, row.text, row.took = "done", "", message.removeprefix("done in ")
        elif match := PROGRESS.fullmatch(message):
            row.done, row.total = int(match["done"]), int(match["total"])
            row.text = f"{row.done}/{row.total} {match['unit']}" + (f", {match['speed']}" if match["speed"] else "")
            row.note = match["note"] or row.note
        else:
            row.note = message

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
        notes = [
            Text(f"{name}: {row.note}", "dim", no_wrap=True, overflow="ellipsis")
            for name, row in self._rows.items()
            if row.note and row.state in ("running", "stopped")
        ]
        yield Text(self._root, no_wrap=True, overflow="ellipsis")
        yield table
        yield from notes
