"""Rule-based online RL of the judge (Eq. 10, 11, 15): GRPO on Ray Train ranks with vLLM rollout engines beside them.

`train_loop` is the method. Rank 0 owns the rollout engines and asks them; every rank trains on its share. The engines
die with rank 0's process, so a restarted loop starts new ones, and each step begins by giving them the trainer's
weights: no sample ever comes from other weights than those being trained. Prompts, rewards and engines are in
`rollouts.py`, the loss and its objectives in `learn/policy.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spct_ray.engines.base import EngineConfig, EngineResources
from spct_ray.errors import ConfigError
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.judge.modes import MODES
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.learn.metrics_file import MetricsFile, mean_of_last_tenth, read_metrics
from spct_ray.learn.train_config import LoraConfig, OptimConfig, PolicyLoss, TrainResources
from spct_ray.placement import check_engine
from spct_ray.stages.rollouts import (
    RewardRule,
    Rollout,
    RolloutDump,
    Rollouts,
    fitting_items,
    rollout_metrics,
    with_signal,
)

if TYPE_CHECKING:
    from spct_ray.learn.policy import Grpo, Reference, Sample
    from spct_ray.learn.trainer import Trainer


_ORDER_SLACK = 16  # tokens that a prompt may grow by when its responses are shown in another order


@dataclass(frozen=True)
class GrpoConfig(PolicyLoss):
    """The paper's values (27B): lr 4e-7, 900 steps, batch 512, G = 4, beta 0.08. The rest is ours.

    A step samples `prompts_per_step` x `group_size` rollouts and trains on them in `updates_per_batch` updates;
    `optim.warmup_steps` counts updates. An item whose prompt exceeds `max_prompt_tokens` is dropped at the start
    and counted. `parity_mean` and `parity_p99` bound |dlogp| between trainer and engine after a sync, in nats:
    twice what two correct programs in bf16 are expected to differ by (its logits of 16 to 32 have neighbours 0.125
    away). They are about arithmetic; stale weights are found by checksums, in any dtype. `reward` and
    `format_weight` are explained in `stages.rollouts.to_groups`, the settings of the loss in `PolicyLoss`.
    `dynamic_sampling` 0 trains on all groups; R > 0 on those with signal alone, after at most R further rounds that
    ask for as many items as are missing (see `stages.rollouts.sample_groups`). With `max_staleness` 1 the engines
    sample a step's rollouts while the step before is trained on, so from weights that are one step old.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=4e-7, schedule="constant"))
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    steps: int = 900
    prompts_per_step: int = 128
    group_size: int = 4
    reward: RewardRule = "best"
    format_weight: float = 0.0
    dynamic_sampling: int = 0
    max_staleness: Literal[0, 1] = 0
    max_prompt_tokens: int = 3000
    parity_mean: float = 0.02
    parity_p99: float = 0.12
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts_per_step % self.orders_per_item:
            raise ConfigError(
                f"prompts_per_step is {self.prompts_per_step}; reward both_orders asks for each item in two orders, so "
                "it must be even"
            )
        if self.lora.rank and self.lora.dropout:
            raise ConfigError(
                f"lora.dropout is {self.lora.dropout}; the engine samples without, so another policy than the "
                "sampled one would be trained: set it to 0"
            )
        if self.dynamic_sampling < 0:
            raise ConfigError(
                f"dynamic_sampling is {self.dynamic_sampling}; it is a number of further rounds, 0 for none"
            )
        fewest = self.group_size * (self.orders_per_item if self.dynamic_sampling else self.prompts_per_step)
        if self.updates_per_batch > fewest:
            raise ConfigError(
                f"updates_per_batch is {self.updates_per_batch}, but a step may train on as few as {fewest} rollouts: "
                "lower it, or raise group_size or prompts_per_step"
            )
        if not 0 <= self.format_weight < 2:
            raise ConfigError(
                f"format_weight is {self.format_weight}; it must be at least 0 and below 2, the reward of being right"
            )
        if self.format_weight and not MODES[self.judge.mode].criteria:
            raise ConfigError(
                f"format_weight rewards three parts, but a judgement in mode {self.judge.mode!r} has two; set it to 0"
            )

    @property
    def orders_per_item(self) -> int:
        """Prompts of one item within a step."""
        return 2 if self.reward == "both_orders" else 1


