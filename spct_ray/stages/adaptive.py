"""What adaptive k saves, and how often it decides otherwise than all k samples, on the samples of finished evaluations.

Reads a run's (or an evaluation's) steps, generates nothing and writes nothing. The rule is spct_ray/judge/adaptive.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spct_ray.errors import ConfigError
from spct_ray.graph.record import StepRecord, finished_records, local_root, step_directory
from spct_ray.judge.prompt import JudgeConfig, scale_of
from spct_ray.records import Item, Trajectory

_EVALUATIONS = tuple(f"spct_ray.stages.evaluate:{name}" for name in ("run", "run_both_orders", "run_endpoint"))


@dataclass(frozen=True)
class Saving:
    """One judge under one rule: what it needed, as shares of k_max samples, and what its decisions were worth.

    `equal` is the share of the items decided as by all k_max samples (chance ties counted as chances), with its 95 %
    bootstrap interval over items; the accuracies break ties at random.
    """

    judge: str
    item_set: str
    guided: bool
    error: float
    k_max: int
    num_items: int
    mean_k: float
    share_of_tokens: float
    equal: float
    equal_ci: tuple[float, float]
    accuracy: float
    accuracy_k_max: float


def savings(root: str, errors: Sequence[float], seed: int = 0) -> Iterator[Saving]:
    """One `Saving` for each finished evaluation under `root`, each of its sets of items, each way to vote and each of
    `errors`. Raises ConfigError where there is no evaluation with two samples an item."""
    root = local_root(root)
    records = finished_records(root)
    found = [r for r in records if r.function in _EVALUATIONS and r.config["k_max"] > 1]
    if not found:
        raise ConfigError(
            f"{root}: no finished evaluation of two samples or more; finish `spct run` or `spct evaluate`"
        )
    for record in found:
        yield from _savings_of(root, record, records, errors, seed)


def _savings_of(
    root: str, record: StepRecord, records: Sequence[StepRecord], errors: Sequence[float], seed: int
) -> Iterator[Saving]:
    from spct_ray.benchmarks.curves import tabulate
    from spct_ray.benchmarks.evaluation import stop_early
    from spct_ray.benchmarks.metrics import bootstrap_ci
    from spct_ray.benchmarks.sheet import Sheet, best_credit
    from spct_ray.cluster.sampling import read_trajectories
    from spct_ray.data.store import judged_files, read_items

    judge = record.name.removeprefix("evaluate_")
    prompt = JudgeConfig(**record.config["judge"] | {"single": record.config["single"]})
    scale = scale_of(1, prompt)
    logits = _logits(root, record, judge, records)
    sampled: dict[str, list[Trajectory]] = {}
    for t in read_trajectories(step_directory(root, record.name, record.id)):
        if t.temperature:
            sampled.setdefault(t.item_id, []).append(t)
    source = record.inputs["items"]
    for item_set, file in judged_files(step_directory(root, source["step"], source["id"])).items():
        items: list[Item] = read_items(str(file))
        samples = [sorted(sampled[item.id], key=lambda t: t.sample) for item in items]
        table = tabulate(items, [t for drawn in samples for t in drawn], (scale.low + scale.high) / 2, logits)
        sheet, scales = Sheet.of(items), [scale_of(len(item.responses), prompt) for item in items]
        for guided in (False, True) if logits else (False,):
            for error in errors:
                early = stop_early(sheet, table, samples, scales, guided, error)
                equal_I = 1 - early.differ_I
                yield Saving(
                    judge,
                    item_set,
                    guided,
                    error,
                    table.num_samples,
                    len(items),
                    float(early.needed_I.mean()),
                    early.share_of_tokens,
                    float(equal_I.mean()),
                    bootstrap_ci(equal_I, seed),
                    *(float(best_credit(sheet, d.scores_IO).mean()) for d in (early.decision, early.last)),
                )


def _logits(root: str, record: StepRecord, judge: str, records: Sequence[StepRecord]) -> Mapping[str, Any] | None:
    """The meta RM's logit of each parsed judgement of `record`, where a finished step scored them."""
    import pyarrow.parquet as pq

    for scored in reversed(records):
        if scored.function != "spct_ray.stages.meta_scores:run":
            continue
        if record.id in [source["id"] for source in scored.inputs.values()]:
            rows = pq.read_table(Path(step_directory(root, scored.name, scored.id), "logits.parquet")).to_pylist()
            return {row["key"]: row["logit"] for row in rows if row["model"] == judge}
    return None
