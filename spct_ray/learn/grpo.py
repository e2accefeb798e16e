"""The arithmetic of GRPO (Eq. 11 and 15): group advantages, the clipped loss with its KL term, and what is reported.

Functions of tensors. Leaves out rollouts, rewards and the update; see `spct_ray.stages.grpo`. Axes: M groups,
G rollouts of one group, B sequences, T next-token positions (prompt, completion and padding; `mask_BT` is True where
the next token belongs to the completion).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def advantages(rewards_MG: Tensor) -> Tensor:
    """(r - mean) / std over each group [..., G], population std; zeros where all rewards of a group are equal."""
    rewards_MG = rewards_MG.double()
    centred_MG = rewards_MG - rewards_MG.mean(-1, keepdim=True)
    std_M1 = rewards_MG.std(-1, correction=0, keepdim=True)
    # Compared exactly: rounding gives equal rewards a std of 1e-17, which would turn into advantages of +-1.
    no_signal_M1 = rewards_MG.amax(-1, keepdim=True) == rewards_MG.amin(-1, keepdim=True)
    return torch.where(no_signal_M1, 0.0, centred_MG / std_M1).float()


def kl_BT(logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The k3 estimator of KL(policy || reference) at each sampled token, >= 0; zeros outside the mask."""
    delta_BT = torch.where(mask_BT, ref_logp_BT - logp_BT, 0.0)
    return delta_BT.exp() - delta_BT - 1.0


def importance_BT(logp_BT: Tensor, engine_logp_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(pi_trainer / pi_engine, cap), without gradient; ones outside the mask.

    They correct for the engine's arithmetic, which samples from a slightly different policy than the trainer holds.
    """
    return torch.where(mask_BT, logp_BT.detach() - engine_logp_BT, 0.0).exp().clamp(max=cap)


def grpo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    ref_logp_BT: Tensor | None,
    advantages_B: Tensor,
    mask_BT: Tensor,
    *,
    beta: float,
    clip: float,
    normaliser: float,
    weights_BT: Tensor | None = None,
) -> Tensor:
    """Minus Eq. 11: clipped surrogate minus beta * KL, mean over each sequence's tokens, sum over B / `normaliser`.

    `normaliser` is the number of sequences of the whole update (all ranks and micro-batches), so that the losses of
    all micro-batches add up to the loss of the batch. `ref_logp_BT` is needed unless beta is 0. `weights_BT` (see
    `importance_BT`) scales the surrogate of each token.
    """
    ratio_BT = torch.where(mask_BT, logp_BT - old_logp_BT, 0.0).exp()
    advantages_B1 = advantages_B[:, None]
    gain_BT = torch.minimum(ratio_BT * advantages_B1, ratio_BT.clamp(1 - clip, 1 + clip) * advantages_B1)
    if weights_BT is not None:
        gain_BT = gain_BT * weights_BT
    if beta > 0:
        if ref_logp_BT is None:
            raise ValueError(f"beta is {beta}: the KL term needs the reference's log-probs")
        gain_BT = gain_BT - beta * kl_BT(logp_BT, ref_logp_BT, mask_BT)
    gain_B = (gain_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)
    return -gain_B.sum() / normaliser


def token_sums(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    engine_logp_BT: Tensor,
    ref_logp_BT: Tensor | None,
    mask_BT: Tensor,
    *,
    clip: float,
    cap: float,
) -> dict[str, Tensor]:
    """Sums over the masked tokens, and their number as `tokens`; see `TokenStatistics` for what they mean."""
    logp_BT, old_logp_BT = logp_BT.detach(), old_logp_BT.detach()
    each_BT = {
        "tokens": torch.ones_like(logp_BT),
        "entropy": -logp_BT,
        "clip_share": ((logp_BT - old_logp_BT).exp() - 1).abs() > clip,
        "tis_capped_share": (logp_BT - engine_logp_BT).exp() > cap,
        "prob_diff_mean": prob_diff_BT(logp_BT, engine_logp_BT),
        "kl": torch.zeros_like(logp_BT) if ref_logp_BT is None else kl_BT(logp_BT, ref_logp_BT, mask_BT),
    }
    return {name: value[mask_BT].double().sum() for name, value in each_BT.items()}


def prob_diff_BT(logp_BT: Tensor, engine_logp_BT: Tensor) -> Tensor:
    """|p_trainer - p_engine| of each token: how far the engine's arithmetic (or its weights) is from the trainer's."""
    return (logp_BT.detach().exp() - engine_logp_BT.exp()).abs()


class TokenStatistics:
    """Token means of one update over all micro-batches and ranks.

    `entropy` is the Monte-Carlo estimate -log p of the sampled tokens, in nats, not a sum over the vocabulary.
    `clip_share` counts ratios outside 1 +- clip: with one update a rollout batch it is 0 by construction.
    `tis_capped_share` counts importance weights cut off at the cap. `kl` is k3's mean, 0 without a reference.
    """

    NAMES = ("tokens", "entropy", "clip_share", "tis_capped_share", "prob_diff_mean", "kl")

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self._max_prob_diff = torch.zeros((), device=device)

    def add(
        self,
        logp_BT: Tensor,
        old_logp_BT: Tensor,
        engine_logp_BT: Tensor,
        ref_logp_BT: Tensor | None,
        mask_BT: Tensor,
        *,
        clip: float,
        cap: float,
    ) -> None:
        """One micro-batch, with at least one token in its mask."""
        sums = token_sums(logp_BT, old_logp_BT, engine_logp_BT, ref_logp_BT, mask_BT, clip=clip, cap=cap)
        self._sums += torch.stack([sums[name] for name in self.NAMES])
        prob_diffs = prob_diff_BT(logp_BT, engine_logp_BT)[mask_BT]
        self._max_prob_diff = torch.maximum(self._max_prob_diff, prob_diffs.max())

    def reduce(self) -> dict[str, float]:
        """The means, with `prob_diff_max`. Collective: every rank calls it, also one that added nothing."""
        dist.all_reduce(self._sums)
        dist.all_reduce(self._max_prob_diff, op=dist.ReduceOp.MAX)
        sums = dict(zip(self.NAMES, self._sums.tolist(), strict=True))
        tokens = sums.pop("tokens")
        return {**{n: value / tokens for n, value in sums.items()}, "prob_diff_max": self._max_prob_diff.item()}
