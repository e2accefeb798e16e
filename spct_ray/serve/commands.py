"""`spct serve`, `spct serve-update` and `spct judge`. Importing this loads neither torch, Ray nor vLLM."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spct_ray.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from spct_ray.serve.deployment import ServeConfig
    from spct_ray.serve.schema import JudgeAnswer, JudgeRequest

_TARGET = "a run's root (its newest judge and meta RM), a model directory, or a YAML file such as conf/serve.yaml"
_OVERRIDES = (
    "change one value of what is served, e.g. resources.judge.num_gpus=2 resources.engine.tensor_parallel=2 (default: "
    "the GPUs and engine that the run was evaluated with; of a model: one GPU, if there are any)"
)
_SHOWN = 300  # characters of a critique


def add_parsers(subparsers: Any) -> None:
    """Add `serve`, `serve-update` and `judge` to the command line; each sets `handler(arguments)`."""
    serve = subparsers.add_parser("serve", help="serve a judge and its meta RM over HTTP with Ray Serve")
    serve.add_argument("target", metavar="RUN_OR_MODEL", help=_TARGET)
    serve.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    serve.add_argument("--host", help="address to listen on (default: the configuration's, 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default: the configuration's, 8000)")
    serve.add_argument("--meta", metavar="DIR", help="model directory of the meta RM")
    serve.set_defaults(handler=serve_command)

    words = "give the running service new weights of the same model, replica by replica; no request is dropped"
    update = subparsers.add_parser("serve-update", help=words, description=words)
    update.add_argument(
        "target", metavar="RUN_OR_WEIGHTS", help="a run's root (its newest judge) or a directory of *.safetensors"
    )
    update.set_defaults(handler=update_command)

    judge = subparsers.add_parser("judge", help="judge one query on the command line, without a server")
    judge.add_argument("target", metavar="RUN_OR_MODEL", help=_TARGET)
    judge.add_argument("overrides", nargs="*", metavar="key=value", help=_OVERRIDES)
    judge.add_argument("--query", help="the user's message")
    judge.add_argument("--response", action="append", default=[], help="one response; repeat it for each")
    judge.add_argument("--reference", default="", help="a reference answer to show to the judge")
    judge.add_argument("--principles", default="", help="a rubric to judge by; auto: the judge writes one")
    judge.add_argument("-k", default="8", help="number of judgements to sample, or auto (default: 8)")
    judge.add_argument("--k-meta", type=int, help="how many of them the meta RM keeps (default: half)")
    judge.add_argument("--seed", type=int, help="makes the orders and the sampling repeat")
    judge.add_argument("--file", metavar="FILE", help="a request as JSON, as for POST /v1/judge; - reads stdin")
    judge.add_argument("--meta", metavar="DIR", help="model directory of the meta RM")
    judge.add_argument("--json", action="store_true", help="print the answer as JSON")
    judge.set_defaults(handler=judge_command)


def serve_command(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM, then stop what was started here."""
    config = _config(arguments)
    resources = replace(
        config.resources,
        host=arguments.host or config.resources.host,
        port=config.resources.port if arguments.port is None else arguments.port,
    )
    config = replace(config, resources=resources)
    started = time.monotonic()
    print(f"starting judge {config.judge_model} and meta RM {config.meta_model or '(none: plain voting)'}", flush=True)

    from spct_ray.cluster import session
    from spct_ray.serve import app

    with session.start(resources.cluster), app.serving(config) as url:
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # after ray.init, which sets its own
            signal.signal(number, lambda *_: stop.set())
        body = {"messages": [{"role": "user", "content": "Name a prime number."}], "responses": ["4", "7"], "k": 8}
        header = "'content-type: application/json'"
        print(f"serving at {url} after {time.monotonic() - started:.0f} s; Ctrl-C stops it. Try:", flush=True)
        print(f"  curl {url}/v1/judge -H {header} -d {shlex.quote(json.dumps(body))}", flush=True)
        stop.wait()
        print("stopping", flush=True)


def update_command(arguments: argparse.Namespace) -> None:
    """Connect to the service's Ray cluster (RAY_ADDRESS, else the one on this machine) and roll out new weights."""
    from spct_ray.cluster import session
    from spct_ray.serve import app
    from spct_ray.serve.deployment import resolve

    target = Path(arguments.target)
    directory = str(target.resolve()) if any(target.glob("*.safetensors")) else resolve(arguments.target).judge_model
    if not os.environ.get("RAY_ADDRESS"):  # `spct serve` starts a local Ray without tokens
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with session.start(session.ClusterResources(address="auto")):
        weights = app.update_weights(directory)
    print(f"all judge replicas serve {directory}, as weight version {weights.version}", flush=True)


def judge_command(arguments: argparse.Namespace) -> None:
    """Judge one query with the engine in this process."""
    request = _request(arguments)
    config = _config(arguments)
    print(f"loading judge {config.judge_model}", file=sys.stderr, flush=True)

    from spct_ray.engines.vllm import VllmEngine
    from spct_ray.serve.backends import LocalJudge, LocalMeta
    from spct_ray.serve.gateway import Gateway

    engine = VllmEngine(config.judge_model, config.resources.engine)
    try:
        meta = LocalMeta(config.meta_model) if config.meta_model else None
        answer = asyncio.run(Gateway(config, LocalJudge(engine, config), meta).answer(request))
    finally:
        engine.close()
    print(answer.model_dump_json(indent=1) if arguments.json else format_answer(answer, request))


def format_answer(answer: JudgeAnswer, request: JudgeRequest) -> str:
    """Critiques in brief, the table of scores, the winner. Responses count from 1, as in the prompt."""
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
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN].rstrip()} ..."


def _config(arguments: argparse.Namespace) -> ServeConfig:
    from spct_ray.serve.deployment import resolve

    config = resolve(arguments.target, arguments.overrides)
    return replace(config, meta_model=str(Path(arguments.meta).resolve())) if arguments.meta else config


def _request(arguments: argparse.Namespace) -> JudgeRequest:
    from spct_ray.serve.schema import JudgeRequest, parse

    if arguments.file:
        if arguments.query or arguments.response:
            raise RequestError("give --file or --query with --response, not both")
        try:
            return parse(
                JudgeRequest, sys.stdin.buffer.read() if arguments.file == "-" else Path(arguments.file).read_bytes()
            )
        except OSError as error:
            raise ConfigError(f"{arguments.file}: {error.strerror}") from error
    if not arguments.query or not arguments.response:
        raise RequestError("give --query and at least one --response, or --file")
    request = {
        "messages": [{"role": "user", "content": arguments.query}],
        "responses": arguments.response,
        "reference": arguments.reference,
        "principles": arguments.principles,
        "k": int(arguments.k) if arguments.k.isdecimal() else arguments.k,
        "k_meta": arguments.k_meta,
        "seed": arguments.seed,
    }
    return parse(JudgeRequest, json.dumps(request))
