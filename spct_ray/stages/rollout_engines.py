"""GRPO's engines as the ranks see them: new weights, the parity check, and the rollouts of a step, also one ahead.

Leaves out prompts and rewards (`rollouts.py`), the loop and the update (`grpo.py`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from spct_ray.chat import encode_prompt
from spct_ray.cluster.tokenise import encode_all
from spct_ray.data.store import read_items
from spct_ray.engines.base import LORA_LAYERS, LORA_RANKS, EngineConfig
from spct_ray.errors import DataError, ParityError
from spct_ray.graph.record import write_atomically
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.prompt import JudgeConfig, judge_messages
from spct_ray.judge.seeds import derive_seed
from spct_ray.learn.config import LoraConfig
from spct_ray.precision import resolve
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
    from spct_ray.cluster.sync import Parity
    from spct_ray.learn.trainer import Trainer
    from spct_ray.stages.grpo import GrpoConfig, GrpoResources

T = TypeVar("T")
_Sampled = tuple[list[list[Rollout]], float]  # groups, and the seconds that they took

_PARITY_TOKENS, _PARITY_ITEMS = 1000, 64  # compared after each sync: at least so many, of at most so many items


class Rollouts:
    """Rank 0 owns the pool and asks it, the others receive what it got.

    `seconds` is how long the engines worked for the rollouts that `sample` gave (0 on other ranks).
    """

    def __init__(
        self, trainer: Trainer, model_dir: str, context: StepContext, config: GrpoConfig, resources: GrpoResources
    ) -> None:
        import torch

        from spct_ray.cluster.pool import EnginePool
        from spct_ray.cluster.sync import Parity, SentWeights

        self._trainer, self._config, self._log = trainer, config, context.log
        on_gpu = resources.rollout.gpus_per_replica > 0
        engine = replace(resources.engine, lora_rank=adapter_rank(config.lora, trainer.model, resources.engine, on_gpu))
        engine_dtype = getattr(torch, resolve(engine.dtype, on_gpu=on_gpu))
        self._weights = SentWeights(trainer, engine_dtype, engine.lora_rank)
        self._micro_tokens = resources.train.micro_tokens
        self._tolerance = Parity(config.parity_mean, config.parity_p99)
        self._not_compared: list[str] | None = None
        self._shares_gpu = engine.transfer == "ipc"
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
            restarts = 3 if engine.transfer == "directory" else 0
            self._free_gpu()
            self._pool = EnginePool(model_dir, engine, resources.rollout, max_restarts=restarts)
        self._transfer = None
        if engine.transfer != "directory":
            from spct_ray.engines.vllm_transfer import WeightTransfer

            self._transfer = WeightTransfer(self._weights, self._pool, engine, resources.rollout.num_replicas)
        self._parity_prompts: tuple[list[list[int]], int] = self._from_rank_0(self._choose_parity_prompts)
        self._trainer_logprobs()  # under ZeRO-3, weights gathered before the first forward pass are not sound

    def _choose_parity_prompts(self) -> tuple[list[list[int]], int]:
        prompts, num_shared = parity_prompts(self._items, self._config.judge, self._trainer.tokenizer, self._seed)
        num_compared = sum(len(prompt) - num_shared for prompt in prompts)
        self._log(f"parity of trainer and engines is checked on {num_compared} tokens of {len(prompts)} items")
        return prompts, num_shared

    def push_weights(self, version: int) -> None:
        """Give the engines the trainer's weights. Collective."""
        from spct_ray.cluster.sync import push_weights

        if self._transfer is None:
            push_weights(self._weights, self._pool, self._weights_dir, version, self._weights.adapter_rank)
            return
        if self._shares_gpu and self._pool is not None:
            self._free_gpu()
            self._pool.wake()
        self._transfer.send(version)
        self._free_gpu()

    def _free_gpu(self) -> None:
        """On a shared GPU, give back what the trainer has freed but torch keeps: an engine cannot take it else."""
        if self._shares_gpu:
            import torch

            torch.cuda.empty_cache()

    def check_parity(self, step: int) -> Parity:
        """Whether the engines hold the weights that went out last, bit by bit, and compute the same with them.

        Returns the differences of log-probs over the parity prompts (0 on ranks without engines). Raises ParityError on
        rank 0 when a tensor differs in any engine, or a difference exceeds its tolerance. Collective.
        """
        from spct_ray.cluster.sync import Parity, check_parity
        from spct_ray.engines.checksums import compare

        trainer_logps = self._trainer_logprobs()
        if self._pool is None:
            return Parity(0.0, 0.0)
        prompts, num_shared = self._parity_prompts
        try:
            sent = self._weights.checksums()
            not_compared = compare(sent, self._pool.held_tensors(list(sent)))
            engine_logps = [logps[num_shared - 1 :] for logps in self._pool.prompt_logprobs(prompts)]
            parity = check_parity(trainer_logps, engine_logps, self._tolerance)
        except ParityError as error:
            raise ParityError(f"step {step}: {error}") from error
        if not_compared and not_compared != self._not_compared:
            self._log(f"weights that cannot be compared bit by bit between trainer and engines: {not_compared}")
        self._not_compared = not_compared
        return parity

    def _trainer_logprobs(self) -> list[list[float]]:
        import torch

        from spct_ray.learn.batch import make_batch, plan_rows

        prompts, num_shared = self._parity_prompts
        lengths, logps = [num_shared] * len(prompts), [list[float]() for _ in prompts]
        for row in plan_rows(prompts, lengths, micro_tokens=self._micro_tokens)[0]:
            batch = make_batch([prompts[i] for i in row], [num_shared] * len(row))
            with torch.no_grad():
                values = batch.split(self._trainer.logprobs(batch).cpu())
            for i, of_prompt in zip(row, values, strict=True):
                logps[i] = of_prompt.tolist()
        return logps

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


def adapter_rank(lora: LoraConfig, model: Any, engine: EngineConfig, on_gpu: bool) -> int:
    """The rank at which engines take the policy's adapters beside its frozen weights, 0 where they take the sum.

    The sum goes where vLLM has no adapter for a layer, by `nccl` and `ipc` (which are fast enough for whole weights),
    and on CPU, where vLLM gathers an adapter's weights for each token; there `engine.lora_rank` asks for adapters.
    """
    from spct_ray.learn.lora import whole_weights

    layers = {whole.name.split(".")[-2] for whole in whole_weights(model) if whole.layer is not None}
    if not layers or layers - set(LORA_LAYERS) or engine.transfer != "directory" or not (on_gpu or engine.lora_rank):
        return 0
    return next((rank for rank in LORA_RANKS if rank >= max(lora.rank, engine.lora_rank)), 0)


def parity_prompts(items: Sequence[Item], judge: JudgeConfig, tokenizer: Any, seed: int) -> tuple[list[list[int]], int]:
    """Prompts of different items, the same in every step, so that what differs between two checks is due to weights.

    Also how many tokens at their beginning are the template's, alike in all and not compared. What follows are at least
    1,000 tokens in all, where the items have so many.
    """
    tasks = tasks_of_step(items, min(len(items), _PARITY_ITEMS), 0, seed)
    prompts = [encode_prompt(tokenizer, judge_messages(task.item, task.order, judge)) for task in tasks]
    first, last = min(prompts), max(prompts)  # as all others lie between, what these two share all do
    differs = [place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b]
    num_shared = max(1, differs[0]) if differs else 1
    chosen: list[list[int]] = []
    num_compared = 0
    for prompt in prompts:
        if num_compared < _PARITY_TOKENS:
            chosen.append(prompt)
            num_compared += len(prompt) - num_shared
    return chosen, num_shared


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
