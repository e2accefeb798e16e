"""One GRPO update of the policy from sampled sequences, on one rank of many. Leaves out where the samples come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spct_ray.learn.batch import Batch, make_batch, plan_micro_batches, share_of_rank
from spct_ray.learn.grpo import TokenStatistics, grpo_loss, importance_BT
from spct_ray.learn.reference import Reference
from spct_ray.learn.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled sequence: prompt and completion, the engine's log-prob of each completion token, its advantage."""

    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    engine_logprobs: tuple[float, ...]
    advantage: float


def rank_micro_batches(
    samples: Sequence[Sample], rank: int, world_size: int, micro_tokens: int
) -> tuple[list[Batch], int]:
    """This rank's share as micro-batches, and how many micro-batches the rank with the most has.

    Every rank is given the same `samples`; each sample is trained on by exactly one of them.
    """
    lengths = [len(sample.token_ids) for sample in samples]
    plans = []
    for r in range(world_size):
        share = share_of_rank(lengths, r, world_size)
        plan = plan_micro_batches([lengths[i] for i in share], micro_tokens)
        plans.append([[samples[share[i]] for i in indices] for indices in plan])
    return [_batch(part) for part in plans[rank]], max(map(len, plans))


def _batch(samples: Sequence[Sample]) -> Batch:
    batch = make_batch([s.token_ids for s in samples], [s.num_prompt_tokens for s in samples])
    engine_logprobs = torch.tensor([lp for s in samples for lp in s.engine_logprobs])
    extras = {
        "advantages": torch.tensor([s.advantage for s in samples]),
        "engine_logp": torch.zeros(batch.loss_mask.shape).masked_scatter(batch.loss_mask, engine_logprobs),
    }
    return replace(batch, extras=extras)


def add_reference(batches: Sequence[Batch], num_passes: int, reference: Reference) -> list[Batch]:
    """The micro-batches with the frozen model's log-probs. Collective."""
    ref_logps = reference.logprobs(batches, num_passes)
    return [replace(b, extras={**b.extras, "ref_logp": lp}) for b, lp in zip(batches, ref_logps, strict=True)]


def update_policy(
    trainer: Trainer, batches: Sequence[Batch], *, beta: float, clip: float, tis_cap: float, num_sequences: int
) -> dict[str, float]:
    """One optimiser step on Eq. 11 over `num_sequences` sequences (all ranks'). Collective.

    Exactly on-policy: the old log-probs are those of this very forward pass, so there is no pass for them. Returns
    `Trainer.step`'s numbers and the token statistics (no `kl` at beta 0).
    """
    statistics = TokenStatistics(trainer.device)

    def loss_fn(batch: Batch) -> Tensor:
        batch = batch.to(trainer.device)
        mask_BT, engine_logp_BT = batch.loss_mask, batch.extras["engine_logp"]
        ref_logp_BT = batch.extras.get("ref_logp")
        logp_BT = trainer.logprobs(batch)
        old_logp_BT = logp_BT.detach()
        statistics.add(logp_BT, old_logp_BT, engine_logp_BT, ref_logp_BT, mask_BT, clip=clip, cap=tis_cap)
        return grpo_loss(
            logp_BT,
            old_logp_BT,
            ref_logp_BT,
            batch.extras["advantages"],
            mask_BT,
            beta=beta,
            clip=clip,
            normaliser=num_sequences,
            weights_BT=importance_BT(logp_BT, engine_logp_BT, mask_BT, tis_cap),
        )

    numbers = {**trainer.step(batches, loss_fn), **statistics.reduce()}
    if beta == 0:
        del numbers["kl"]  # not measured, which is not the same as 0
    return numbers
