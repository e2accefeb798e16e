"""One GRPO update of the policy from sampled sequences, on one rank of many. Leaves out where the samples come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spct_ray.learn.batch import Batch, BatchSize, make_batch, plan_rows
from spct_ray.learn.config import PolicyLoss
from spct_ray.learn.grpo import TokenStatistics, importance_N, policy_loss, token_weights
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
    samples: Sequence[Sample], rank: int, world_size: int, micro_tokens: int, share_prompts: bool = True
) -> tuple[list[Batch], int]:
    """This rank's share as packed rows, and how many rows the rank with the most has.

    Every rank is given the same `samples`; each sample is trained on by exactly one of them. Samples of one prompt
    share it, which changes neither loss nor gradient; `share_prompts` False is the naive way, for comparisons.
    """
    ids = [np.array(s.token_ids, np.int32) for s in samples]
    prompts = [s.num_prompt_tokens for s in samples]
    plan = plan_rows(ids, prompts, micro_tokens=micro_tokens, num_ranks=world_size, share_prompts=share_prompts)
    batches = []
    for row in plan[rank]:
        batch = make_batch([ids[i] for i in row], [prompts[i] for i in row], share_prompts)
        logps = np.concatenate([np.array(samples[i].engine_logprobs, np.float32) for i in row])
        extras = {
            "advantages": torch.tensor([samples[i].advantage for i in row])[batch.sequence_N],
            "engine_logp": torch.from_numpy(logps),
        }
        batches.append(replace(batch, extras=extras))
    return batches, max(map(len, plan))


def add_reference(batches: Sequence[Batch], num_passes: int, reference: Reference) -> list[Batch]:
    """The rows with the frozen model's log-probs. Collective."""
    ref_logps = reference.logprobs(batches, num_passes)
    return [replace(b, extras={**b.extras, "ref_logp": lp}) for b, lp in zip(batches, ref_logps, strict=True)]


def update_policy(trainer: Trainer, batches: Sequence[Batch], loss: PolicyLoss, size: BatchSize) -> dict[str, float]:
    """One optimiser step on Eq. 11 over the sequences and completion tokens in `size` (all ranks'). Collective.

    Exactly on-policy: the old log-probs are those of this very forward pass, so there is no pass for them. Returns
    `Trainer.step`'s numbers, the token statistics (no `kl` at beta 0), the tokens that passed through the network as
    `tokens_trained`, and what they would be without shared prompts as `tokens_naive`.
    """
    statistics = TokenStatistics(trainer.device)

    def loss_fn(batch: Batch) -> Tensor:
        batch = batch.to(trainer.device)
        engine_logp_N, ref_logp_N = batch.extras["engine_logp"], batch.extras.get("ref_logp")
        logp_N = trainer.logprobs(batch)
        old_logp_N = logp_N.detach()
        statistics.add(logp_N, old_logp_N, engine_logp_N, ref_logp_N, loss)
        return policy_loss(
            logp_N,
            old_logp_N,
            ref_logp_N,
            batch.extras["advantages"],
            token_weights(loss, batch.num_trained, size).to(trainer.device),
            loss,
            importance_N(logp_N, engine_logp_N, loss.tis_cap),
        )

    counts = torch.tensor([[b.num_tokens, b.num_naive] for b in batches], dtype=torch.float64).view(-1, 2).sum(0)
    numbers = {**trainer.step(batches, loss_fn), **statistics.reduce()}
    if loss.beta == 0:
        del numbers["kl"]  # not measured, which is not the same as 0
    trained, naive = trainer.sum_over_ranks(counts).tolist()
    return {**numbers, "tokens_trained": trained, "tokens_naive": naive}
