"""GRPO's rollouts: which prompts a step shows, the engines that answer, what the answers are worth, and their files.

Prompts and rewards (Eq. 10, 11) are functions of the run's seed, the step's number and what was sampled, so a resumed
run asks what it would have asked. `Rollouts` is what the ranks see of the engines; the loop is `stages.grpo`.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from spct_ray.chat import encode_prompt
from spct_ray.cluster.tokenise import encode_all
from spct_ray.data.store import read_items, write_rows
from spct_ray.engines.base import LORA_LAYERS, LORA_RANKS, EngineConfig, Request, SamplingParams
from spct_ray.errors import DataError, ParityError
from spct_ray.files import write_atomically
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import JudgeTask, to_trajectory
from spct_ray.judge.orders import balanced_orders
from spct_ray.judge.parse import Failure, after_thinking, has_three_parts
from spct_ray.judge.prompt import JudgeConfig, judge_messages
from spct_ray.judge.rule import is_correct, is_ordered
from spct_ray.judge.seeds import derive_seed
from spct_ray.learn.train_config import LoraConfig
from spct_ray.precision import resolve
from spct_ray.records import Completion, Item, Message, Record, StopReason, Trajectory

if TYPE_CHECKING:
    from spct_ray.cluster.pool import EnginePool
    from spct_ray.cluster.sync import Parity
    from spct_ray.learn.trainer import Trainer
    from spct_ray.stages.grpo import GrpoConfig, GrpoResources

T = TypeVar("T")
_Sampled = tuple[list[list["Rollout"]], float]  # groups, and the seconds that they took
RewardRule = Literal["best", "expected", "order", "both_orders"]
PARSED_OUTCOMES = ("correct", "tied", "wrong", "misordered", "inconsistent")
_PARITY_TOKENS, _PARITY_ITEMS = 1000, 64  # compared after each sync: at least so many, of at most so many items


@dataclass(frozen=True, slots=True)
class Rollout(Record):
    """One sampled judgement as training data.

    `outcome` is "correct", a `Failure`, or why it is not rewarded: "wrong" or "tied" (another response scores higher
    than, or as high as, the best one) or, where Eq. 10 holds but the reward asks for more, "misordered" (the scores do
    not follow the order of the given rewards) or "inconsistent" (its twin of the other order is not right).
    """

    item_id: str
    token_ids: tuple[int, ...]  # prompt and completion
    num_prompt_tokens: int
    engine_logprobs: tuple[float, ...]  # of the completion's tokens
    outcome: str
    well_formed: bool  # has scores and the three parts
    reward: float
    stop_reason: StopReason
    weight_version: int


def tasks_of_step(
    items: Sequence[Item], num_prompts: int, step: int, seed: int, orders_per_item: int = 1
) -> list[JudgeTask]:
    """The step's prompts: the items in a new random order each epoch, response orders balanced within the step.

    With `orders_per_item` 2 each item has two prompts, one after the other, the second with its responses reversed:
    every two responses then stand both ways round.
    """
    num_items = num_prompts // orders_per_item
    picked = []
    for place in range(step * num_items, (step + 1) * num_items):
        epoch, offset = divmod(place, len(items))
        picked.append(items[_epoch_order(len(items), epoch, seed)[offset]])
    counts = Counter(len(item.responses) for item in picked)
    orders = {n: iter(balanced_orders(n, c, derive_seed(seed, "orders", step, n))) for n, c in counts.items()}
    tasks: list[JudgeTask] = []
    for item in picked:
        order = next(orders[len(item.responses)])
        for shown in (order, order[::-1])[:orders_per_item]:
            place = step * num_prompts + len(tasks)
            tasks.append(JudgeTask(item, shown, place, 1.0, derive_seed(seed, step, place, item.id)))
    return tasks


@functools.lru_cache(maxsize=2)  # a step touches at most two epochs, unless it is longer than an epoch
def _epoch_order(num_items: int, epoch: int, seed: int) -> list[int]:
    return random.Random(derive_seed(seed, "epoch", epoch)).sample(range(num_items), num_items)


def request_of(task: JudgeTask, judge: JudgeConfig, group_size: int) -> Request:
    """G samples of the same prompt, at temperature 1: any other would not sample from the policy that is trained."""
    params = SamplingParams(judge.budget, task.temperature, task.seed, n=group_size, logprobs=True)
    return Request(judge_messages(task.item, task.order, judge), params)


def to_groups(
    tasks: Sequence[JudgeTask],
    answers: Sequence[Sequence[Completion]],
    judge: JudgeConfig,
    rule: RewardRule,
    format_weight: float,
) -> list[list[Rollout]]:
    """The answers to `tasks` as groups of rollouts, each rewarded +1 where it is right by `rule`, else -1 (Eq. 11).

    best: Eq. 10. expected: Eq. 10, but a judgement that gives the best score to m responses, the best one among them,
    gets 2 / m - 1, which is what breaking its tie at random would get on average: by Eq. 10 alone a guess pays more
    than a tie, and judges learn to guess by place. order: the scores follow the order of the given rewards, see
    `judge.rule.is_ordered`. both_orders: rollout g of a prompt and rollout g of the same item's other prompt are right
    where both are by Eq. 10, which takes tasks of two orders an item. Unparsable ones are never right; `format_weight`
    is added where a judgement has scores and the three parts.
    """
    groups = [
        [to_rollout(task, judge, completion, rule, format_weight) for completion in completions]
        for task, completions in zip(tasks, answers, strict=True)
    ]
    if rule != "both_orders":
        return groups
    for i in range(0, len(groups), 2):
        if len(tasks[i].order) > 1:  # a single response has one order, and its groups stand for themselves
            one, other = groups[i : i + 2]
            groups[i : i + 2] = _consistent(one, other, format_weight), _consistent(other, one, format_weight)
    return groups


def _consistent(group: Sequence[Rollout], twins: Sequence[Rollout], format_weight: float) -> list[Rollout]:
    return [
        replace(rollout, outcome="inconsistent", reward=_reward("inconsistent", rollout.well_formed, format_weight))
        if rollout.outcome == "correct" and twin.outcome != "correct"
        else rollout
        for rollout, twin in zip(group, twins, strict=True)
    ]


def to_rollout(
    task: JudgeTask, judge: JudgeConfig, completion: Completion, rule: RewardRule, format_weight: float
) -> Rollout:
    """Parse and compare with the truth; an unparsable judgement has its failure as outcome."""
    trajectory = to_trajectory(task, judge, text=completion.text, stop_reason=completion.stop_reason, model="policy")
    outcome = outcome_of(trajectory, task.item, rule)
    well_formed = not trajectory.failure and has_three_parts(after_thinking(trajectory.text) or "")
    share = 1 / trajectory.scores.count(max(trajectory.scores)) if rule == "expected" and outcome == "tied" else 0.0
    return Rollout(
        item_id=task.item.id,
        token_ids=completion.prompt_token_ids + completion.token_ids,
        num_prompt_tokens=len(completion.prompt_token_ids),
        engine_logprobs=completion.logprobs,
        outcome=outcome,
        well_formed=well_formed,
        reward=_reward(outcome, well_formed, format_weight, share),
        stop_reason=completion.stop_reason,
        weight_version=completion.weight_version,
    )


def _reward(outcome: str, well_formed: bool, format_weight: float, share: float = 0.0) -> float:
    return 2 * (1.0 if outcome == "correct" else share) - 1 + format_weight * well_formed


def outcome_of(trajectory: Trajectory, item: Item, rule: RewardRule) -> str:
    """See `Rollout.outcome`; "inconsistent" takes two rollouts and is not found here."""
    if trajectory.failure:
        return trajectory.failure
    if is_correct(trajectory.scores, item.rewards):
        ordered = rule != "order" or is_ordered(trajectory.scores, item.rewards)
        return "correct" if ordered else "misordered"
    best = trajectory.scores[item.best]
    others = [s for i, s in enumerate(trajectory.scores) if i != item.best]
    return "tied" if others and best == max(others) else "wrong"


def has_signal(group: Sequence[Rollout]) -> bool:
    """Whether the rewards of a group differ; else all of its advantages are 0."""
    return len({rollout.reward for rollout in group}) > 1


def sample_groups(
    tasks: Sequence[JudgeTask],
    ask: Callable[[Sequence[JudgeTask]], list[list[Rollout]]],
    num_prompts: int,
    orders_per_item: int = 1,
) -> list[list[Rollout]]:
    """The groups of the first `num_prompts` tasks, and of as many further ones as were without signal, until there are
    `num_prompts` with one or the tasks do not suffice for another round (DAPO's dynamic sampling, arXiv 2503.14476,
    Section 3.2). The number of tasks thus bounds the rounds; with `num_prompts` of them there is one.
    """
    groups = ask(tasks[:num_prompts])
    for _ in range(len(tasks) // num_prompts - 1):
        missing = num_prompts - len(with_signal(groups, orders_per_item))
        if missing == 0:
            break
        groups += ask(tasks[len(groups) : len(groups) + missing])
    return groups


def with_fresh_groups(
    groups: Sequence[list[Rollout]],
    tasks: Sequence[JudgeTask],
    ask: Callable[[Sequence[JudgeTask]], list[list[Rollout]]],
    oldest: int,
    orders_per_item: int = 1,
) -> list[list[Rollout]]:
    """The groups of the first tasks; items with a sample from weights older than version `oldest` are asked again."""
    starts = range(0, len(groups), orders_per_item)
    stale = [
        place
        for start in starts
        if any(r.weight_version < oldest for group in groups[start : start + orders_per_item] for r in group)
        for place in range(start, start + orders_per_item)
    ]
    again = dict(zip(stale, ask([tasks[place] for place in stale]) if stale else (), strict=True))
    return [again.get(place, group) for place, group in enumerate(groups)]


def with_signal(groups: Sequence[Sequence[Rollout]], orders_per_item: int = 1) -> list[Sequence[Rollout]]:
    """The groups that have a signal; the groups of one item stay together."""
    items = [groups[i : i + orders_per_item] for i in range(0, len(groups), orders_per_item)]
    return [group for item in items if any(map(has_signal, item)) for group in item]


def rollout_metrics(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Reward, share of each outcome (every one is always listed), groups without signal, lengths in tokens.

    `weight_version` is the oldest that a sample was made with; a synchronous loop has the step's number here.
    """
    rollouts = [rollout for group in groups for rollout in group]
    outcomes = Counter(rollout.outcome for rollout in rollouts)
    completion_tokens = [len(rollout.engine_logprobs) for rollout in rollouts]
    num = len(rollouts)
    return {
        "reward": statistics.fmean(rollout.reward for rollout in rollouts),
        **{f"share_{name}": outcomes[name] / num for name in PARSED_OUTCOMES},
        **{f"share_unparsable_{failure}": outcomes[failure] / num for failure in Failure},
        "share_well_formed": statistics.fmean(rollout.well_formed for rollout in rollouts),
        "zero_signal_groups": statistics.fmean(not has_signal(group) for group in groups),
        "truncated": statistics.fmean(rollout.stop_reason == "length" for rollout in rollouts),
        "prompt_tokens_mean": statistics.fmean(rollout.num_prompt_tokens for rollout in rollouts),
        "completion_tokens_mean": statistics.fmean(completion_tokens),
        "completion_tokens_max": max(completion_tokens),
        "weight_version": min(rollout.weight_version for rollout in rollouts),
    }


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

        from spct_ray.learn.batch import packed_rows

        prompts, num_shared = self._parity_prompts
        logps = [list[float]() for _ in prompts]
        for indices, row in packed_rows(prompts, [num_shared] * len(prompts), self._micro_tokens)[0]:
            with torch.no_grad():
                values = row.split(self._trainer.logprobs(row).cpu())
            for i, of_prompt in zip(indices, values, strict=True):
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
    path, file = str(Path(context.inputs["items"]) / "train.parquet"), Path(context.out, "fitting.json")
    items = read_items(path)
    if not file.exists():
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
        write_atomically(file, json.dumps(fitting).encode())
    return [items[place] for place in json.loads(file.read_text())]


