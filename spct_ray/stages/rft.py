"""Rejective fine-tuning, the cold start: SFT of the student on accepted judgements, mixed with general instructions.

Which judgements are accepted is in `stages.select`, how training runs in `stages.supervised`.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spct_ray.data.program import exercises
from spct_ray.errors import ConfigError, DataError
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.judge.seeds import derive_seed
from spct_ray.learn.examples import Example, make_example, write_examples
from spct_ray.learn.train_config import OptimConfig, TrainResources
from spct_ray.records import Message
from spct_ray.stages.supervised import SupervisedConfig, Task, encoded, run_on_ranks


@dataclass(frozen=True)
class RftConfig(SupervisedConfig):
    """The paper's values: lr 5e-6, batch 1024, 900 steps. `batch_size` counts examples of both kinds, `epochs` are over
    the judgements.

    General instructions are mixed in: `general_paths` are JSONL or Parquet files with rows {messages} (the last turn is
    the assistant's) or {prompt, completion}, `general_builtin` is a number of `data.program.exercises`, which stand in
    for them in the built-in set. `general_shares` are their shares of a batch (paper: 0.85), one for each of as many
    equal parts of the training. The run's `items.builtin.kinds` become `kinds`, of which the exercises are, too.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-6, warmup_steps=30))
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    general_paths: tuple[str, ...] = ()
    general_builtin: int = 0
    general_shares: tuple[float, ...] = (0.0,)
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.general_shares or not all(0 <= share < 1 for share in self.general_shares):
            raise ConfigError(f"rft.general_shares is {self.general_shares}; each share is at least 0 and below 1")
        if any(self.general_shares) != bool(self.general_paths or self.general_builtin):
            raise ConfigError(
                f"rft.general_shares is {self.general_shares}, but rft.general_paths is {self.general_paths} and "
                f"rft.general_builtin is {self.general_builtin}: to mix in general instructions, give files (or a "
                "number of built-in ones) and a share above 0, e.g. general_shares=[0.85]; to mix in none, give neither"
            )


@stage(version=3)
def run(context: StepContext, config: RftConfig, resources: TrainResources) -> dict[str, Any]:
    """Train input "student" on input "select"; writes model/, metrics.jsonl and checkpoints/.

    Raises DataError when no example is short enough, SpctError when training diverges.
    """
    task = Task("student", "sft", ("examples.arrow", "general.arrow"), config.general_shares)
    return run_on_ranks(context, config, resources, task, write_training_file)


def write_training_file(context: StepContext, config: RftConfig) -> dict[str, int]:
    """Tokenise judgements into examples.arrow, general instructions into general.arrow; counts of what was kept and
    dropped."""
    import pyarrow.parquet as pq

    model_dir = str(Path(context.inputs["student"]) / "model")
    path = Path(context.inputs["select"]) / "sft.parquet"
    judgements = pq.read_table(path, columns=["prompt", "completion"]).to_pylist()
    drawn = exercises(config.general_builtin, config.judge, derive_seed(context.seed, "general"), config.kinds)
    general = [_as_prompt_and_completion(row, "built-in") for row in drawn]
    general += itertools.chain.from_iterable(map(_general_rows, config.general_paths))
    counts: dict[str, int] = {}
    for kind, file, rows in (("judgements", "examples", judgements), ("general", "general", general)):
        dropped: Counter[str] = Counter()
        kept = (example for _, example in encoded(model_dir, encode, rows, config.max_tokens, dropped))
        counts[kind] = write_examples(f"{context.out}/{file}.arrow", kept)
        counts |= {f"{kind}_{reason}": number for reason, number in dropped.items()}
    if not counts["judgements"]:
        raise DataError(
            f"{path}: none of {len(judgements)} judgements has at most {config.max_tokens} tokens; raise rft.max_tokens"
        )
    if any(config.general_shares) and not counts["general"]:
        raise DataError(f"no general instruction has at most {config.max_tokens} tokens; raise rft.max_tokens")
    return counts


def encode(tokenizer: Any, row: Mapping[str, Any]) -> Example:
    """Row {prompt: messages, completion: text} as token ids."""
    return make_example(tokenizer, [Message(**m) for m in row["prompt"]], row["completion"])


def _general_rows(path: str) -> Iterator[dict[str, Any]]:
    """Rows {prompt, completion} of one file of general instructions. Raises DataError with file and row."""
    import pyarrow.parquet as pq

    if path.endswith(".parquet"):
        rows: list[Any] = pq.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        yield _as_prompt_and_completion(row, f"{path}, row {number}")


def _as_prompt_and_completion(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    if row.get("messages"):
        *prompt, last = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        if not prompt or last["role"] != "assistant":
            raise DataError(f"{where}: messages must have a prompt and end with an assistant's turn")
        return {"prompt": prompt, "completion": last["content"]}
    if not isinstance(row.get("prompt"), str) or not isinstance(row.get("completion"), str):
        raise DataError(f"{where}: needs messages, or prompt and completion as texts; has {sorted(row)}")
    return {"prompt": [{"role": "user", "content": row["prompt"]}], "completion": row["completion"]}
