"""GRPO's update: the objectives (Eq. 11 and two variants), the reference of the KL term (Eq. 15), the optimiser step.

Rollouts and rewards come from `stages.rollouts`; the loop is in `stages.grpo`. Your own objective is a subclass of
`Grpo` in any module. Axes: M groups, G rollouts per group, N completion tokens of all sequences, concatenated.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spct_ray.config import imported
from spct_ray.errors import ConfigError
from spct_ray.learn.batch import Batch, BatchSize, forward_rows, packed_rows
from spct_ray.learn.model import TokenLogprobs, load_model, partitioned_loading
from spct_ray.learn.train_config import OBJECTIVES, PolicyLoss, TrainResources
from spct_ray.learn.trainer import Trainer


@dataclass(frozen=True)
class Grpo:
    """GRPO (Eq. 11): advantages in units of the group's standard deviation; the mean per sequence, then over sequences.

    `max_tokens` is the longest completion that an engine may write. Subclasses override any of the three methods.
    """

    loss: PolicyLoss
    max_tokens: int

    def advantages(self, rewards_MG: Tensor) -> Tensor:
        """(r - mean) / std over each group [..., G], population std; 0 where all rewards of a group are equal."""
        std_M1 = rewards_MG.double().std(-1, correction=0, keepdim=True)
        return (centred(rewards_MG) / std_M1.clamp(min=torch.finfo(torch.float64).tiny)).float()

    def token_weights(self, num_trained: Sequence[int], size: BatchSize) -> Tensor:
        """Weight of each token [N] in the loss. `num_trained` is the number of tokens per sequence, `size` that of the
        whole update, so that the losses of all rows and ranks add up to the batch's."""
        lengths_B = torch.tensor(num_trained)
        return 1.0 / (lengths_B.repeat_interleave(lengths_B) * size.num_sequences)

    def surrogate(self, ratio_N: Tensor, advantages_N: Tensor) -> Tensor:
        """PPO's clipped surrogate of each token: min(rho A, clip(rho) A)."""
        return torch.minimum(ratio_N * advantages_N, ratio_N.clamp(*self.loss.clip_range) * advantages_N)


class DrGrpo(Grpo):
    """Dr. GRPO (arXiv 2503.20783, Section 3.2): no division by std, which favours very easy and very hard prompts; sums
    over each sequence divided by a constant, because means favour long wrong answers."""

    def advantages(self, rewards_MG: Tensor) -> Tensor:
        """r - mean over each group."""
        return centred(rewards_MG).float()

    def token_weights(self, num_trained: Sequence[int], size: BatchSize) -> Tensor:
        """1 / (`max_tokens` x sequences)."""
        return torch.full((sum(num_trained),), 1.0 / (self.max_tokens * size.num_sequences))


class Dapo(Grpo):
    """DAPO's token mean (arXiv 2503.14476, Eq. 8); its clip-higher is `clip_high`, its sampling `dynamic_sampling`."""

    def token_weights(self, num_trained: Sequence[int], size: BatchSize) -> Tensor:
        """1 / tokens."""
        return torch.full((sum(num_trained),), 1.0 / size.num_tokens)


def objective_of(loss: PolicyLoss, max_tokens: int) -> Grpo:
    """The objective that `loss` names. Raises ConfigError for an import path that leads to no subclass of `Grpo`."""
    kind = imported(OBJECTIVES.get(loss.objective, loss.objective), "objective")
    if not (isinstance(kind, type) and issubclass(kind, Grpo)):
        raise ConfigError(f"objective: {loss.objective} is {kind!r}, which is no subclass of {__name__}:Grpo")
    return kind(loss, max_tokens)


def centred(rewards_MG: Tensor) -> Tensor:
    """r - mean over each group, in float64; exactly 0 where all rewards of a group are equal.

    Without the mask, rounding leaves 1e-17, which division by a std of 1e-17 turns into advantages of +-1.
    """
    rewards_MG = rewards_MG.double()
    equal_M1 = rewards_MG.amax(-1, keepdim=True) == rewards_MG.amin(-1, keepdim=True)
    return (rewards_MG - rewards_MG.mean(-1, keepdim=True)).masked_fill(equal_M1, 0.0)


def kl_N(logp_N: Tensor, ref_logp_N: Tensor, estimator: str = "k3") -> Tensor:
    """Estimates KL(policy || reference) at each sampled token (Schulman 2020, "Approximating KL divergence").

    k2: half the squared log-ratio, whose gradient is the KL's. k3: unbiased, >= 0 and of low variance, GRPO's choice.
    """
    delta_N = ref_logp_N - logp_N
    return delta_N.square() / 2 if estimator == "k2" else delta_N.exp() - delta_N - 1.0


