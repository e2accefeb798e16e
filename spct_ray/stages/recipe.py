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
from spct_ray.graph.stage import step_of
from spct_ray.graph.step import Step
from spct_ray.judge.modes import MODES
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.learn.train_config import TrackerName, TrainResources
from spct_ray.stages import bradley_terry as bradley_terry_stage  # a default of None would hide the module itself
from spct_ray.stages import evaluate, grpo, items, meta, meta_scores, report, rft, sample, select, student
from spct_ray.stages import unseen as unseen_stage
from spct_ray.stages.sample import SampleConfig, SamplerConfig


@dataclass(frozen=True)
class FurtherStep:
    """A step beside those of the method. `stage` is the import path `module:function` of a function marked `@stage`, or
    the name of a module of `spct_ray.stages`; `inputs` names the step that it reads in each role, `config` is the
    dataclass that it takes."""

    stage: str
    inputs: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """Where each step runs. Steps that are not named here need one process and nothing else. `tracker` shows what the
    steps that train report. `steps` has the resources of the recipe's further steps, by name."""

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
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One run. Steps that are finished under the root `reuse` are linked, not run again. `judge` is the prompt of every
    stage; `rounds` repeats sampling, selection and RFT with the current student as sampler (one round is the paper's).
    With `bradley_terry` ({} takes its defaults), a scalar baseline is trained on the same items. With `unseen`, the
    judges are evaluated on built-in items that are unlike those that they were trained on. `steps` are further ones, by
    name."""

    root: str
    reuse: str = ""
    seed: int = 1
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    items: items.ItemsConfig = field(default_factory=items.ItemsConfig)
    student: student.StudentConfig = field(default_factory=student.StudentConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    select: select.SelectConfig = field(default_factory=select.SelectConfig)
    rounds: int = 1
    rft: rft.RftConfig = field(default_factory=rft.RftConfig)
    grpo: grpo.GrpoConfig = field(default_factory=grpo.GrpoConfig)
    onpolicy: SampleConfig = field(default_factory=lambda: SampleConfig(num_hinted=0))
    meta: meta.MetaConfig = field(default_factory=meta.MetaConfig)
    bradley_terry: bradley_terry_stage.BradleyTerryConfig | None = None
    evaluate: evaluate.EvaluateConfig = field(default_factory=evaluate.EvaluateConfig)
    unseen: unseen_stage.UnseenConfig | None = None
    report: report.ReportConfig = field(default_factory=report.ReportConfig)
    steps: dict[str, FurtherStep] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)


def build_steps(recipe: Recipe) -> list[Step]:
    """The graph in an order in which every step comes after its inputs. Raises ConfigError on settings that clash."""
    _check(recipe)
    where, steps = recipe.resources, list[Step]()
    kinds = recipe.items.builtin.kinds if recipe.items.builtin else ()

    def add(name: str, function: Any, config: Any, resources: Any = None, /, **inputs: str) -> str:
        config = _share(config, name, "judge", JudgeConfig(), recipe.judge)
        config = _share(config, name, "items.builtin.kinds", (), kinds)
        tracker = TrainResources.tracker, where.tracker
        resources = _share(resources, f"resources.{name}", "resources.tracker", *tracker)
        steps.append(Step(name, function, config, resources, inputs))
        return name

    data = replace(
        recipe.items,
        sources=tuple(map(with_content, recipe.items.sources)),
        benchmarks=tuple(map(with_content, recipe.items.benchmarks)),
    )
    add("items", items.run, data)
    judge = add("student", student.run, recipe.student)
    for number in range(1, recipe.rounds + 1):
        end = "" if number == 1 else f"_{number}"
        config = recipe.sample if number == 1 else replace(recipe.sample, sampler=SamplerConfig("student"))
        read = {"judge": judge} if config.sampler.kind == "student" else {}
        sampled = add(f"sample{end}", sample.run, config, where.sample, items="items", **read)
        selected = add(f"select{end}", select.run, recipe.select, items="items", sample=sampled)
        judge = add(f"rft{end}", rft.run, recipe.rft, where.rft, student="student", select=selected)
    init_of = {"student": "student", "rft": judge, "grpo": "grpo"}
    add("grpo", grpo.run, recipe.grpo, where.grpo, items="items", rft=judge)
    add("onpolicy", sample.run, recipe.onpolicy, where.onpolicy, items="items", judge="grpo")
    read = {"items": "items", "sample": sampled, "onpolicy": "onpolicy"}
    add("meta", meta.run, recipe.meta, where.meta, **read, init=init_of[recipe.meta.init])
    if recipe.bradley_terry:
        read = {"items": "items", "init": init_of[recipe.bradley_terry.init]}
        add("bradley_terry", bradley_terry_stage.run, recipe.bradley_terry, where.bradley_terry, **read)
    judged = add("unseen", unseen_stage.run, recipe.unseen, items="items") if recipe.unseen else "items"
    evaluated: dict[str, str] = {}
    for model, step in (("base", "student"), ("rft", judge), ("grpo", "grpo")):
        # What the base model is worth shows in its greedy judgements.
        measured = replace(recipe.evaluate, k_max=0) if model == "base" else recipe.evaluate
        name = add(f"evaluate_{model}", evaluate.run, measured, where.evaluate, items=judged, judge=step)
        evaluated[name] = name
    add("meta_scores", meta_scores.run, {}, where.meta_scores, items=judged, meta="meta", **evaluated)
    read = {name: name for name in ("student", "grpo", "onpolicy", "meta", "meta_scores")} | evaluated
    add("report", report.run, recipe.report, items=judged, sample=sampled, select=selected, rft=judge, **read)
    for name, further in recipe.steps.items():
        own = step_of(name, further.stage, further.config, where.steps.get(name, {}), **further.inputs)
        add(name, own.function, own.config, own.resources, **own.inputs)
    return steps


def _check(recipe: Recipe) -> None:
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
    for name in recipe.steps:
        if not items.NAME.fullmatch(name):
            raise ConfigError(f"steps: {name!r} becomes part of a directory's name: use letters, digits, _ and -")
    if unknown := recipe.resources.steps.keys() - recipe.steps.keys():
        raise ConfigError(f"resources.steps: {', '.join(sorted(unknown))} is no step of `steps`")


def _share(owner: Any, name: str, setting: str, default: Any, value: Any) -> Any:
    """The part `name` of the recipe with the run's value of `setting`, if it has a field of that name. Raises
    ConfigError where it asks for another one."""
    if isinstance(owner, grpo.GrpoResources):
        return replace(owner, train=_share(owner.train, f"{name}.train", setting, default, value))
    key = setting.rpartition(".")[2]
    if not hasattr(owner, key):
        return owner
    if getattr(owner, key) not in (default, value):
        raise ConfigError(f"{name}.{key}: all steps share one, set {setting} alone")
    return replace(owner, **{key: value})