@dataclass(frozen=True)
class GrpoResources:
    """Ranks that train, and engines beside them; `engine.max_model_len` has room for prompt and completion.

    `dump_rollouts` keeps the rollouts since the older of the two last checkpoints, see `jobs/replay.py`. It changes
    nothing else, so it is no part of the step's identity and may be turned on for a run that is to be resumed.
    """

    train: TrainResources = field(default_factory=TrainResources)
    rollout: EngineResources = field(default_factory=EngineResources)
    engine: EngineConfig = field(default_factory=EngineConfig)
    dump_rollouts: bool = False

    def __post_init__(self) -> None:
        way, ranks, engines = self.engine.transfer, self.train, self.rollout
        if way != "directory" and not (ranks.gpus_per_worker and engines.gpus_per_replica):
            raise ConfigError(f"engine.transfer is {way}, which is from GPU to GPU; on CPU it is directory")
        shared = (
            ranks.num_workers == engines.num_replicas == 1 and ranks.gpus_per_worker + engines.gpus_per_replica <= 1
        )
        if way == "ipc" and not shared:
            raise ConfigError(
                f"engine.transfer is ipc, which takes one rank and one engine on one GPU; here are {ranks.num_workers} "
                f"ranks of {ranks.gpus_per_worker} GPUs and {engines.num_replicas} engines of "
                f"{engines.gpus_per_replica}: use nccl"
            )
        if way == "nccl" and (ranks.gpus_per_worker < 1 or engines.gpus_per_replica < 1):
            raise ConfigError("engine.transfer is nccl, which takes whole GPUs; on a shared one use ipc")
        if way != "ipc":  # whose engine sleeps while the trainer takes the memory
            check_engine(engines.gpus_per_replica, self.engine.tensor_parallel, self.engine.gpu_memory_utilization)


@stage(version=2)
def run(context: StepContext, config: GrpoConfig, resources: GrpoResources) -> dict[str, Any]:
    """Train the RFT model (input "rft") on the training items (input "items"); writes model/ and metrics.jsonl.

    Killed anywhere and started again, it goes on from the newest checkpoint: steps after it are done again and appear
    once in metrics.jsonl. Trainer state is bit-equal given the same rollouts; rollouts ask with the same seeds, so
    they are the same as far as an engine's rounding does not depend on which requests share its batch.
    Raises ConfigError, DataError (no item fits), ParityError, SpctError (diverged).
    """
    from spct_ray.cluster.train import run_ranks
    from spct_ray.learn.policy import objective_of

    needed = config.max_prompt_tokens + config.judge.budget + _ORDER_SLACK
    if needed > resources.engine.max_model_len:
        raise ConfigError(
            f"max_prompt_tokens {config.max_prompt_tokens} + judge.max_tokens (and thinking_tokens) "
            f"{config.judge.budget} + {_ORDER_SLACK} = {needed} tokens exceed the engine's max_model_len "
            f"{resources.engine.max_model_len}: raise that, or lower the first two"
        )
    if config.max_staleness and resources.engine.transfer == "ipc":
        raise ConfigError("max_staleness is 1, but an engine on the trainer's GPU sleeps while it trains: set it to 0")
    objective_of(config, config.judge.budget)  # an import path that is wrong fails here, before any rank starts
    fitting_items(context, config)  # which ranks then read
    run_ranks(train_loop, (context, config, resources), resources.train, context)
    lines = read_metrics(context.out)
    return {"steps": len(lines), "reward_last_tenth": mean_of_last_tenth(lines, "reward")}


