"""The commands that README and docs show exist: make targets, subcommands with their arguments, files."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from spct_ray.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^\$? ?((?:\.venv/bin/)?(?:make|spct|ray job submit)\b[^\n]*)$", re.MULTILINE)


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```[a-z]*\n(.*?)```", page.read_text(), re.DOTALL):
            lines = COMMAND.findall(block.replace("\\\n", " "))
            found += [line.split("  #")[0].split(" #")[0].strip() for line in lines]
    return sorted(set(found))


def test_there_are_commands_to_check():
    assert {"make demo", "make test"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_command_of_the_docs_is_one(command):
    words = shlex.split(command.replace("[key=value ...]", ""))
    if words[0] == "make":
        run = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    elif words[0] == "ray":
        script, *arguments = words[words.index("python") + 1 :]
        assert (ROOT / script).is_file()
        assert all((ROOT / word).exists() for word in arguments if word.startswith("conf/"))
    else:
        spct = typer.main.get_command(app)
        name, command, arguments = spct.resolve_command(spct.make_context("spct", words[1:]), words[1:])
        command.make_context(name, arguments)  # raises where an argument is none of the command's
        for word in words[2:]:
            assert (ROOT / word).is_file() or not word.startswith("conf/"), f"{word} does not exist"


def test_every_file_that_the_readme_links_or_lists_exists():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"^  (\w+/)  ", text, re.MULTILINE):
        assert (ROOT / "spct_ray" / folder).is_dir(), folder


def test_the_readme_shows_every_subcommand_and_every_step():
    text = (ROOT / "README.md").read_text()
    names = list(typer.main.get_command(app).commands)
    assert len(names) >= 6
    for name in names:
        assert re.search(rf"^spct {name}\b", text, re.MULTILINE), name
    for step in (
        "items",
        "student",
        "sample",
        "select",
        "rft",
        "grpo",
        "onpolicy, meta",
        "evaluate, meta_scores, report",
    ):
        assert f"\n| {step} |" in text, step