@dataclass(frozen=True)
class TokenLogps:
    """Log-probs [N] of the sampled tokens under the policy in training, the policy before the batch's first update, the
    engine that sampled them, and the reference (None at beta 0)."""

    policy: Tensor
    old: Tensor
    engine: Tensor
    ref: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """pi_trainer / pi_engine, without gradient: the engine's arithmetic makes its policy differ slightly from the
        trainer's."""
        return (self.policy.detach() - self.engine).exp()

    @property
    def prob_diff(self) -> Tensor:
        """|p_trainer - p_engine|: how far the engine's arithmetic (or its weights) is from the trainer's."""
        return (self.policy.detach().exp() - self.engine.exp()).abs()


def policy_loss(objective: Grpo, logps: TokenLogps, advantages_N: Tensor, weights_N: Tensor) -> Tensor:
    """Minus Eq. 11: the sum over tokens of weight x (importance x surrogate - beta x KL), importance truncated."""
    loss = objective.loss
    gain_N = objective.surrogate((logps.policy - logps.old).exp(), advantages_N)
    gain_N = gain_N * logps.importance.clamp(max=loss.tis_cap)
    if loss.beta > 0:
        if logps.ref is None:
            raise ValueError(f"beta is {loss.beta}: the KL term needs the reference's log-probs")
        gain_N = gain_N - loss.beta * kl_N(logps.policy, logps.ref, loss.kl)
    return -(gain_N * weights_N).sum()


class TokenStatistics:
    """Means over the tokens of one update, over all rows and ranks.

    `entropy` is the Monte-Carlo estimate -log p of the sampled tokens, in nats, not a sum over the vocabulary.
    `clip_share` is the share of ratios outside the clip range, 0 in a batch's first update; `tis_capped_share` that of
    importance weights above the cap. `kl` is k3's mean, 0 without a reference.
    """

    NAMES = ("tokens", "entropy", "clip_share", "tis_capped_share", "prob_diff_mean", "kl")

    def __init__(self, loss: PolicyLoss, device: torch.device) -> None:
        self._loss = loss
        self._sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self._max_prob_diff = torch.zeros((), device=device)

    def add(self, logps: TokenLogps) -> None:
        """Add one row."""
        policy_N, (low, high) = logps.policy.detach(), self._loss.clip_range
        if not len(policy_N):
            return
        ratio_N = (policy_N - logps.old).exp()
        values_N = (
            torch.ones_like(policy_N),
            -policy_N,
            (ratio_N < low) | (ratio_N > high),
            logps.importance > self._loss.tis_cap,
            logps.prob_diff,
            torch.zeros_like(policy_N) if logps.ref is None else kl_N(policy_N, logps.ref),
        )
        self._sums += torch.stack([value_N.double().sum() for value_N in values_N])
        self._max_prob_diff = torch.maximum(self._max_prob_diff, logps.prob_diff.max())

    def reduce(self) -> dict[str, float]:
        """The means, and `prob_diff_max`. Collective: every rank calls it, even if it added nothing."""
        dist.all_reduce(self._sums)
        dist.all_reduce(self._max_prob_diff, op=dist.ReduceOp.MAX)
        tokens, *sums = self._sums.tolist()
        means = {name: value / tokens for name, value in zip(self.NAMES[1:], sums, strict=True)}
        return {**means, "prob_diff_max": self._max_prob_diff.item()}


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled sequence: prompt and completion, the engine's log-prob of each completion token, its advantage."""

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    engine_logprobs: tuple[float, ...]
    advantage: float


def sample_rows(
    samples: Sequence[Sample], rank: int, world_size: int, micro_tokens: int, share_prompts: bool = True
) -> tuple[list[Batch], int]:
    """This rank's share as packed rows, and how many rows the rank with the most has.

    Every rank passes the same `samples`, and each sample is trained on by exactly one rank. Samples of one prompt share
    it, which changes neither loss nor gradient; `share_prompts` False is for comparisons.
    """
    rows, num_passes = packed_rows(
        [np.array(sample.token_ids, np.int32) for sample in samples],
        [sample.num_prompt_tokens for sample in samples],
        micro_tokens,
        (rank, world_size),
        share_prompts,
    )
    batches = []
    for indices, batch in rows:
        engine_N = np.concatenate([np.array(samples[i].engine_logprobs, np.float32) for i in indices])
        advantages_B = torch.tensor([samples[i].advantage for i in indices])
        extras = {"advantages": advantages_B[batch.sequence_N], "engine_logp": torch.from_numpy(engine_N)}
        batches.append(replace(batch, extras=extras))
    return batches, num_passes


def add_logprobs(name: str, forward: Callable[[Batch], Tensor], rows: Sequence[Batch], num_passes: int) -> list[Batch]:
    """The rows with `forward`'s log-probs as the extra `name`. Collective."""
    logps = forward_rows(forward, rows, num_passes)
    return [replace(row, extras={**row.extras, name: logp_N}) for row, logp_N in zip(rows, logps, strict=True)]


