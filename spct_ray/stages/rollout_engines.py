"""GRPO's engines as the ranks see them: new weights, the parity check, and the rollouts of a step, also one ahead.

Leaves out prompts and rewards (`rollouts.py`), the loop and the update (`grpo.py`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from spct_ray.chat import encode_prompt
from spct_ray.cluster.tokenise import encode_all
from spct_ray.data.store import read_items
from spct_ray.errors import DataError, ParityError
from spct_ray.graph.record import write_atomically
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.prompt import judge_messages
from spct_ray.judge.seeds import derive_seed
from spct_ray.records import Item, Message
from spct_ray.stages.rollouts import (
    Rollout,
    request_of,
    sample_groups,
    tasks_of_step,
    to_groups,
    with_fresh_groups,
)

if TYPE_CHECKING:
    from spct_ray.cluster.pool import EnginePool
    from spct_ray.learn.trainer import Trainer
    from spct_ray.stages.grpo import GrpoConfig, GrpoResources

T = TypeVar("T")
_Sampled = tuple[list[list[Rollout]], float]  # groups, and the seconds that they took

_PARITY_SEQUENCES, PARITY_TOKENS = 4, 64  # every token's log-prob depends on all weights, so few of them tell


class Rollouts:
    """Rank 0 owns the pool and asks it, the others receive what it got.

    `seconds` is how long the engines worked for the rollouts that `sample` gave (0 on other ranks).
    """

    def __init__(
        self, trainer: Trainer, model_dir: str, context: StepContext, config: GrpoConfig, resources: GrpoResources
    ) -> None:
        from spct_ray.cluster.pool import EnginePool

        self._trainer, self._config = trainer, config
        self._seed = derive_seed(context.seed, context.name)
        self._weights_dir = str(Path(context.out, "weights"))
        self._items: list[Item] = []
        self._pool: EnginePool | None = None
        self.seconds = 0.0
        self._thread = ThreadPoolExecutor(1)
        self._ahead: tuple[int, Future[_Sampled]] | None = None
        if trainer.rank == 0:
            self._items = fitting_items(context, config)
            # An engine that takes weights by transfer belongs to a group; where it dies, the ranks start again.
            restarts = 3 if resources.engine.transfer == "directory" else 0
            self._pool = EnginePool(model_dir, resources.engine, resources.rollout, max_restarts=restarts)
        self._transfer = None
        if resources.engine.transfer != "directory":
            from spct_ray.engines.vllm_transfer import WeightTransfer

            self._transfer = WeightTransfer(trainer, self._pool, resources.engine, resources.rollout.num_replicas)
        self._shares_gpu = resources.engine.transfer == "ipc"
        self._parity_sequences: list[list[int]] = self._from_rank_0(self._choose_parity_sequences)
        self._trainer_logprobs()  # under ZeRO-3, weights gathered before the first forward pass are not sound

    def _choose_parity_sequences(self) -> list[list[int]]:
        """The same few prompts' first tokens in every step: their log-probs depend on the weights alone."""
        tasks = tasks_of_step(self._items, _PARITY_SEQUENCES, 0, self._seed)
        return [
            encode_prompt(self._trainer.tokenizer, judge_messages(task.item, task.order, self._config.judge))[
                :PARITY_TOKENS
            ]
            for task in tasks
        ]

    def push_weights(self, version: int) -> None:
        """Give the engines the trainer's weights. Collective."""
        from spct_ray.cluster.sync import push_weights

        if self._transfer is not None:
            if self._shares_gpu and self._pool is not None:
                self._pool.wake()
            self._transfer.send(version)
            return
        push_weights(self._trainer, self._pool, self._weights_dir, version)

    def check_parity(self, step: int) -> float:
        """Largest |dlogp| between trainer and engine over the parity prompts (0 on ranks without engines). Collective.

        Raises ParityError on rank 0 when it exceeds the tolerance.
        """
        from spct_ray.cluster.sync import check_parity

        trainer_logps = self._trainer_logprobs()
        if self._pool is None:
            return 0.0
        engine_logps = self._pool.prompt_logprobs(self._parity_sequences)
        try:
            return check_parity(trainer_logps, engine_logps, self._config.parity_tolerance)
        except ParityError as error:
            raise ParityError(f"step {step}: {error}") from error

    def _trainer_logprobs(self) -> list[list[float]]:
        import torch

        from spct_ray.learn.batch import make_batch

        batch = make_batch(self._parity_sequences, [1] * len(self._parity_sequences))
        with torch.no_grad():
            logp_N = self._trainer.logprobs(batch).cpu()
        return [values.tolist() for values in batch.split(logp_N)]

    def ask_ahead(self, step: int) -> None:
        """Let the engines begin with the rollouts of a later step; the caller trains meanwhile."""
        if self._pool is not None:
            self._ahead = step, self._thread.submit(self._ask, step)

    def wait(self) -> None:
        """Return when the engines have done what they were asked ahead. Raises what they raised."""
        if self._ahead is not None:
            self._ahead[1].result()

    def sample(self, step: int) -> list[list[Rollout]]:
        """The step's groups: G rollouts of each prompt, asked for now or ahead. Collective; the same on every rank.

        Engines that share the trainer's GPU sleep from then on until they are given new weights.

        Groups from weights that are more than `max_staleness` updates old are asked for again.
        """
        groups = self._from_rank_0(lambda: self._groups(step))
        if self._shares_gpu and self._pool is not None:
            self._pool.sleep()
        return groups

    def _groups(self, step: int) -> list[list[Rollout]]:
        if self._ahead is None or self._ahead[0] != step:
            groups, self.seconds = self._ask(step)
            return groups
        (groups, self.seconds), self._ahead = self._ahead[1].result(), None
        oldest = step - self._config.max_staleness
        return with_fresh_groups(groups, self._tasks(step), self._answer, oldest, self._config.orders_per_item)

    def _tasks(self, step: int) -> list[JudgeTask]:
        num_tasks = self._config.prompts_per_step * (1 + self._config.dynamic_sampling)
        return tasks_of_step(self._items, num_tasks, step, self._seed, self._config.orders_per_item)

    def _answer(self, tasks: Sequence[JudgeTask]) -> list[list[Rollout]]:
        config, pool = self._config, self._pool
        assert pool is not None
        answers = pool.generate([request_of(task, config.judge, config.group_size) for task in tasks])
        return to_groups(tasks, answers, config.judge, config.reward, config.format_weight)

    def _ask(self, step: int) -> _Sampled:
        started = time.monotonic()
        config = self._config
        groups = sample_groups(self._tasks(step), self._answer, config.prompts_per_step, config.orders_per_item)
        return groups, time.monotonic() - started

    def _from_rank_0(self, make: Callable[[], T]) -> T:
        import torch.distributed as dist

        box = [make() if self._trainer.rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        return cast("T", box[0])

    def close(self) -> None:
        """Stop the engines and remove the weights that were written for them."""
        if self._ahead is not None:
            self._ahead[1].exception()  # waits: the pool is for one caller at a time
        self._thread.shutdown()
        if self._pool is not None:
            self._pool.close()
            shutil.rmtree(self._weights_dir, ignore_errors=True)


def fitting_items(context: StepContext, config: GrpoConfig) -> list[Item]:
    """The training items whose prompt has at most `max_prompt_tokens`; the rest are counted in the log.

    Prompts are tokenised once, before any rank starts: `fitting.json` has the places of the items that fit.
    """
    path, found = str(Path(context.inputs["items"]) / "train.parquet"), Path(context.out, "fitting.json")
    items = read_items(path)
    if not found.exists():
        model_dir = str(Path(context.inputs["rft"]) / "model")
        prompts = [judge_messages(item, range(len(item.responses)), config.judge) for item in items]
        lengths = enumerate(encode_all(model_dir, _prompt_length, prompts))
        fitting = [place for place, length in lengths if length <= config.max_prompt_tokens]
        if not fitting:
            raise DataError(
                f"{path}: none of {len(items)} items has a prompt of at most {config.max_prompt_tokens} tokens"
            )
        if len(fitting) < len(items):
            context.log(
                f"{len(items) - len(fitting)} of {len(items)} items dropped: their prompt exceeds "
                f"max_prompt_tokens = {config.max_prompt_tokens}"
            )
        write_atomically(str(found), json.dumps(fitting).encode())
    return [items[place] for place in json.loads(found.read_text())]


def _prompt_length(tokenizer: Any, messages: Sequence[Message]) -> int:
    return len(encode_prompt(tokenizer, messages))