def _prompt_length(tokenizer: Any, messages: Sequence[Message]) -> int:
    return len(encode_prompt(tokenizer, messages))


_SCHEMA = pa.schema(
    [
        ("group", pa.int32()),
        ("item_id", pa.string()),
        ("text", pa.string()),  # of the completion; for reading only
        ("outcome", pa.string()),
        ("well_formed", pa.bool_()),
        ("reward", pa.float64()),
        ("stop_reason", pa.string()),
        ("weight_version", pa.int64()),
        ("num_prompt_tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("engine_logprobs", pa.list_(pa.float64())),
    ]
)


class RolloutDump:
    """The directory rollouts/ of a step's directory, with a file step-00000012.parquet for each GRPO step in it."""

    def __init__(self, out: str | Path) -> None:
        self._directory = Path(out) / "rollouts"

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}.parquet"

    def write(self, step: int, groups: Sequence[Sequence[Rollout]], tokenizer: Any) -> None:
        """All groups of a step, whole or not at all; a step that is done again replaces its file."""
        rows = [
            {**r.to_row(), "group": number, "text": tokenizer.decode(list(r.token_ids[r.num_prompt_tokens :]))}
            for number, group in enumerate(groups)
            for r in group
        ]
        self._directory.mkdir(exist_ok=True)
        write_rows(str(self._path(step)), rows, _SCHEMA)

    def read(self, step: int) -> list[list[Rollout]]:
        """What `write` was given."""
        groups: list[list[Rollout]] = []
        for row in pq.read_table(self._path(step)).to_pylist():
            if row["group"] == len(groups):
                groups.append([])
            groups[-1].append(Rollout.from_row(row))
        return groups

    def steps(self) -> list[int]:
        """Which steps have a file, in order."""
        return sorted(int(path.stem.removeprefix("step-")) for path in self._directory.glob("step-*.parquet"))

    def prune(self, first_step: int) -> None:
        """Delete the files of steps before `first_step`."""
        for step in self.steps():
            if step < first_step:
                self._path(step).unlink()
