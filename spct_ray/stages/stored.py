"""`spct evaluate --stored`: a report on judges of finished runs from what their own evaluations stored.

Nothing is generated or scored again, so it takes seconds and needs neither Ray nor an engine; the judges must have been
evaluated on the same items. Other items, or more samples of them: `spct_ray.stages.evaluation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spct_ray.errors import ConfigError
from spct_ray.graph.step import StepContext
from spct_ray.graph.targets import find_judge, parse_target
from spct_ray.stages import report
from spct_ray.stages.evaluate import config_of


def report_stored(targets: Sequence[str], ks: Sequence[int], seed: int, out: str, command: str) -> str:
    """Write the report of `stages.report` on the judges' stored judgements to the directory `out`; returns its text.

    Raises ConfigError for targets that are no runs, were evaluated on different items, or with fewer samples than `ks`
    asks for.
    """
    found = {judge.name: judge for judge in (find_judge(parse_target(target)) for target in targets)}
    if len(found) < len(targets):
        raise ConfigError(f"the targets have equal names, rename a root: {', '.join(found)} stand for {len(targets)}")
    first = next(iter(found.values()))
    inputs = {"items": first.source(first.evaluation, "items")}
    for name, judge in found.items():
        if judge.items != first.items:
            raise ConfigError(
                f"{name} and {first.name} were evaluated on different items, so they cannot be compared from what they "
                "stored; `spct evaluate` judges the same items with both"
            )
        k_max = config_of(judge.directory).k_max
        if min(ks) < 1 or max(ks) > k_max:
            raise ConfigError(
                f"--k must name numbers from 1 to {k_max}, the samples an item that {name} drew, not {ks}"
            )
        inputs |= {f"evaluate_{name}": judge.directory, f"model_{name}": judge.judge_model}
        if judge.scores and judge.meta_model:
            inputs |= {f"meta_scores_{name}": judge.scores.directory(judge.root), f"meta_{name}": judge.meta_model}
    Path(out).mkdir(parents=True, exist_ok=True)
    context = StepContext("report", seed, out, inputs, command)
    return str(report.run(context, report.ReportConfig(tuple(ks)), None)["summary_text"])
