"""What a run shows: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from spct_ray.graph.explain import PlannedStep
from spct_ray.graph.step import PROGRESS, StepContext
from spct_ray.graph.view import RunView, shown

PLANNED = [
    PlannedStep("items", "done", "", "/r/steps/items-1"),
    PlannedStep("sample", "run", "never ran", "/r/steps/sample-1"),
    PlannedStep("rft", "resume", "started but not finished; because rft.optim.lr changed from 0.001 to 0.002", "/r/x"),
]


def render(view: RunView, width: int = 80) -> str:
    console = Console(record=True, force_terminal=True, width=width, file=io.StringIO())
    console.print(view)
    return console.export_text()


def test_the_live_view_shows_state_progress_speed_and_the_last_note_within_80_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = RunView(PLANNED, "/r", Console())
    view.say("dashboard: http://127.0.0.1:8265")
    view.say("[sample] starts")
    view.say("[sample] reading 40 items")
    before = render(view)
    view.say("[sample] 12/160 judgements, 3.2/s, 46 s left; 210 tok/s, unparsable 1.0%")
    text = render(view)
    assert capsys.readouterr().out == "dashboard: http://127.0.0.1:8265\n"
    assert re.search(r"^items +done", text, re.M)
    assert re.search(r"^sample +running +0 s", before, re.M)
    assert re.search(r"^sample +[━╸]+ +0 s +12/160 judgements, 3\.2/s, 46 s left *$", text, re.M)
    assert re.search(r"^rft +waiting +started but not finished", text, re.M)
    assert "sample: reading 40 items" in before
    assert "sample: 210 tok/s, unparsable 1.0%" in text
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) == 5  # nothing wraps
    view.say("[sample] done in 50 s")
    view.say("[rft] resumes")
    view.stop()
    text = render(view)
    assert re.search(r"^sample +done +50 s *$", text, re.M)
    assert re.search(r"^rft +stopped", text, re.M)


def test_progress_lines_are_read_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    context = StepContext("rft", 0, "", {}, "")
    context.progress(0, 100, "steps", "loss 0.5; tie")
    context.progress(100, 100, "steps")
    first, last = (PROGRESS.fullmatch(line.removeprefix("[rft] ")) for line in capsys.readouterr().out.splitlines())
    assert first is not None
    assert last is not None
    assert first.group("done", "total", "unit", "note") == ("0", "100", "steps", "loss 0.5; tie")
    assert last.group("done", "speed", "note") == ("100", None, None)


def test_elsewhere_all_lines_are_plain() -> None:
    said: list[str] = []
    with shown(PLANNED, "/r", said.append) as say:
        say("[sample] starts")
    assert said[0].startswith("/r\n  items   done\n  sample  run     never ran\n")
    assert said[1:] == ["[sample] starts"]


@pytest.mark.parametrize(("settings", "live"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_a_terminal_gets_the_live_view_unless_it_asks_for_plain_text(settings: dict[str, str], live: bool) -> None:
    code = (
        "from test_view import PLANNED, shown\nwith shown(PLANNED, '/r', print) as say:\n say('[sample] starts')\n"
        " say('[sample] 1/2 parts')\n say('[sample] done in 1 s')\n"
    )
    own, other = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | {"TERM": "xterm"} | settings
    run = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, stdout=other)
    os.close(other)
    out = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody has the other end any more
        while part := os.read(own, 4096):
            out += part
    assert run.wait() == 0
    assert (b"\x1b[" in out) == live
    assert (b"[sample] 1/2 parts" in out) == (not live)
    assert b"1 s" in out
