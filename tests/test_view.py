"""What a run shows: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from spct_ray.graph.explain import PlannedStep
from spct_ray.graph.step import Event, StepContext
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
    view.say(Event("sample", text="starts", state="running"))
    view.say(Event("sample", "reading 40 items"))
    before = render(view)
    speed = "12/160 judgements, 3.2/s, 46 s left"
    view.say(Event("sample", "210 tok/s, unparsable 1.0%", speed, done=12, total=160))
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
    view.say(Event("sample", text="done in 0 s", state="done"))
    view.say(Event("rft", text="resumes", state="running"))
    view.stop()
    text = render(view)
    assert re.search(r"^sample +done +0 s *$", text, re.M)
    assert re.search(r"^rft +stopped", text, re.M)


def test_events_are_a_line_of_the_log_each_and_whole_for_the_driver(tmp_path: Path) -> None:
    context = StepContext("rft", 0, "", {}, "", str(tmp_path / "rft.log"))
    context.progress(0, 100, "steps", "loss 0.5; tie")
    context.progress(100, 100, "steps")
    context.log("two\nlines")
    events = [Event(**json.loads(line)) for line in Path(context.events_file).read_text().splitlines()]
    assert events[0] == Event("rft", "loss 0.5; tie", "0/100 steps", done=0, total=100)
    assert (events[1].done, events[1].note) == (100, "")
    assert events[2:] == [Event("rft", "two"), Event("rft", "lines")]
    assert Path(context.log_file).read_text().splitlines() == list(map(str, events))
    assert str(events[0]) == "[rft] 0/100 steps; loss 0.5; tie"


def test_elsewhere_all_lines_are_plain() -> None:
    said: list[Event | str] = []
    with shown(PLANNED, "/r", said.append) as say:
        say(Event("sample", text="starts", state="running"))
    assert str(said[0]).startswith("/r\n  items   done\n  sample  run     never ran\n")
    assert list(map(str, said[1:])) == ["[sample] starts"]


@pytest.mark.parametrize(("settings", "live"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_a_terminal_gets_the_live_view_unless_it_asks_for_plain_text(settings: dict[str, str], live: bool) -> None:
    code = (
        "from test_view import Event, PLANNED, shown\nwith shown(PLANNED, '/r', print) as say:\n"
        " say(Event('sample', text='starts', state='running'))\n"
        " say(Event('sample', text='1/2 parts', done=1, total=2))\n"
        " say(Event('sample', text='done in 1 s', state='done'))\n"
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
    assert (b"done in 1 s" in out) == (not live)
    assert b"sample" in out
