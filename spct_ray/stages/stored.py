"""What a finished run has stored of its judges, and `spct evaluate --stored`: a report from that alone.

Nothing is generated or scored again, so it takes seconds and needs neither Ray nor an engine; the judges must have been
evaluated on the same items. Other items, or more samples of them: `spct_ray.stages.evaluation`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spct_ray.errors import ConfigError
from spct_ray.graph.record import StepRecord, finished_records, local_root, step_directory
from spct_ray.graph.step import StepContext
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.stages import report
from spct_ray.stages.evaluate import EvaluateConfig

JUDGES = ("base", "rft", "grpo")  # of a run, the last finished one is its judge


@dataclass(frozen=True)
class Stored:
    """A run's finished evaluation of one judge, and the meta RM's scores of it, if there are any."""

    root: str
    evaluation: StepRecord
    scores: StepRecord | None

    @property
    def name(self) -> str:
        """The run's and the judge's, e.g. "demo_grpo"."""
        return f"{clean(Path(self.root).name)}_{self.evaluation.name.removeprefix('evaluate_')}"

    @property
    def config(self) -> EvaluateConfig:
        """How it was evaluated."""
        config = self.evaluation.config
        return EvaluateConfig(**config | {"judge": JudgeConfig(**config["judge"])})

    def source(self, record: StepRecord, role: str) -> str:
        """The directory of one of the record's inputs."""
        source = record.inputs[role]
        return step_directory(self.root, source["step"], source["id"])

    @property
    def judge_model(self) -> str:
        """The directory of the step that made the judge."""
        return self.source(self.evaluation, "judge")

    @property
    def meta_model(self) -> str | None:
        """The directory of the step that made the meta RM."""
        return self.source(self.scores, "meta") if self.scores else None


def find(root: str, judges: Sequence[str] = JUDGES[::-1]) -> Stored:
    """The newest finished evaluation under the root of the first of `judges` that has one. Raises ConfigError."""
    root = local_root(root)
    records = finished_records(root)
    newest = {record.name: record for record in records}
    found = next((newest[f"evaluate_{name}"] for name in judges if f"evaluate_{name}" in newest), None)
    if found is None:
        raise ConfigError(f"{root}: no finished evaluation of {' or '.join(judges)}; finish the run (`spct run`) first")
    scores = (r for r in reversed(records) if r.name == "meta_scores" and _reads(r, found))
    return Stored(root, found, next(scores, None))


def find_target(target: str) -> Stored:
    """What RUN (its last judge) or RUN:rft (one of JUDGES) stands for. Raises ConfigError."""
    root, colon, judge = target.rpartition(":")
    if (Path(target) / "steps").is_dir():
        return find(target)
    if not colon or not (Path(root) / "steps").is_dir():
        raise ConfigError(f"{target} is no run (no steps/ in it)")
    if judge not in JUDGES:
        raise ConfigError(f"{target}: a run's judges that can be compared are {', '.join(JUDGES)}, not {judge!r}")
    return find(root, (judge,))


def clean(name: str) -> str:
    """The name with a dash for all that has a meaning in names of steps and judges."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name)


def report_stored(targets: Sequence[str], ks: Sequence[int], seed: int, out: str, command: str) -> str:
    """Write the report of `stages.report` on the judges' stored judgements to the directory `out`; returns its text.

    Raises ConfigError for targets that are no runs, were evaluated on different items, or with fewer samples than `ks`
    asks for.
    """
    found = {judge.name: judge for judge in map(find_target, targets)}
    if len(found) < len(targets):
        raise ConfigError(f"the targets have equal names, rename a root: {', '.join(found)} stand for {len(targets)}")
    first = next(iter(found.values()))
    inputs = {"items": first.source(first.evaluation, "items")}
    for name, judge in found.items():
        if judge.evaluation.inputs["items"] != first.evaluation.inputs["items"]:
            raise ConfigError(
                f"{name} and {first.name} were evaluated on different items, so they cannot be compared from what they "
                "stored; `spct evaluate` judges the same items with both"
            )
        if min(ks) < 1 or max(ks) > judge.config.k_max:
            raise ConfigError(
                f"--k must name numbers from 1 to {judge.config.k_max}, the samples an item that {name} drew, not {ks}"
            )
        directory = step_directory(judge.root, judge.evaluation.name, judge.evaluation.id)
        inputs |= {f"evaluate_{name}": directory, f"model_{name}": judge.judge_model}
        if judge.scores and judge.meta_model:
            scores = step_directory(judge.root, judge.scores.name, judge.scores.id)
            inputs |= {f"meta_scores_{name}": scores, f"meta_{name}": judge.meta_model}
    Path(out).mkdir(parents=True, exist_ok=True)
    context = StepContext("report", seed, out, inputs, command)
    return str(report.run(context, report.ReportConfig(tuple(ks)), None)["summary_text"])


def _reads(record: StepRecord, source: StepRecord) -> bool:
    return any(found["id"] == source.id for found in record.inputs.values())
