"""The command `spct`: run a job graph, say what a run would do, evaluate and compare judges, serve a run.

Importing this file, `spct --help` and `spct plan` load neither torch, Ray nor vLLM.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import spct_ray
from spct_ray.cluster import session
from spct_ray.cluster.session import ClusterResources
from spct_ray.config import load, override
from spct_ray.errors import ConfigError, RequestError, SpctError
from spct_ray.graph.explain import format_plan, link_reused, plan
from spct_ray.graph.lock import hold, holder
from spct_ray.graph.record import local_root, read_record, write_atomically
from spct_ray.graph.step import Step, steps_until
from spct_ray.graph.view import shown
from spct_ray.serve.deployment import ServeConfig, resolve

if TYPE_CHECKING:
    from spct_ray.serve.schema import JudgeAnswer, JudgeRequest
    from spct_ray.stages.recipe import Recipe

REPORT_FILES = ("index.html", "summary.json", "samples.parquet", "pairs.parquet")
RECIPES = Path(__file__).parent / "conf"
SHOWN_CHARACTERS = 300  # of a critique

_say = partial(print, flush=True)


class _Guarded(TyperGroup):
    """Runs a command so that errors meant for a person become a message and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        raise typer.Exit(guarded(lambda: super(_Guarded, self).invoke(ctx), ctx.obj))


