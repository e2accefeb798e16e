"""The command `spct`: run a job graph, say what a run would do, evaluate and compare judges, serve a run.

Importing this file, `spct --help` and `spct plan` load neither torch, Ray nor vLLM.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spct_ray.cluster import session
from spct_ray.cluster.session import ClusterResources
from spct_ray.config import load, override
from spct_ray.errors import ConfigError, SpctError
from spct_ray.graph.explain import format_plan, link_reused, plan
from spct_ray.graph.lock import hold, holder, is_held
from spct_ray.graph.record import local_root, read_record, write_atomically
from spct_ray.graph.room import check as check_steps
from spct_ray.graph.room import placed
from spct_ray.graph.step import Step, steps_until

if TYPE_CHECKING:
    from spct_ray.stages.recipe import Recipe

REPORT_FILES = ("index.html", "summary.json", "samples.parquet", "pairs.parquet")

_EVALUATE_OPTIONS = (
    "benchmarks",
    "k",
    "suite",
    "limit",
    "temperature",
    "seed",
    "root",
    "config",
    "model",
    "api_key_env",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spct`. Returns the exit status: 0 fine, 2 an error meant to be read, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parsed = _parser().parse_args(arguments)
    return guarded(lambda: parsed.handler(parsed), shlex.join(["spct", *arguments]))


def guarded(command_function: Any, command: str) -> int:
    """Call the function; turn an error meant for a person, or an interrupt, into a message and an exit status."""
    try:
        command_function()
    except SpctError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; finished work is kept, the same command goes on: {command}", file=sys.stderr)
        return 130
    return 0


def run(config_path: str, overrides: Sequence[str], command: str, until: Sequence[str] = ()) -> None:
    """Run the graph of a configuration file to its end, or to the steps `until`, and publish its report.

    Shared with jobs/pipeline.py."""
    from spct_ray.stages.plan_check import check

    recipe, steps, root = load_graph(config_path, overrides, until)
    check(recipe)
    run_graph(steps, root, recipe.seed, recipe.resources.cluster, command, recipe.reuse)


def run_graph(
    steps: Sequence[Step], root: str, seed: int, cluster: ClusterResources, command: str, reuse: str = ""
) -> None:
    """Alone on the root: print the plan, run what is done neither here nor under the root `reuse` (Ray is not started
    for nothing), print the results."""
    with hold(os.path.join(root, ".lock"), command, _say):
        planned = plan(steps, root, seed, reuse)
        _say(f"{root}\n{format_plan(planned)}")
        link_reused(planned, root)
        if any(step.state != "done" for step in planned):
            from spct_ray.graph.runner import run_steps  # imports Ray

            with session.start(cluster):
                signal.signal(signal.SIGTERM, _interrupt)  # after ray.init, which sets its own
                left = {step.name for step in planned if step.state != "done"}
                nodes = session.nodes()
                steps = [placed(step, nodes) for step in steps]
                with session.waiting_for_room(cluster, _say):
                    check_steps([step for step in steps if step.name in left], nodes)
                run_steps(steps, root, seed, command, _say)
        _publish(steps, {s.name: s.directory for s in planned}, root)


def load_graph(config_path: str, overrides: Sequence[str], until: Sequence[str] = ()) -> tuple[Recipe, list[Step], str]:
    from spct_ray.stages.recipe import Recipe, build_steps

    recipe = load(Recipe, config_path, overrides)
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    for name, path in (("root", recipe.root), ("reuse", recipe.reuse)):
        if in_job and path and not os.path.isabs(path):
            raise ConfigError(
                f"{name}: {path!r} is relative, but a submitted job runs in a temporary copy of its directory; "
                f"give a path on a disk that all nodes share, e.g. {name}=/shared/runs/demo"
            )
    steps = build_steps(recipe)
    return recipe, steps_until(steps, until) if until else steps, local_root(recipe.root)


def _show_plan(parsed: argparse.Namespace) -> None:
    from spct_ray.stages.plan_check import check, checkpoints

    recipe, steps, root = load_graph(parsed.config, parsed.overrides, parsed.until)
    _say(f"{root}\n{format_plan(plan(steps, root, recipe.seed, recipe.reuse))}")
    lock = os.path.join(root, ".lock")
    if is_held(lock):
        _say(f"now running: {holder(lock)}")
    if found := checkpoints(recipe):
        _say(f"checkpoints (two are kept): {'; '.join(f'{name} {value:.3g}' for name, value in found.items())}")
    check(recipe)


def _publish(steps: Sequence[Step], directories: Mapping[str, str], root: str) -> None:
    """Print what the steps that no other step reads have to say, and copy their reports to `<root>/report/`."""
    read = {source for step in steps for source in step.inputs.values()}
    for step in steps:
        if step.name in read:
            continue
        record = read_record(directories[step.name])
        if record is None:
            continue
        if "summary_text" in record.metrics:
            _say(record.metrics["summary_text"])
        for name in REPORT_FILES:
            source = os.path.join(directories[step.name], name)
            if os.path.exists(source):
                target = os.path.join(root, "report", name)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(source, "rb") as file:
                    write_atomically(target, file.read())
                _say(f"{target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spct", description="Self-Principled Critique Tuning as one job graph on Ray."
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    overrides_help = "change one value of the file, e.g. grpo.beta=0.1"
    for name, handler, words in (
        ("run", _run, "run the graph of a configuration; finished steps are kept, a killed run resumes"),
        ("plan", _show_plan, "say for each step whether it is done, resumes or runs, and why"),
    ):
        command = subparsers.add_parser(name, help=words, description=words)
        command.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. conf/demo.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help=overrides_help)
        command.add_argument(
            "--until", action="append", default=[], metavar="STEP",
            help="this step and what it needs, no other; may be given several times",
        )  # fmt: skip
        command.set_defaults(handler=handler)
    words = "measure judges on benchmarks with their official scores; a killed evaluation resumes"
    command = subparsers.add_parser("evaluate", help=words, description=words)
    command.add_argument(
        "targets",
        nargs="+",
        metavar="MODEL_OR_RUN",
        help="a model directory, a run's root, RUN:base, RUN:rft, RUN:grpo, or the URL of an OpenAI-compatible "
        "endpoint with its version (/v1); with @MODE behind it, it judges in that mode. key=value changes one value of "
        "--config, or of what a judge runs on, e.g. evaluate.engine.tensor_parallel=2 evaluate.gpus_per_replica=2",
    )
    command.add_argument("--model", default="", metavar="NAME", help="of an endpoint: its model that judges")
    command.add_argument(
        "--api-key-env", default="", metavar="VARIABLE", help="of an endpoint: the environment variable with its key"
    )
    command.add_argument("--benchmarks", metavar="A,B=PATH", help="names, from the hub or with a file")
    command.add_argument(
        "--stored",
        action="store_true",
        help="generate nothing: put judges of finished runs side by side from what their own evaluations stored",
    )
    command.add_argument("--k", default="1,2,4,8", help="numbers of samples to vote with (default: 1,2,4,8)")
    command.add_argument(
        "--suite", choices=("benchmarks", "robustness"), default="benchmarks",
        help="official scores, or probes made of the benchmarks' items: who is fooled by what",
    )  # fmt: skip
    command.add_argument("--limit", type=int, help="draw so many rows of each benchmark")
    command.add_argument("--temperature", type=float, help="of the samples (default: the run's, else 0.5)")
    command.add_argument("--seed", type=int, default=1)
    command.add_argument("--root", help="where steps and report go (default: <run>/evaluation, or runs/evaluation)")
    command.add_argument("--config", metavar="FILE", help="a YAML file: judge (prompt of a model directory), resources")
    command.set_defaults(handler=_evaluate)
    from spct_ray.serve.commands import add_parsers

    add_parsers(subparsers)
    return parser


def _evaluate(parsed: argparse.Namespace) -> None:
    from spct_ray.stages import evaluation

    config = load(evaluation.EvaluationConfig, parsed.config) if parsed.config else evaluation.EvaluationConfig()
    overrides = [word for word in parsed.targets if re.match(r"\w+(\.\w+)*=", word)]
    config = override(config, [word for word in overrides if not word.startswith(("evaluate.", "meta_scores."))])
    targets = [word for word in parsed.targets if word not in overrides]
    if parsed.stored:
        _evaluate_stored(targets, parsed)
        return
    if not parsed.benchmarks:
        raise ConfigError("spct evaluate: say on what, --benchmarks NAME or NAME=PATH, or --stored")
    if not targets:
        raise ConfigError("spct evaluate: name at least one run, model directory or endpoint, not only key=value")
    benchmarks = evaluation.specs(parsed.benchmarks, targets)
    asked = evaluation.Evaluation(benchmarks, _ks(parsed.k), parsed.suite, parsed.limit, parsed.temperature)
    first = targets[0].partition("@")[0].partition(":")[0]
    inside = os.path.isdir(os.path.join(first, "steps"))
    root = local_root(parsed.root or (os.path.join(first, "evaluation") if inside else "runs/evaluation"))
    endpoint = evaluation.Endpoint(parsed.model, parsed.api_key_env)
    judges = [evaluation.resolve(target, config, endpoint) for target in targets]
    steps = evaluation.build_steps([evaluation.on_resources(judge, config, overrides) for judge in judges], asked)
    given = {name: getattr(parsed, name) for name in _EVALUATE_OPTIONS}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value not in (None, "")]
    command = shlex.join(["spct", "evaluate", *parsed.targets, *words])
    run_graph(steps, root, parsed.seed, config.cluster, command)


def _evaluate_stored(targets: list[str], parsed: argparse.Namespace) -> None:
    from spct_ray.stages.stored import report_stored

    root = parsed.root or "runs/evaluation_stored"
    command = shlex.join(["spct", "evaluate", "--stored", *targets, f"--k={parsed.k}", f"--seed={parsed.seed}"])
    _say(report_stored(targets, _ks(parsed.k), parsed.seed, root, command))
    _say(os.path.join(root, "index.html"))


def _ks(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(k) for k in text.split(",")}))
    except ValueError as error:
        raise ConfigError(f"--k {text!r}: write whole numbers, e.g. --k 1,2,4,8") from error


def _run(parsed: argparse.Namespace) -> None:
    until = [f"--until={name}" for name in parsed.until]
    command = shlex.join(["spct", "run", parsed.config, *parsed.overrides, *until])
    run(parsed.config, parsed.overrides, command, parsed.until)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
