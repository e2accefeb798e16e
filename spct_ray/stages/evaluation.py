"""`spct evaluate` as a job graph: benchmarks -> judgements of each judge -> meta-RM logits -> one report of all.

The stages are those of a run. A judge is a model directory, or a finished judge of a run with the prompt, temperature
and meta RM that it was evaluated with there. Steps lie under a root of their own, so a run's report stays as it is.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.cluster.session import ClusterResources
from spct_ray.config import override, rebuild
from spct_ray.data.validate import Limits
from spct_ray.engines.base import EngineConfig
from spct_ray.engines.remote import RemoteConfig
from spct_ray.errors import ConfigError
from spct_ray.evaluation.benchmarks import BenchmarkSpec, parse_spec, with_digest
from spct_ray.graph.record import local_root, step_directory
from spct_ray.graph.step import Step
from spct_ray.graph.targets import SCALAR, Target, clean, find_judge, newest_step, parse_target
from spct_ray.judge.modes import MODES, ModeName
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.stages import benchmarks, evaluate, judge_model, meta_scores, probes, report, scalar
from spct_ray.stages.judge_model import JudgeModelConfig, JudgeModelResources
from spct_ray.stages.meta_scores import MetaScoresResources

R = TypeVar("R", SamplingResources, MetaScoresResources)


@dataclass(frozen=True)
class Judge:
    """One judge to evaluate, and how. `model` is None for one behind an endpoint, `config` for a scalar reward model.
    `scoring` is where its meta RM, or it itself as a scalar reward model, scores.
    `train` maps the id of the step that made its training items to its directory."""

    name: str
    model: str | None
    meta: str | None
    config: evaluate.EvaluateConfig | None
    resources: SamplingResources | evaluate.EndpointResources = field(default_factory=SamplingResources)
    scoring: MetaScoresResources = field(default_factory=partial(MetaScoresResources, gpus_per_replica=None))
    train: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationConfig:
    """What the command line leaves out: the prompt of model directories (a run's judge keeps its own), and where an
    evaluation runs. Without `evaluate` and `meta_scores`, judges and meta RMs of a run run on what they did there, but
    what ran on CPUs, and model directories, take GPUs where the cluster has some. An endpoint is asked by `concurrency`
    requests at a time, and a request waits `timeout_s` for its answer."""

    judge: JudgeConfig | None = None
    single: Literal["binary", "scale"] = "scale"
    cluster: ClusterResources = field(default_factory=ClusterResources)
    evaluate: SamplingResources | None = None
    meta_scores: MetaScoresResources | None = None
    concurrency: int = 16
    timeout_s: float = 300.0


@dataclass(frozen=True)
class Endpoint:
    """What an OpenAI-compatible endpoint is asked for; the API key is in the environment variable `api_key_env`."""

    model: str = ""
    api_key_env: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What `spct evaluate` was asked for."""

    benchmarks: tuple[BenchmarkSpec, ...]
    ks: tuple[int, ...] = (1, 2, 4, 8)
    suite: Literal["benchmarks", "robustness"] = "benchmarks"
    limit: int | None = None
    temperature: float | None = None  # null: the run's own, 0.5 for a model directory


def specs(text: str, targets: Sequence[str] = ()) -> tuple[BenchmarkSpec, ...]:
    """`a,b=PATH` as specifications with digests of their files; `heldout` is the held-out items of the first run among
    the targets. Raises ConfigError on unknown or double names."""
    named = [part.strip() for part in text.split(",") if part.strip()]
    parts = [f"heldout={_heldout(targets)}" if part == "heldout" else part for part in named]
    found = tuple(with_digest(parse_spec(part)) for part in parts)
    labels = [spec.label for spec in found]
    if not found or len(set(labels)) < len(labels):
        raise ConfigError(f"--benchmarks {text!r} must name at least one benchmark, and none twice")
    return found


def _heldout(targets: Sequence[str]) -> str:
    for word in targets:
        if not word.startswith(("http://", "https://")) and (run := parse_target(_without_mode(word)[0])).run:
            return str(Path(newest_step(run, "items")[1], "heldout.parquet"))
    raise ConfigError("--benchmarks heldout: no target is a run with held-out items; give a file, heldout=PATH")


def resolve(target: str, config: EvaluationConfig, endpoint: Endpoint = Endpoint()) -> Judge:
    """The judge that RUN (its last), RUN:rft (one of JUDGES), MODEL (a directory) or URL (an endpoint) stands for;
    TARGET@MODE judges in that mode of `spct_ray.judge.modes`. Raises ConfigError."""
    plain, mode = _without_mode(target)
    if mode:
        judge = resolve(plain, config, endpoint)
        if judge.config is None:
            raise ConfigError(f"{target}: a scalar reward model has no judge modes")
        prompt = replace(judge.config.judge, mode=mode)
        return replace(judge, name=f"{judge.name}-{clean(mode)}", config=replace(judge.config, judge=prompt))
    if target.startswith(("http://", "https://")):
        return _of_endpoint(target, config, endpoint)
    meant = parse_target(target)
    if meant.model:
        return _of_model(target, config)
    return _scalar_of_run(meant) if meant.judge == SCALAR else _of_run(meant)


def _without_mode(target: str) -> tuple[str, ModeName | None]:
    """TARGET@MODE as its two parts; the mode is None without one. Raises ConfigError for an unknown mode."""
    plain, at, mode = target.rpartition("@")
    if at and mode in MODES:
        return plain, mode
    if at and Path(plain).exists() and not Path(target).exists():
        close = difflib.get_close_matches(mode, MODES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(MODES)}"
        raise ConfigError(f"{target}: unknown judge mode {mode!r}; {hint}")
    return target, None


def _of_run(target: Target) -> Judge:
    found = find_judge(target)
    trained: dict[str, str] = {}
    if not found.name.endswith("_base"):
        trained[found.evaluation.inputs["items"]["id"]] = found.source(found.evaluation, "items")
    resources = rebuild(SamplingResources, found.evaluation.resources, f"{found.directory}/record.json: resources")
    scoring = MetaScoresResources()
    if found.scores:
        file = f"{found.scores.directory(found.root)}/record.json"
        scoring = rebuild(MetaScoresResources, found.scores.resources, f"{file}: resources")
    return Judge(
        name=found.name,
        model=str(Path(found.judge_model, "model")),
        meta=str(Path(found.meta_model, "model")) if found.meta_model else None,
        config=evaluate.config_of(found.directory),
        resources=_open(resources),
        scoring=_open(scoring),
        train=trained,
    )


def _open(resources: R) -> R:
    """The same with GPUs left to the cluster where a run had none, as it may have been another one, or a file says
    none, as it does by default. Only the override `gpus_per_replica=0` keeps an engine off GPUs that are there."""
    return replace(resources, gpus_per_replica=resources.gpus_per_replica or None)


def on_resources(judge: Judge, config: EvaluationConfig, overrides: Sequence[str]) -> Judge:
    """The judge on the resources that the configuration names, if it does, with the overrides `evaluate.key=value` and
    `meta_scores.key=value` applied to those."""

    def changed(name: str, resources: R) -> R:
        words = [word.removeprefix(f"{name}.") for word in overrides if word.startswith(f"{name}.")]
        return override(resources, words)

    where, scoring = judge.resources, _open(config.meta_scores) if config.meta_scores else judge.scoring
    if isinstance(where, SamplingResources):
        where = changed("evaluate", _open(config.evaluate) if config.evaluate else where)
    return replace(judge, resources=where, scoring=changed("meta_scores", scoring))


def _scalar_of_run(target: Target) -> Judge:
    record, directory = newest_step(target, SCALAR)
    items = record.inputs["items"]
    root = local_root(target.run)
    return Judge(
        name=f"{clean(Path(root).name)}_{SCALAR}",
        model=str(Path(directory, "model")),
        meta=None,
        config=None,
        train={items["id"]: step_directory(root, items["step"], items["id"])},
    )


def _of_model(target: str, asked: EvaluationConfig) -> Judge:
    """A sequence classifier is a scalar reward model. Else the full prompt unless told otherwise, half of a short
    context for the judgement, no meta RM."""
    engine = EngineConfig.of_model(target)
    config = json.loads(Path(target, "config.json").read_text(encoding="utf-8"))
    path = Path(target).resolve()
    name = clean(path.parent.name if path.name == "model" else path.name)
    if any(kind.endswith("ForSequenceClassification") for kind in config.get("architectures") or ()):
        return Judge(name, str(path), meta=None, config=None)
    prompt = JudgeConfig(max_tokens=min(JudgeConfig.max_tokens, engine.max_model_len // 2))
    return Judge(
        name=name,
        model=str(path),
        meta=None,
        config=evaluate.EvaluateConfig(asked.judge or prompt, asked.single),
        resources=SamplingResources(gpus_per_replica=None, engine=engine),
    )


def _of_endpoint(url: str, asked: EvaluationConfig, endpoint: Endpoint) -> Judge:
    """The full prompt unless told otherwise. Blocks are small: what an endpoint that fails loses was paid for."""
    if not endpoint.model:
        raise ConfigError(f"{url}: say which model of the endpoint is the judge, --model NAME")
    where = RemoteConfig(url, endpoint.model, endpoint.api_key_env, asked.concurrency, asked.timeout_s)
    config = evaluate.EvaluateConfig(asked.judge or JudgeConfig(), asked.single, endpoint=f"{endpoint.model} at {url}")
    return Judge(
        name=clean(endpoint.model),
        model=None,
        meta=None,
        config=config,
        resources=evaluate.EndpointResources(where, block_size=4 * asked.concurrency),
    )


def build_steps(judges: Sequence[Judge], asked: Evaluation) -> list[Step]:
    """The graph. Raises ConfigError on judges that cannot judge, or numbers of samples that make no sense."""
    if not asked.ks or min(asked.ks) < 1:
        raise ConfigError(f"--k must name numbers of samples of at least 1, found {asked.ks}")
    if asked.limit is not None and asked.limit < 1:
        raise ConfigError(f"--limit must be at least 1, found {asked.limit}")
    judges, is_robustness = _unique(judges), asked.suite == "robustness"
    train = {step: directory for judge in judges for step, directory in judge.train.items()}
    data = benchmarks.BenchmarksConfig(asked.benchmarks, asked.limit, Limits(), tuple(train))
    found = benchmarks.BenchmarksResources(tuple(train.values()))
    first = [Step("benchmarks", benchmarks.run, data, found)]
    if is_robustness:
        first.append(Step("probes", probes.run, {}, inputs={"items": "benchmarks"}))
    items = first[-1].name
    models, judged, scored = list[Step](), list[Step](), list[Step]()
    for judge in judges:
        name, inputs = f"evaluate_{judge.name}", {"items": items}
        if judge.model is not None:
            judge_model.check(judge.model, needs_template=judge.config is not None)
            models.append(_model_step(f"model_{judge.name}", judge.model))
            inputs["judge"] = models[-1].name
        if judge.config is None:
            if is_robustness:
                raise ConfigError(f"{judge.name}: the robustness suite asks judges, not scalar reward models")
            scored.append(Step(name, scalar.run, {}, judge.scoring, inputs))
            continue
        temperature = judge.config.temperature if asked.temperature is None else asked.temperature
        config = replace(judge.config, k_max=max(asked.ks), temperature=temperature, in_chunks=True)
        is_endpoint = isinstance(judge.resources, evaluate.EndpointResources)
        ask = evaluate.run_endpoint if is_endpoint else evaluate.run
        judged.append(Step(name, ask, config, judge.resources, inputs))
        if judge.meta is not None and not is_robustness:
            models.append(_model_step(f"meta_{judge.name}", judge.meta))
            inputs = {"items": items, "meta": models[-1].name, name: name}
            scored.append(Step(f"meta_scores_{judge.name}", meta_scores.run, {}, judge.scoring, inputs))
    steps = [*first, *models, *judged, *scored]  # evaluations follow each other at once, so that they share engines
    read = {"items": items} | {step.name: step.name for step in [*models, *judged, *scored]}
    ks = tuple(sorted(set(asked.ks)))
    if is_robustness:
        return [*steps, Step("report", probes.report, probes.RobustnessConfig(ks), inputs=read)]
    return [*steps, Step("report", report.run, report.ReportConfig(ks), inputs=read)]


def _unique(judges: Sequence[Judge]) -> list[Judge]:
    """The second and later judges of one name get a number."""
    seen = Counter[str]()
    found = []
    for judge in judges:
        seen[judge.name] += 1
        number = seen[judge.name]
        found.append(judge if number == 1 else replace(judge, name=f"{judge.name}-{number}"))
    return found


def _model_step(name: str, path: str) -> Step:
    return Step(name, judge_model.run, JudgeModelConfig(judge_model.digest(path)), JudgeModelResources(path))
