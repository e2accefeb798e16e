"""Which model a word of a command line means: RUN (its last judge), RUN:rft (one of JUDGES), or a model directory.

Everything about a judge of a run is read from the records of its finished steps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spct_ray.errors import ConfigError
from spct_ray.graph.record import StepRecord, finished_records, local_root, read_record, step_directory

JUDGES = ("base", "rft", "grpo")  # of a run, the last finished one is its judge
SCALAR = "bradley_terry"  # a run's scalar reward model


@dataclass(frozen=True)
class Target:
    """The root of a run and which of its judges ("": its last), or a model directory."""

    run: str = ""
    judge: str = ""
    model: str = ""


@dataclass(frozen=True)
class RunJudge:
    """A run's finished evaluation of one judge, and the meta RM's scores of it, if there are any."""

    root: str
    evaluation: StepRecord
    scores: StepRecord | None

    @property
    def name(self) -> str:
        """The run's and the judge's, e.g. "demo_grpo"."""
        return f"{clean(Path(self.root).name)}_{self.evaluation.name.removeprefix('evaluate_')}"

    @property
    def directory(self) -> str:
        """The directory of the evaluation."""
        return self.evaluation.directory(self.root)

    @property
    def judge_model(self) -> str:
        """The directory of the step that made the judge."""
        return self.source(self.evaluation, "judge")

    @property
    def meta_model(self) -> str | None:
        """The directory of the step that made the meta RM."""
        return self.source(self.scores, "meta") if self.scores else None

    @property
    def items(self) -> tuple[str, Any]:
        """The id of the step whose items were judged, and the digests of them that it recorded (of hub data, two steps
        with one id can have read two revisions)."""
        record = read_record(self.source(self.evaluation, "items"))
        return self.evaluation.inputs["items"]["id"], record.metrics.get("content") if record else None

    def source(self, record: StepRecord, role: str) -> str:
        """The directory of one of the record's inputs."""
        return step_directory(self.root, record.inputs[role]["step"], record.inputs[role]["id"])


def parse_target(text: str) -> Target:
    """What the text names, by what lies on the disk. Raises ConfigError where that is neither run nor model."""
    root, _, judge = text.rpartition(":")
    for run, which in ((text, ""), (root, judge)):
        if run and (Path(run) / "steps").is_dir():
            return Target(run=run, judge=which)
    if (Path(text) / "config.json").is_file():
        return Target(model=text)
    raise ConfigError(
        f"{text} is no run (no steps/ in it), no model directory (no config.json in it), no YAML file and no http URL. "
        "`spct run demo` makes a run under runs/demo"
    )


def find_judge(target: Target, judges: Sequence[str] = JUDGES[::-1]) -> RunJudge:
    """The newest finished evaluation of the target's judge; without one, of the first of `judges` that was evaluated.

    Raises ConfigError where the target is no run, or the judge is none of JUDGES or not yet evaluated.
    """
    if target.model:
        raise ConfigError(f"{target.model} is no run (no steps/ in it)")
    if target.judge and target.judge not in JUDGES:
        raise ConfigError(f"{target.run}:{target.judge}: a run's judges are {', '.join(JUDGES)}, not {target.judge!r}")
    root, judges = local_root(target.run), (target.judge,) if target.judge else judges
    records = finished_records(root)
    newest = {record.name: record for record in records}
    found = next((newest[f"evaluate_{name}"] for name in judges if f"evaluate_{name}" in newest), None)
    if found is None:
        raise ConfigError(f"{root}: no finished evaluation of {' or '.join(judges)}; finish the run (`spct run`) first")
    scored = [r for r in records if r.name == "meta_scores" and found.id in (s["id"] for s in r.inputs.values())]
    return RunJudge(root, found, scored[-1] if scored else None)


def newest_step(target: Target, name: str) -> tuple[StepRecord, str]:
    """The record and the directory of a run's newest finished step of that name. Raises ConfigError without one."""
    root = local_root(target.run)
    records = [record for record in finished_records(root) if record.name == name]
    if not records:
        raise ConfigError(
            f"{root}: no finished step {name}; name it in the recipe and finish the run (`spct run`) first"
        )
    return records[-1], records[-1].directory(root)


def clean(name: str) -> str:
    """The name with a dash for all that has a meaning in names of steps and judges."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name)