class MiniBatch:
    """The samples of one update: this rank's rows of them, and the size of the whole."""

    def __init__(self, samples: Sequence[Sample], trainer: Trainer, micro_tokens: int, beta: float) -> None:
        """Samples with advantage 0 have no gradient and are skipped, unless there is a KL term or no other sample:
        every step makes an update. They count in `size` either way."""
        self.size = BatchSize(len(samples), sum(len(sample.engine_logprobs) for sample in samples))
        trained = samples if beta else [sample for sample in samples if sample.advantage] or samples
        self.rows, self._num_passes = sample_rows(trained, trainer.rank, trainer.world_size, micro_tokens)

    def add(self, name: str, forward: Callable[[Batch], Tensor]) -> None:
        """See `add_logprobs`. Collective."""
        self.rows = add_logprobs(name, forward, self.rows, self._num_passes)


def mini_batches(samples: Sequence[Sample], trainer: Trainer, micro_tokens: int, loss: PolicyLoss) -> list[MiniBatch]:
    """The samples in order, in `updates_per_batch` parts whose sizes differ by at most 1."""
    num = loss.updates_per_batch
    bounds = [len(samples) * place // num for place in range(num + 1)]
    parts = [samples[start:stop] for start, stop in itertools.pairwise(bounds)]
    return [MiniBatch(part, trainer, micro_tokens, loss.beta) for part in parts]


def train_on(trainer: Trainer, batches: Sequence[MiniBatch], objective: Grpo) -> dict[str, float]:
    """One update per mini-batch, with ratios to the policy before the first. Collective.

    Returns the metrics of `update_policy`: tokens summed, the last learning rate, the largest `prob_diff_max`, and all
    others averaged over the updates.
    """
    if len(batches) > 1:
        for batch in batches:
            batch.add("old_logp", trainer.logprobs)
    updates = [update_policy(trainer, batch.rows, objective, batch.size) for batch in batches]
    combine: dict[str, Callable[[list[float]], float]] = {
        "lr": lambda values: values[-1], "prob_diff_max": max, "tokens_trained": sum, "tokens_naive": sum,
    }  # fmt: skip
    return {name: combine.get(name, fmean)([numbers[name] for numbers in updates]) for name in updates[0]}


def update_policy(trainer: Trainer, rows: Sequence[Batch], objective: Grpo, size: BatchSize) -> dict[str, float]:
    """One optimiser step on Eq. 11 over the sequences and completion tokens in `size` (all ranks'). Collective.

    Rows without the extra `old_logp` are on-policy: their old log-probs are those of this forward pass. Returns
    `Trainer.step`'s metrics, the token statistics (no `kl` at beta 0), `tokens_trained`, which passed through the
    network, and `tokens_naive`, which would have done so without shared prompts.
    """
    token_statistics = TokenStatistics(objective.loss, trainer.device)

    def loss_fn(row: Batch) -> Tensor:
        row = row.to(trainer.device)
        logp_N = trainer.logprobs(row)
        old_logp_N = row.extras.get("old_logp", logp_N.detach())
        logps = TokenLogps(logp_N, old_logp_N, row.extras["engine_logp"], row.extras.get("ref_logp"))
        token_statistics.add(logps)
        weights_N = objective.token_weights(row.num_trained, size).to(trainer.device)
        return policy_loss(objective, logps, row.extras["advantages"], weights_N)

    counts = torch.tensor([[row.num_tokens, row.num_naive] for row in rows], dtype=torch.float64).view(-1, 2).sum(0)
    numbers = {**trainer.step(rows, loss_fn), **token_statistics.reduce()}
    if objective.loss.beta == 0:
        del numbers["kl"]  # not measured, rather than 0
    trained, naive = trainer.sum_over_ranks(counts).tolist()
    return {**numbers, "tokens_trained": trained, "tokens_naive": naive}


class Reference:
    """The frozen model in the KL term (Eq. 15): forward passes only, no optimiser.

    Created after the policy, whose process group and device it uses. Under ZeRO-3 its weights are partitioned like the
    policy's, otherwise every rank holds a copy. With LoRA there is no second model: the policy without its adapters is
    the initial model.
    """

    def __init__(self, model_dir: str, policy: Trainer, resources: TrainResources) -> None:
        self._device = policy.device
        self._adapters_off: Callable[[], Any] = contextlib.nullcontext
        if policy.has_adapters:
            from peft.helpers import rescale_adapter_scale

            # Scaled by 0 instead of bypassed: ZeRO-3 expects the same modules in the same order in every pass.
            self._adapters_off = partial(rescale_adapter_scale, policy.model, 0.0)
            self._module: Callable[[Batch], Tensor] = policy.logprobs
            return
        dtype, on_gpu = policy.dtype, policy.device.type == "cuda"  # another dtype would mean a KL before step 1
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": 3},
        }
        with partitioned_loading(config if resources.zero_stage == 3 else None):
            module: Any = TokenLogprobs(load_model(model_dir, "lm", dtype, on_gpu))
        if resources.zero_stage == 3:
            import deepspeed

            deepspeed.utils.set_z3_leaf_module(module.head, True)
            module = deepspeed.initialize(model=module, config=config)[0]
        else:
            module = module.to(policy.device)
        module.eval()
        self._module = module

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        """Like `Trainer.logprobs`. Collective."""
        with self._adapters_off():
            return self._module(batch.to(self._device))