app = typer.Typer(
    name="spct",
    cls=_Guarded,
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spct`. Returns the exit status: 0 fine, 2 an error meant to be read, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        typer.main.get_command(app).main(arguments, prog_name="spct", obj=shlex.join(["spct", *arguments]))
    except SystemExit as exit:  # typer's way to return
        return int(exit.code or 0)
    return 0


def guarded(command_function: Callable[[], object], command: str) -> int:
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


def _version(wanted: bool) -> None:
    if wanted:
        print(f"spct-ray {spct_ray.__version__}")
        raise typer.Exit


@app.callback()
def spct(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Self-Principled Critique Tuning as one job graph on Ray."""


RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a YAML file, or a recipe that comes with spct, e.g. demo")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="change one value of the file, e.g. grpo.beta=0.1")
]
Until = Annotated[
    list[str] | None,
    typer.Option(metavar="STEP", help="this step and what it needs, no other; may be given several times"),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        help="a run's root (its last judge and meta RM), RUN:rft, a model directory, or a YAML file as conf/serve.yaml",
    ),
]
ServeOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value",
        help="override one value of the configuration, e.g. resources.judge.num_gpus=2 "
        "resources.engine.tensor_parallel=2 (default: GPUs and engine of the run's evaluation; of a model: one GPU, "
        "if there is any)",
    ),
]
Meta = Annotated[str, typer.Option(metavar="DIR", help="model directory of the meta RM")]


@app.command("run")
def run_command(ctx: typer.Context, recipe: RecipeName, overrides: Overrides = None, until: Until = None) -> None:
    """Run the graph of a recipe; finished steps are kept, a killed run resumes."""
    from spct_ray.stages.plan_check import check

    tree, steps, root = load_graph(recipe, overrides or (), until or ())
    check(tree)
    run_graph(steps, root, tree.seed, tree.resources.cluster, ctx.obj, tree.reuse)


@app.command("plan")
def plan_command(recipe: RecipeName, overrides: Overrides = None, until: Until = None) -> None:
    """Say for each step whether it is done, resumes or runs, and why."""
    from spct_ray.stages.plan_check import check

    tree, steps, root = load_graph(recipe, overrides or (), until or ())
    _say(f"{root}\n{format_plan(plan(steps, root, tree.seed, tree.reuse))}")
    if running := holder(os.path.join(root, ".lock")):
        _say(f"now running: {running}")
    check(tree)


@app.command()
def evaluate(
    ctx: typer.Context,
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="a model directory, a run's root, RUN:base, RUN:rft, RUN:grpo, or the URL of an OpenAI-compatible "
            "endpoint with its version (/v1); with @MODE behind it, it judges in that mode. key=value changes one "
            "value of --config, or of what a judge runs on, e.g. evaluate.engine.tensor_parallel=2 "
            "evaluate.gpus_per_replica=2",
        ),
    ],
    benchmarks: Annotated[str, typer.Option(metavar="A,B=PATH", help="names, from the hub or with a file")] = "",
    stored: Annotated[
        bool,
        typer.Option(
            "--stored",
            help="generate nothing: put judges of finished runs side by side from what their own evaluations stored",
        ),
    ] = False,
    k: Annotated[str, typer.Option("--k", help="numbers of samples to vote with")] = "1,2,4,8",
    suite: Annotated[
        Literal["benchmarks", "robustness"],
        typer.Option(help="official scores, or probes made of the benchmarks' items: who is fooled by what"),
    ] = "benchmarks",
    limit: Annotated[int | None, typer.Option(help="draw so many rows of each benchmark")] = None,
    temperature: Annotated[float | None, typer.Option(help="of the samples (default: the run's, else 0.5)")] = None,
    seed: int = 1,
    root: Annotated[
        str, typer.Option(help="where steps and report go (default: <run>/evaluation, or runs/evaluation)")
    ] = "",
    config: Annotated[
        str, typer.Option(metavar="FILE", help="a YAML file: judge (prompt of a model directory), resources")
    ] = "",
    model: Annotated[str, typer.Option(metavar="NAME", help="of an endpoint: its model that judges")] = "",
    api_key_env: Annotated[
        str, typer.Option(metavar="VARIABLE", help="of an endpoint: the environment variable with its key")
    ] = "",
) -> None:
    """Measure judges on benchmarks with their official scores; a killed evaluation resumes."""
    from spct_ray.stages import evaluation

    settings = load(evaluation.EvaluationConfig, config) if config else evaluation.EvaluationConfig()
    overrides = [word for word in targets if re.match(r"\w+(\.\w+)*=", word)]
    settings = override(settings, [word for word in overrides if not word.startswith(("evaluate.", "meta_scores."))])
    names = [word for word in targets if word not in overrides]
    if stored:
        from spct_ray.stages.stored import report_stored

        root = root or "runs/evaluation_stored"
        _say(report_stored(names, _ks(k), seed, root, ctx.obj))
        _say(os.path.join(root, "index.html"))
        return
    if not benchmarks:
        raise ConfigError("spct evaluate: say on what, --benchmarks NAME or NAME=PATH, or --stored")
    if not names:
        raise ConfigError("spct evaluate: name at least one run, model directory or endpoint, not only key=value")
    chosen = evaluation.Evaluation(evaluation.specs(benchmarks, names), _ks(k), suite, limit, temperature)
    first = names[0].partition("@")[0].partition(":")[0]
    inside = os.path.isdir(os.path.join(first, "steps"))
    root = local_root(root or (os.path.join(first, "evaluation") if inside else "runs/evaluation"))
    endpoint = evaluation.Endpoint(model, api_key_env)
    judges = [evaluation.resolve(target, settings, endpoint) for target in names]
    steps = evaluation.build_steps([evaluation.on_resources(judge, settings, overrides) for judge in judges], chosen)
    run_graph(steps, root, seed, settings.cluster, ctx.obj)


@app.command()
def serve(
    target: Target,
    overrides: ServeOverrides = None,
    host: Annotated[
        str | None, typer.Option(help="address to listen on (default: the configuration's, 127.0.0.1)")
    ] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on (default: the configuration's, 8000)")] = None,
    meta: Meta = "",
) -> None:
    """Serve a judge and its meta RM over HTTP with Ray Serve, until Ctrl-C or SIGTERM."""
    address = {"resources.host": host, "resources.port": port}
    given = [f"{key}={value}" for key, value in address.items() if value is not None]
    config = _config(target, [*(overrides or ()), *given], meta)
    started = time.monotonic()
    _say(f"starting judge {config.judge_model} and meta RM {config.meta_model or '(none: plain voting)'}")

    from spct_ray.serve.app import serving

    with session.start(config.resources.cluster), serving(config) as url:
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets its own
            signal.signal(number, lambda *_: stop.set())
        body = {"messages": [{"role": "user", "content": "Name a prime number."}], "responses": ["4", "7"], "k": 8}
        header = "'content-type: application/json'"
        _say(f"serving at {url} after {time.monotonic() - started:.0f} s; Ctrl-C stops it. Try:")
        _say(f"  curl {url}/v1/judge -H {header} -d {shlex.quote(json.dumps(body))}")
        stop.wait()
        _say("stopping")


@app.command("serve-update")
def serve_update(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_WEIGHTS", help="a run's root (its newest judge) or a directory of *.safetensors"
        ),
    ],
) -> None:
    """Give the running service new weights of the same model, replica by replica; no request is dropped.

    The service is looked for at RAY_ADDRESS, else on this machine.
    """
    from spct_ray.serve.app import update_weights

    directory = str(Path(target).resolve()) if any(Path(target).glob("*.safetensors")) else resolve(target).judge_model
    if not os.environ.get("RAY_ADDRESS"):  # `spct serve` starts a local Ray without tokens
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with session.start(ClusterResources(address="auto")):
        weights = update_weights(directory)
    _say(f"all judge replicas serve {directory}, as weight version {weights.version}")


@app.command()
def judge(
    target: Target,
    overrides: ServeOverrides = None,
    query: Annotated[str, typer.Option(help="the user's message")] = "",
    response: Annotated[list[str] | None, typer.Option(help="one response; repeat it for each")] = None,
    reference: Annotated[str, typer.Option(help="a reference answer to show to the judge")] = "",
    principles: Annotated[str, typer.Option(help="a rubric to judge by; auto: the judge writes one")] = "",
    k: Annotated[str, typer.Option("-k", help="number of judgements to sample, or auto")] = "8",
    k_meta: Annotated[int | None, typer.Option(help="how many of them the meta RM keeps (default: half)")] = None,
    seed: Annotated[int | None, typer.Option(help="makes the orders and the sampling repeat")] = None,
    file: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(metavar="FILE", help="a request as JSON, as for POST /v1/judge; - reads stdin"),
    ] = None,
    meta: Meta = "",
    as_json: Annotated[bool, typer.Option("--json", help="print the answer as JSON")] = False,
) -> None:
    """Judge one query on the command line, with the engine in this process and without a server."""
    from spct_ray.serve.schema import JudgeRequest, parse

    if (query or response) if file else not (query and response):
        raise RequestError("give either --query and at least one --response, or --file")
    given = {
        "messages": [{"role": "user", "content": query}],
        "responses": response,
        "reference": reference,
        "principles": principles,
        "k": int(k) if k.isdecimal() else k,
        "k_meta": k_meta,
        "seed": seed,
    }
    request = parse(JudgeRequest, file.read() if file else json.dumps(given))
    config = _config(target, overrides, meta)
    print(f"loading judge {config.judge_model}", file=sys.stderr, flush=True)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers would show one for the meta RM's weights

    from spct_ray.engines.vllm import VllmEngine
    from spct_ray.serve.backends import LocalJudge, LocalMeta
    from spct_ray.serve.gateway import Gateway

    engine = VllmEngine(config.judge_model, config.resources.engine)
    try:
        scorer = LocalMeta(config.meta_model) if config.meta_model else None
        answer = asyncio.run(Gateway(config, LocalJudge(engine, config), scorer).answer(request))
    finally:
        engine.close()
    print(answer.model_dump_json(indent=1) if as_json else format_answer(answer, request))


def _ks(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(k) for k in text.split(",")}))
    except ValueError as error:
        raise ConfigError(f"--k {text!r}: write whole numbers, e.g. --k 1,2,4,8") from error


def run_graph(
    steps: Sequence[Step], root: str, seed: int, cluster: ClusterResources, command: str, reuse: str = ""
) -> None:
    """Alone on the root: show the plan, run what is done neither here nor under the root `reuse` (Ray is not started
    for nothing), print the results."""
    with hold(os.path.join(root, ".lock"), command, _say):
        planned = plan(steps, root, seed, reuse)
        link_reused(planned, root)
        left = {step.name for step in planned if step.state != "done"}
        with shown(planned, root, _say) as say:
            if left:
                from spct_ray.graph.runner import run_steps  # imports Ray

                with session.start(cluster):
                    signal.signal(signal.SIGTERM, signal.default_int_handler)  # after ray.init, which sets its own
                    nodes = session.nodes()
                    steps = [step.placed(nodes) for step in steps]
                    with session.waiting_for_room(cluster, say):
                        for step in steps:
                            if step.name in left:
                                step.check_room(nodes)
                    run_steps(steps, root, seed, command, say)
        _publish(steps, {s.name: s.directory for s in planned}, root)


def recipe_names() -> list[str]:
    """The recipes that come with the package, e.g. "demo" and "experiments/beta_0"; each is a file under `RECIPES`."""
    paths = [path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")]
    return sorted(set(paths) - {"serve"})  # what `spct serve` reads


def recipe_file(name: str) -> str:
    """The file that `name` stands for: itself, or that of a recipe of the package. ConfigError if there is neither."""
    if os.path.isfile(name):
        return name
    if name in recipe_names():
        return str(RECIPES / f"{name}.yaml")
    raise ConfigError(
        f"{name}: no such configuration file (current directory: {os.getcwd()}), and no recipe that comes with spct. "
        f"Try `spct plan demo`; the recipes are {', '.join(recipe_names())}"
    )


def load_graph(config_path: str, overrides: Sequence[str], until: Sequence[str] = ()) -> tuple[Recipe, list[Step], str]:
    from spct_ray.stages.recipe import Recipe, build_steps

    recipe = load(Recipe, recipe_file(config_path), overrides)
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    for name, path in (("root", recipe.root), ("reuse", recipe.reuse)):
        if in_job and path and not os.path.isabs(path):
            raise ConfigError(
                f"{name}: {path!r} is relative, but a submitted job runs in a temporary copy of its directory; "
                f"give a path on a disk that all nodes share, e.g. {name}=/shared/runs/demo"
            )
    steps = build_steps(recipe)
    return recipe, steps_until(steps, until) if until else steps, local_root(recipe.root)


def _publish(steps: Sequence[Step], directories: Mapping[str, str], root: str) -> None:
    """Print what the steps that no other step reads have to say, and copy their reports to `<root>/report/`: the
    report of a recipe right there, those of further steps to a folder of their name."""
    read = {source for step in steps for source in step.inputs.values()}
    for step in steps:
        directory = directories[step.name]
        record = read_record(directory)
        if step.name in read or record is None:
            continue
        if "summary_text" in record.metrics:
            _say(record.metrics["summary_text"])
        folder = [step.name] if step.name != "report" and "report" in directories else []
        for name in REPORT_FILES:
            if os.path.exists(source := os.path.join(directory, name)):
                target = os.path.join(root, "report", *folder, name)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                write_atomically(target, Path(source).read_bytes())
                _say(target)


def format_answer(answer: JudgeAnswer, request: JudgeRequest) -> str:
    """Shortened critiques, the table of scores and the winner. Responses are numbered from 1, as in the prompt."""
    lines = []
    for k, sample in enumerate(answer.samples):
        shown = ", ".join(str(i + 1) for i in sample.order)
        scores = f"failed: {sample.failure}" if sample.scores is None else f"scores {sample.scores}"
        logit = "" if sample.meta_logit is None else f", meta logit {sample.meta_logit:.2f}"
        lines.append(
            f"sample {k + 1} (shown in order {shown}): {scores}{logit}{'' if sample.kept else ', not counted'}"
        )
        lines.append("  " + _brief(sample.text).replace("\n", "\n  "))
    lines.append("")
    failed = ", ".join(f"{count} {name}" for name, count in answer.failures.items()) or "none"
    if answer.principles_source != "none":
        lines.append(f"principles ({answer.principles_source}): {_brief(answer.principles)}")
    votings = {"meta": "meta RM", "weighted": "weighted by the meta RM", "plain": f"plain ({answer.voting_reason})"}
    counted = f"{len(answer.used)} of {answer.num_samples} samples counted"
    lines.append(f"{counted}; failures: {failed}; voting: {votings[answer.voting]}")
    if answer.scores is None or answer.mean_scores is None:
        return "\n".join([*lines, "no verdict: no sample could be used"])
    for i, (total, mean) in enumerate(zip(answer.scores, answer.mean_scores, strict=True)):
        response = " ".join(request.responses[i].split())
        lines.append(f"  response {i + 1}: sum {total:5.4g}, mean {mean:5.2f}  {response[:60]}")
    if answer.winner is not None:
        tie = f" (a tie of {', '.join(str(i + 1) for i in answer.winners)}, broken at random)" if answer.tie else ""
        sure = "" if answer.confidence is None else f", in {answer.confidence:.0%} of resamples"
        lines.append(f"winner: response {answer.winner + 1}{sure}{tie}")
    return "\n".join(lines)


def _brief(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS].rstrip()} ..."


def _config(target: str, overrides: Sequence[str] | None, meta: str) -> ServeConfig:
    config = resolve(target, overrides or ())
    return replace(config, meta_model=str(Path(meta).resolve())) if meta else config


if __name__ == "__main__":
    sys.exit(main())