def train_loop(context: StepContext, config: GrpoConfig, resources: GrpoResources) -> None:
    """The method, on every rank; collective throughout."""
    from spct_ray.learn.checkpoint import complete_steps
    from spct_ray.learn.policy import Reference

    start_model, out = str(Path(context.inputs["rft"]) / "model"), Path(context.out)
    trainer = policy_trainer(start_model, config, resources.train, context.seed)
    first = (trainer.resume(str(out / "checkpoints")) or {"step": 0})["step"]
    reference = Reference(start_model, trainer, resources.train) if config.beta > 0 else None
    with contextlib.closing(Rollouts(trainer, start_model, context, config, resources)) as rollouts:
        metrics = MetricsFile.on_rank_0(trainer.rank, context.out, first, resources.train.tracker)
        dump = RolloutDump(out) if trainer.rank == 0 and resources.dump_rollouts else None
        phase = Phases()
        for step in range(first, config.steps):
            with phase("rollout"):
                rollouts.wait()
            with phase("sync"):
                rollouts.push_weights(step)
            with phase("parity"):
                parity = rollouts.check_parity(step)
            with phase("rollout"):
                groups = rollouts.sample(step)
            if config.max_staleness and step + 1 < config.steps:
                rollouts.ask_ahead(step + 1)
            if dump is not None:
                dump.write(step, groups, trainer.tokenizer)
            numbers = update(trainer, reference, groups, config, resources.train.micro_tokens, phase)
            if metrics is not None:
                line = {"step": step, **rollout_metrics(groups), **numbers}
                line |= {"parity_mean": parity.mean, "parity_p99": parity.p99}
                line["staleness"] = step - line["weight_version"]
                metrics.append({**line, **phase.finish_step(groups, rollouts.seconds)})
                context.progress(step + 1, config.steps, "steps", progress_note(line))
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                with phase("checkpoint"):
                    trainer.save(str(out / "checkpoints"), {"step": step + 1})
                if dump is not None:
                    updates = [0, *complete_steps(str(out / "checkpoints"))][-2]
                    dump.prune(updates // config.updates_per_batch)
    if metrics is not None:
        metrics.close()
    trainer.export(str(out / "model"))


def policy_trainer(start_model: str, config: GrpoConfig, resources: TrainResources, seed: int) -> Trainer:
    """The policy, as it is before the first update. Collective."""
    from spct_ray.learn.trainer import Trainer

    return Trainer(
        start_model,
        head="lm",
        optim=config.optim,
        resources=resources,
        total_steps=config.steps * config.updates_per_batch,
        seed=seed,
        lora=config.lora,
    )


def update(
    trainer: Trainer,
    reference: Reference | None,
    groups: Sequence[Sequence[Rollout]],
    config: GrpoConfig,
    micro_tokens: int,
    phase: Phases,
) -> dict[str, float]:
    """The updates from all groups of a step: advantages, the reference's log-probs, optimiser steps. Collective.

    Returns what `learn.policy.train_on` does, and the numbers of groups asked for and trained on.
    """
    from spct_ray.learn.policy import mini_batches, objective_of, train_on

    objective, trained = objective_of(config, config.judge.budget), trained_groups(groups, config)
    batches = mini_batches(with_advantages(trained, objective), trainer, micro_tokens, config)
    if reference is not None:
        with phase("reference"):
            for batch in batches:
                batch.add("ref_logp", reference.logprobs)
    with phase("train"):
        numbers = train_on(trainer, batches, objective)
    return {**numbers, "groups_asked": len(groups), "groups_trained": len(trained)}


def trained_groups(groups: Sequence[Sequence[Rollout]], config: GrpoConfig) -> Sequence[Sequence[Rollout]]:
    """All groups or, with dynamic sampling, those with signal. Where none has, the first that were asked for, as an
    update is made in every step."""
    if not config.dynamic_sampling:
        return groups
    return with_signal(groups, config.orders_per_item) or groups[: config.prompts_per_step]


def with_advantages(groups: Sequence[Sequence[Rollout]], objective: Grpo) -> list[Sample]:
    """All rollouts, group after group, as samples to train on."""
    import torch

    from spct_ray.learn.policy import Sample

    rewards_MG = torch.tensor([[rollout.reward for rollout in group] for group in groups])
    return [
        Sample(rollout.token_ids, rollout.num_prompt_tokens, rollout.engine_logprobs, advantage)
        for group, advantages_G in zip(groups, objective.advantages(rewards_MG).tolist(), strict=True)
        for rollout, advantage in zip(group, advantages_G, strict=True)
    ]


def progress_note(line: dict[str, float]) -> str:
    """What a person watching wants to see of one step."""
    kl = f", KL {line['kl']:.2g}" if "kl" in line else ""
    return f"reward {line['reward']:+.3f}, correct {line['share_correct']:.0%}{kl}"


class Phases:
    """Seconds of one step by phase. A checkpoint is written after its step's line, so it counts for the next one."""

    def __init__(self) -> None:
        self._begin_step()

    def _begin_step(self) -> None:
        self._started = time.monotonic()
        self._seconds = dict.fromkeys(("checkpoint", "sync", "parity", "rollout", "reference", "train"), 0.0)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[name] += time.monotonic() - started

    def finish_step(self, groups: Sequence[Sequence[Rollout]], rollout_seconds: float) -> dict[str, float]:
        """Seconds by phase and in all, and completion tokens per second; the next step begins here.

        `rollout_seconds` is what the engines took, also beside other phases.
        """
        all_seconds, seconds = time.monotonic() - self._started, self._seconds
        tokens = sum(len(rollout.engine_logprobs) for group in groups for rollout in group)
        self._begin_step()
        return {
            **{f"seconds_{name}": round(value, 4) for name, value in seconds.items()},
            "seconds_step": round(all_seconds, 4),
            "tokens_per_second": round(tokens / all_seconds, 1),
            "rollout_tokens_per_second": round(tokens / rollout_seconds, 1),
        }
