"""Judging at scale on Ray Data: tasks in, trajectories out as Parquet, resumable block by block.

Every task is a row with a unique key. Ray Data's row-level checkpoint notes which keys are on disk (two phases, so that
a row is written once or not at all), and a second call does only the rest. A Ray Data actor sends its blocks to an
engine of a pool, or judges them itself, by a program or an endpoint; Ray replaces it when it dies and sends its block
again.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from spct_ray.cluster.pool import MAX_RESTARTS
from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.errors import EngineError
from spct_ray.files import replacing
from spct_ray.judge.judge import Judge, JudgeTask
from spct_ray.records import Item, Trajectory

TRAJECTORY_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("item_id", pa.string()),
        ("sample", pa.int32()),
        ("order", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("scores", pa.list_(pa.int32())),
        ("failure", pa.string()),
        ("hinted", pa.bool_()),
        ("guided", pa.bool_()),
        ("temperature", pa.float64()),
        ("seed", pa.int64()),
        ("model", pa.string()),
        ("weight_version", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("stop_reason", pa.string()),
        ("num_prompts", pa.int32()),
    ]
)


class _Counter:
    """Judgements, tokens and busy seconds so far, told by the judges as they go."""

    def __init__(self) -> None:
        self._totals = {"judgements": 0, "tokens": 0, "failures": 0, "engine_seconds": 0.0}

    def add(self, made: Mapping[str, float]) -> None:
        for name, value in made.items():
            self._totals[name] += value

    def totals(self) -> dict[str, float]:
        return self._totals


class _JudgeBlocks:
    """The map function: one judge per actor, one block of task rows per call."""

    def __init__(self, make_judge: Callable[[], Judge], counter: Any) -> None:
        self._judge, self._counter = make_judge(), counter

    def __call__(self, block: pa.Table) -> pa.Table:
        tasks = [_task_from_row(row) for row in block.to_pylist()]
        started = time.monotonic()
        try:
            made = self._judge.judge(tasks)
        except EngineError as error:
            # Ray replaces a dead actor and sends its block again, but not one that raises: so die.
            print(f"judge engine died, the actor is replaced: {error}", flush=True)
            os._exit(1)
        self._counter.add.remote(
            {
                "judgements": len(made),
                "tokens": sum(t.completion_tokens for t in made),
                "failures": sum(bool(t.failure) for t in made),
                "engine_seconds": time.monotonic() - started,
            }
        )
        return pa.Table.from_pylist([{"key": t.key, **t.to_row()} for t in made], schema=TRAJECTORY_SCHEMA)


def sample(
    tasks: Sequence[JudgeTask],
    make_judge: Callable[[], Judge],
    out: str,
    resources: SamplingResources,
    progress: Callable[[int, int, str, str], None],
) -> dict[str, float]:
    """Judge all `tasks`, write `out`/trajectories/*.parquet, and return {seconds, tokens, judgements, failures, ...}.

    Called again after a kill with the same tasks, it keeps what is on disk and judges the rest. Figures are of this
    call. Raises EngineError when a judge died more than MAX_RESTARTS times.
    """
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig

    root = Path(out)
    num_blocks = _write_tasks(tasks, root / "tasks", resources.block_size)
    counter = ray.remote(_Counter).options(num_cpus=0).remote()
    context = DataContext.get_current()
    context.use_datasource_v2 = False  # it reads small files as one block, and blocks are the unit of resume here
    context.checkpoint_config = CheckpointConfig(
        id_column="key", checkpoint_path=str((root / "checkpoint").resolve()), delete_checkpoint_on_success=False
    )
    no_cpu = {"num_cpus": 0}  # of small files: they must find a place where the judges take every CPU
    done_before = num_rows(root / "trajectories")
    started = time.monotonic()
    with _reporting(counter, done_before, len(tasks), progress):
        try:
            (
                ray.data.read_parquet(
                    str((root / "tasks").resolve()), override_num_blocks=num_blocks, ray_remote_args=no_cpu
                )
                .map_batches(
                    _JudgeBlocks,
                    fn_constructor_args=(make_judge, counter),
                    batch_size=None,
                    batch_format="pyarrow",
                    compute=ray.data.ActorPoolStrategy(size=min(resources.num_replicas, num_blocks)),
                    num_cpus=resources.cpus_per_replica,
                    num_gpus=resources.gpus_per_replica,
                    max_restarts=MAX_RESTARTS,
                    max_task_retries=MAX_RESTARTS,
                )
                .write_parquet(str((root / "trajectories").resolve()), ray_remote_args=no_cpu)
            )
        except ray.exceptions.RayActorError as error:
            raise EngineError(f"a judge died more than {MAX_RESTARTS} times; its last words are in the log") from error
    if (have := num_rows(root / "trajectories")) != len(tasks):
        raise EngineError(f"{root}: {have} trajectories for {len(tasks)} tasks; delete the directory and run again")
    timing = {"seconds": time.monotonic() - started, **ray.get(counter.totals.remote())}
    (root / "timing.json").write_text(json.dumps(timing))
    return timing


@contextlib.contextmanager
def _reporting(counter: Any, before: int, total: int, progress: Callable[[int, int, str, str], None]) -> Iterator[None]:
    """Report progress from the counter every two seconds while the body runs."""
    stop, started = threading.Event(), time.monotonic()

    def report() -> None:
        while not stop.wait(2.0):
            totals = ray.get(counter.totals.remote())
            if totals["judgements"]:
                rate = totals["tokens"] / (time.monotonic() - started)
                note = f"{rate:.0f} tok/s, unparsable {totals['failures'] / totals['judgements']:.1%}"
                progress(before + int(totals["judgements"]), total, "judgements", note)

    progress(before, total, "judgements", "starting judges")
    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _write_tasks(tasks: Sequence[JudgeTask], directory: Path, block_size: int) -> int:
    """Write one Parquet file per block, in place of those of an earlier call, which may have had another block size."""
    if not tasks:
        raise ValueError("nothing to judge")
    blocks = [tasks[start : start + block_size] for start in range(0, len(tasks), block_size)]
    with replacing(directory) as fresh:
        fresh.mkdir(parents=True)
        for number, block in enumerate(blocks):
            rows = pa.Table.from_pylist([_task_to_row(task) for task in block])
            pq.write_table(rows, fresh / f"block-{number:06d}.parquet")
    return len(blocks)


def _task_to_row(task: JudgeTask) -> dict[str, Any]:
    kind = "h" if task.hinted else "s" if task.temperature else "g"  # as Trajectory.key
    row = task.to_row()
    return {**row, "item": json.dumps(row["item"]), "key": f"{task.item.id}/{kind}{task.sample}"}


def _task_from_row(row: Mapping[str, Any]) -> JudgeTask:
    return JudgeTask.from_row({**row, "item": Item.from_row(json.loads(row["item"]))})


def num_rows(directory: Path) -> int:
    """Rows in all Parquet files of a directory (0 where there is none)."""
    return sum(pq.read_metadata(file).num_rows for file in sorted(directory.glob("*.parquet")))


def read_trajectories(step_dir: str) -> list[Trajectory]:
    """All trajectories that a finished sampling step wrote, ordered by item and key."""
    files = sorted((Path(step_dir) / "trajectories").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return sorted((Trajectory.from_row(row) for row in rows), key=lambda t: (t.item_id, t.key))
