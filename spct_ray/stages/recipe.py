"""The whole method as one configuration tree, and the job graph that it stands for.

What is done (the method) and where it runs (`resources`) are separate trees: the same recipe runs on a laptop and on a
cluster with another `resources:` block, and only the former makes a step's identity.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.cluster.session import ClusterResources
from spct_ray.data.sources import with_content
from spct_ray.errors import ConfigError
from spct_ray.graph.step import Demand, Step
from spct_ray.judge.modes import MODES
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.learn.train_config import TrackerName, TrainResources
from spct_ray.stages import (
    bradley_terry,
    evaluate,
    grpo,
    items,
    meta,
    meta_scores,
    nano,
    report,
    rft,
    sample,
    select,
    student,
    unseen,
)
from spct_ray.stages.bradley_terry import BradleyTerryConfig  # a default of None would hide the module of its name
from spct_ray.stages.nano import NanoStudentConfig
from spct_ray.stages.sample import SampleConfig, SamplerConfig
from spct_ray.stages.unseen import UnseenConfig

Inputs = dict[str, str]


@dataclass(frozen=True)
class Resources:
    """Where each step runs. Steps that are not named here need one process and nothing else. `tracker` shows what the
    steps that train report."""

    tracker: TrackerName = "tensorboard"
    cluster: ClusterResources = field(default_factory=ClusterResources)
    sample: SamplingResources = field(default_factory=SamplingResources)
    rft: TrainResources = field(default_factory=TrainResources)
    grpo: grpo.GrpoResources = field(default_factory=grpo.GrpoResources)
    onpolicy: SamplingResources = field(default_factory=SamplingResources)
    meta: TrainResources = field(default_factory=TrainResources)
    bradley_terry: TrainResources = field(default_factory=TrainResources)
    meta_scores: meta_scores.MetaScoresResources = field(default_factory=meta_scores.MetaScoresResources)
    evaluate: SamplingResources = field(default_factory=SamplingResources)


@dataclass(frozen=True)
class Recipe:
    """One run. Steps that are finished under the root `reuse` are linked, not run again. `judge` is the prompt of every
    stage; `rounds` repeats sampling, selection and RFT with the current student as sampler (one round is the paper's).
    With `nano`, the student is made from nothing, not from `student`.
    With `bradley_terry` ({} takes its defaults), a scalar baseline is trained on the same items. With `unseen`, the
    judges are evaluated on built-in items that are unlike those that they were trained on."""

    root: str
    reuse: str = ""
    seed: int = 1
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    items: items.ItemsConfig = field(default_factory=items.ItemsConfig)
    student: student.StudentConfig = field(default_factory=student.StudentConfig)
    nano: NanoStudentConfig | None = None
    sample: SampleConfig = field(default_factory=SampleConfig)
    select: select.SelectConfig = field(default_factory=select.SelectConfig)
    rounds: int = 1
    rft: rft.RftConfig = field(default_factory=rft.RftConfig)
    grpo: grpo.GrpoConfig = field(default_factory=grpo.GrpoConfig)
    onpolicy: SampleConfig = field(default_factory=lambda: SampleConfig(num_hinted=0))
    meta: meta.MetaConfig = field(default_factory=meta.MetaConfig)
    bradley_terry: BradleyTerryConfig | None = None
    evaluate: evaluate.EvaluateConfig = field(default_factory=evaluate.EvaluateConfig)
    unseen: UnseenConfig | None = None
    report: report.ReportConfig = field(default_factory=report.ReportConfig)
    resources: Resources = field(default_factory=Resources)


def build_steps(recipe: Recipe) -> list[Step]:
    """The graph in an order in which every step comes after its inputs. Raises ConfigError on settings that clash."""
    if recipe.rounds < 1:
        raise ConfigError(f"rounds is {recipe.rounds}; RFT needs at least one")
    if max(recipe.report.ks) > recipe.evaluate.k_max:
        raise ConfigError(
            f"report.ks asks for votes of {max(recipe.report.ks)} samples, evaluate.k_max draws {recipe.evaluate.k_max}"
        )
    if not MODES[recipe.judge.mode].is_trainable:
        known = ", ".join(name for name, mode in MODES.items() if mode.is_trainable)
        raise ConfigError(
            f"judge.mode {recipe.judge.mode!r} cannot be trained: a judgement must be one prompt and one reply with a "
            f"score for each response, as in {known}. `spct evaluate` knows all modes"
        )
    where, steps = _with_tracker(recipe.resources), list[Step]()

    def add(name: str, module: Any, config: Any, resources: Any, demand: Demand, inputs: Inputs) -> str:
        if hasattr(config, "judge"):
            config = _with_judge(name, config, recipe.judge)
        steps.append(Step(name, module.run, module.VERSION, config, resources, demand, inputs))
        return name

    one = Demand(1)
    data = replace(
        recipe.items,
        sources=tuple(map(with_content, recipe.items.sources)),
        benchmarks=tuple(map(with_content, recipe.items.benchmarks)),
    )
    add("items", items, data, items.ItemsResources(), one, {})
    if recipe.nano:
        judge = add("student", nano, recipe.nano, None, one, {})
    else:
        judge = add("student", student, recipe.student, None, one, {})
    for number in range(1, recipe.rounds + 1):
        end = "" if number == 1 else f"_{number}"
        config = recipe.sample if number == 1 else replace(recipe.sample, sampler=SamplerConfig("student"))
        inputs = {"items": "items"} | ({"judge": judge} if config.sampler.kind == "student" else {})
        sampled = add(f"sample{end}", sample, config, where.sample, Demand.of_replicas(where.sample), inputs)
        chosen = {"items": "items", "sample": sampled}
        selected = add(f"select{end}", select, recipe.select, select.SelectResources(), one, chosen)
        judge = add(
            f"rft{end}", rft, recipe.rft, where.rft, _training(where.rft), {"student": "student", "select": selected}
        )
    both = _training(where.grpo.train) + Demand.of_replicas(where.grpo.rollout)
    add("grpo", grpo, recipe.grpo, where.grpo, both, {"items": "items", "rft": judge})
    add(
        "onpolicy",
        sample,
        recipe.onpolicy,
        where.onpolicy,
        Demand.of_replicas(where.onpolicy),
        {"items": "items", "judge": "grpo"},
    )
    meta_inputs = {"items": "items", "sample": sampled, "onpolicy": "onpolicy", "init": _init(recipe.meta.init, judge)}
    add("meta", meta, recipe.meta, where.meta, _training(where.meta), meta_inputs)
    if recipe.bradley_terry:
        inputs = {"items": "items", "init": _init(recipe.bradley_terry.init, judge)}
        scalar, training = recipe.bradley_terry, _training(where.bradley_terry)
        add("bradley_terry", bradley_terry, scalar, where.bradley_terry, training, inputs)
    judged = "items"
    if recipe.unseen:
        judged = add("unseen", unseen, recipe.unseen, unseen.UnseenResources(), one, {"items": "items"})
    evaluated: Inputs = {}
    for model, step in (("base", "student"), ("rft", judge), ("grpo", "grpo")):
        name, inputs = f"evaluate_{model}", {"items": judged, "judge": step}
        config = _with_judge(name, recipe.evaluate, recipe.judge)
        if model == "base":  # what it is worth shows in its greedy judgements
            config = replace(config, k_max=0)
        steps.append(evaluate.step(name, evaluate.run, config, where.evaluate, inputs))
        evaluated[name] = name
    scores = where.meta_scores
    score_inputs = {"items": judged, "meta": "meta", **evaluated}
    add("meta_scores", meta_scores, {}, scores, Demand.of_replicas(scores), score_inputs)
    read = {name: name for name in ("grpo", "meta", "meta_scores")}
    read |= {
        "items": judged,
        "student": "student",
        "sample": sampled,
        "select": selected,
        "rft": judge,
        "onpolicy": "onpolicy",
        **evaluated,
    }
    add("report", report, recipe.report, report.ReportResources(), one, read)
    return steps


def _init(name: str, rft_step: str) -> str:
    return {"student": "student", "rft": rft_step, "grpo": "grpo"}[name]


def _with_judge(name: str, config: Any, judge: JudgeConfig) -> Any:
    """The stage's config with the run's one prompt. Raises ConfigError when the stage asks for another."""
    if config.judge not in (JudgeConfig(), judge):
        raise ConfigError(f"{name}.judge differs from judge: all stages share one prompt, set it under judge: alone")
    return replace(config, judge=judge)


def _with_tracker(where: Resources) -> Resources:
    """The resources with the run's one tracker in all steps that train; ConfigError where one asks for another."""

    def tracked(name: str, resources: TrainResources) -> TrainResources:
        if resources.tracker not in (TrainResources.tracker, where.tracker):
            raise ConfigError(f"resources.{name}.tracker: all steps share one, set resources.tracker alone")
        return replace(resources, tracker=where.tracker)

    policy = replace(where.grpo, train=tracked("grpo.train", where.grpo.train))
    rft, meta = tracked("rft", where.rft), tracked("meta", where.meta)
    return replace(where, grpo=policy, rft=rft, meta=meta, bradley_terry=tracked("bradley_terry", where.bradley_terry))


def _training(resources: TrainResources) -> Demand:
    num = resources.num_workers
    return Demand(num * resources.cpus_per_worker, (resources.gpus_per_worker,) * num)
