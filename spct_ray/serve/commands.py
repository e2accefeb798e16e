"""`spct serve`, `spct serve-update` and `spct judge`. Importing this loads neither torch, Ray nor vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spct_ray.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from spct_ray.serve.deployment import ServeConfig
    from spct_ray.serve.schema import JudgeAnswer, JudgeRequest

_SHOWN = 300  # characters of a critique

Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        help="a run's root (its last judge and meta RM), RUN:rft, a model directory, or a YAML file as conf/serve.yaml",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value",
        help="override one value of the configuration, e.g. resources.judge.num_gpus=2 "
        "resources.engine.tensor_parallel=2 (default: GPUs and engine of the run's evaluation; of a model: one GPU, "
        "if there is any)",
    ),
]
Meta = Annotated[str, typer.Option(metavar="DIR", help="model directory of the meta RM")]


def serve(
    target: Target,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="address to listen on (default: the configuration's, 127.0.0.1)")] = "",
    port: Annotated[int | None, typer.Option(help="port to listen on (default: the configuration's, 8000)")] = None,
    meta: Meta = "",
) -> None:
    """Serve a judge and its meta RM over HTTP with Ray Serve, until Ctrl-C or SIGTERM."""
    config = _config(target, overrides, meta)
    resources = replace(
        config.resources,
        host=host or config.resources.host,
        port=config.resources.port if port is None else port,
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
    from spct_ray.cluster import session
    from spct_ray.serve import app
    from spct_ray.serve.deployment import resolve

    directory = str(Path(target).resolve()) if any(Path(target).glob("*.safetensors")) else resolve(target).judge_model
    if not os.environ.get("RAY_ADDRESS"):  # `spct serve` starts a local Ray without tokens
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with session.start(session.ClusterResources(address="auto")):
        weights = app.update_weights(directory)
    print(f"all judge replicas serve {directory}, as weight version {weights.version}", flush=True)


def judge(
    target: Target,
    overrides: Overrides = None,
    query: Annotated[str, typer.Option(help="the user's message")] = "",
    response: Annotated[list[str] | None, typer.Option(help="one response; repeat it for each")] = None,
    reference: Annotated[str, typer.Option(help="a reference answer to show to the judge")] = "",
    principles: Annotated[str, typer.Option(help="a rubric to judge by; auto: the judge writes one")] = "",
    k: Annotated[str, typer.Option("-k", help="number of judgements to sample, or auto")] = "8",
    k_meta: Annotated[int | None, typer.Option(help="how many of them the meta RM keeps (default: half)")] = None,
    seed: Annotated[int | None, typer.Option(help="makes the orders and the sampling repeat")] = None,
    file: Annotated[
        str, typer.Option(metavar="FILE", help="a request as JSON, as for POST /v1/judge; - reads stdin")
    ] = "",
    meta: Meta = "",
    as_json: Annotated[bool, typer.Option("--json", help="print the answer as JSON")] = False,
) -> None:
    """Judge one query on the command line, with the engine in this process and without a server."""
    given = {
        "messages": [{"role": "user", "content": query}],
        "responses": response or [],
        "reference": reference,
        "principles": principles,
        "k": int(k) if k.isdecimal() else k,
        "k_meta": k_meta,
        "seed": seed,
    }
    if file and (query or response):
        raise RequestError("give --file or --query with --response, not both")
    if not file and not (query and response):
        raise RequestError("give --query and at least one --response, or --file")
    request = _request(_read(file) if file else json.dumps(given).encode())
    config = _config(target, overrides, meta)
    print(f"loading judge {config.judge_model}", file=sys.stderr, flush=True)

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
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN].rstrip()} ..."


def _config(target: str, overrides: Sequence[str] | None, meta: str) -> ServeConfig:
    from spct_ray.serve.deployment import resolve

    config = resolve(target, overrides or ())
    return replace(config, meta_model=str(Path(meta).resolve())) if meta else config


def _read(file: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error


def _request(body: bytes) -> JudgeRequest:
    from spct_ray.serve.schema import JudgeRequest, parse

    return parse(JudgeRequest, body)
