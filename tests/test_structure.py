"""The package as a house: its line budget, and rules that keep each idea in one place that a reader can find."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "spct_ray"
FILES = sorted(PACKAGE.glob("**/*.py"))
BUDGET = 17_000  # lines of code and templates; lower it when the package shrinks
TOO_LONG: set[str] = set()  # still over MAX_LINES; nothing may join them
MAX_LINES = 80  # of a function
MAX_PARAMETERS = 6  # of a function, self and cls aside
MAX_EXCEPTIONS = 5  # functions with more: commands with many options, and interfaces that others define

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = [
    (f"{file.relative_to(PACKAGE)}:{node.name}", node)
    for file in FILES
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, Function)
]


def test_the_package_keeps_its_budget_of_lines():
    num_lines = sum(len(file.read_text().splitlines()) for file in [*FILES, *PACKAGE.glob("**/*.j2")])
    assert num_lines <= BUDGET, f"{num_lines} lines; merge ideas before you add more, or argue for a higher budget"


def test_no_two_files_share_a_name():
    counts = Counter(file.name for file in FILES if file.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_no_function_is_too_long():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in FUNCTIONS}
    assert {name for name, length in lengths.items() if length > MAX_LINES} <= TOO_LONG


def test_few_functions_have_many_parameters():
    many = [name for name, node in FUNCTIONS if num_parameters(node) > MAX_PARAMETERS]
    assert len(many) <= MAX_EXCEPTIONS, many


def num_parameters(node):
    arguments = node.args
    named = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(named) - (named[:1] in (["self"], ["cls"]))


def test_imports_point_down():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
