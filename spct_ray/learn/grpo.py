"""The arithmetic of GRPO (Eq. 11 and 15) and of its two best-known variants, and what is reported of an update.

Functions of tensors. Leaves out rollouts, rewards and the update; see `spct_ray.stages.grpo`. Axes: M groups,
G rollouts of one group, N completion tokens of all sequences, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from spct_ray.learn.batch import BatchSize
from spct_ray.learn.config import PolicyLoss


def advantages(rewards_MG: Tensor, scaled: bool = True) -> Tensor:
    """(r - mean) / std over each group [..., G], population std; zeros where all rewards of a group are equal.

    Unscaled, r - mean: what Dr. GRPO (arXiv 2503.20783, Section 3.2) takes, as std favours very easy and hard prompts.
    """
    rewards_MG = rewards_MG.double()
    centred_MG = rewards_MG - rewards_MG.mean(-1, keepdim=True)
    std_M1 = rewards_MG.std(-1, correction=0, keepdim=True) if scaled else 1.0
    # Compared exactly: rounding gives equal rewards a std of 1e-17, which would turn into advantages of +-1.
    no_signal_M1 = rewards_MG.amax(-1, keepdim=True) == rewards_MG.amin(-1, keepdim=True)
    return torch.where(no_signal_M1, 0.0, centred_MG / std_M1).float()


def token_weights(loss: PolicyLoss, num_trained: Sequence[int], size: BatchSize) -> Tensor:
    """How much each token [N] counts; `num_trained` holds the sequences' tokens, `size` is the whole update's.

    grpo: the mean over each sequence, then over sequences (Eq. 11). dapo: the mean over all tokens (arXiv 2503.14476,
    Eq. 8). dr_grpo: the sum over each sequence divided by a constant, `max_tokens`, then the mean over sequences.
    """
    lengths_N = torch.tensor(num_trained).repeat_interleave(torch.tensor(num_trained))
    if loss.objective == "grpo":
        return 1.0 / (lengths_N * size.num_sequences)
    divisor = size.num_tokens if loss.objective == "dapo" else loss.max_tokens * size.num_sequences
    return torch.full(lengths_N.shape, 1.0 / divisor)


def kl_N(logp_N: Tensor, ref_logp_N: Tensor, estimator: str = "k3") -> Tensor:
    """Estimates of KL(policy || reference) at each sampled token (Schulman 2020, "Approximating KL divergence").

    k1: log p - log ref, unbiased, of either sign; as a loss term on policy its gradient is 0 on average. k2: half its
    square, whose gradient is the KL's. k3: unbiased, >= 0, lower variance; what GRPO takes.
    """
    delta_N = ref_logp_N - logp_N
    if estimator == "k1":
        return -delta_N
    return delta_N.square() / 2 if estimator == "k2" else delta_N.exp() - delta_N - 1.0


def importance_N(logp_N: Tensor, engine_logp_N: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(pi_trainer / pi_engine, cap), without gradient.

    They correct for the engine's arithmetic, which samples from a slightly different policy than the trainer holds.
    """
    return (logp_N.detach() - engine_logp_N).exp().clamp(max=cap)


def policy_loss(
    logp_N: Tensor,
    old_logp_N: Tensor,
    ref_logp_N: Tensor | None,
    advantages_N: Tensor,
    weights_N: Tensor,
    loss: PolicyLoss,
    importance_N: Tensor | None = None,
) -> Tensor:
    """Minus Eq. 11: the sum over tokens of weight x (clipped surrogate - beta x KL).

    `weights_N` (see `token_weights`) are normalised over the whole update, so that the losses of all rows and ranks
    add up to that of the batch. `ref_logp_N` is needed unless beta is 0. `importance_N` scales the surrogate.
    """
    ratio_N = (logp_N - old_logp_N).exp()
    clipped_N = ratio_N.clamp(1 - loss.clip, 1 + (loss.clip if loss.clip_high is None else loss.clip_high))
    gain_N = torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N)
    if importance_N is not None:
        gain_N = gain_N * importance_N
    if loss.beta > 0:
        if ref_logp_N is None:
            raise ValueError(f"beta is {loss.beta}: the KL term needs the reference's log-probs")
        gain_N = gain_N - loss.beta * kl_N(logp_N, ref_logp_N, loss.kl)
    return -(gain_N * weights_N).sum()


def token_sums(
    logp_N: Tensor, old_logp_N: Tensor, engine_logp_N: Tensor, ref_logp_N: Tensor | None, loss: PolicyLoss
) -> dict[str, Tensor]:
    """Sums over the tokens, and their number as `tokens`; see `TokenStatistics` for what they mean."""
    logp_N, old_logp_N = logp_N.detach(), old_logp_N.detach()
    each_N = {
        "tokens": torch.ones_like(logp_N),
        "entropy": -logp_N,
        "clip_share": ((logp_N - old_logp_N).exp() - 1).abs() > loss.clip,
        "tis_capped_share": (logp_N - engine_logp_N).exp() > loss.tis_cap,
        "prob_diff_mean": prob_diff_N(logp_N, engine_logp_N),
        "kl": torch.zeros_like(logp_N) if ref_logp_N is None else kl_N(logp_N, ref_logp_N),
    }
    return {name: value.double().sum() for name, value in each_N.items()}


def prob_diff_N(logp_N: Tensor, engine_logp_N: Tensor) -> Tensor:
    """|p_trainer - p_engine| of each token: how far the engine's arithmetic (or its weights) is from the trainer's."""
    return (logp_N.detach().exp() - engine_logp_N.exp()).abs()


class TokenStatistics:
    """Token means of one update over all rows and ranks.

    `entropy` is the Monte-Carlo estimate -log p of the sampled tokens, in nats, not a sum over the vocabulary.
    `clip_share` counts ratios outside 1 +- clip: with one update a rollout batch it is 0 by construction.
    `tis_capped_share` counts importance weights cut off at the cap. `kl` is k3's mean, 0 without a reference.
    """

    NAMES = ("tokens", "entropy", "clip_share", "tis_capped_share", "prob_diff_mean", "kl")

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self._max_prob_diff = torch.zeros((), device=device)

    def add(
        self, logp_N: Tensor, old_logp_N: Tensor, engine_logp_N: Tensor, ref_logp_N: Tensor | None, loss: PolicyLoss
    ) -> None:
        """One row."""
        if not len(logp_N):
            return
        sums = token_sums(logp_N, old_logp_N, engine_logp_N, ref_logp_N, loss)
        self._sums += torch.stack([sums[name] for name in self.NAMES])
        self._max_prob_diff = torch.maximum(self._max_prob_diff, prob_diff_N(logp_N, engine_logp_N).max())

    def reduce(self) -> dict[str, float]:
        """The means, with `prob_diff_max`. Collective: every rank calls it, also one that added nothing."""
        dist.all_reduce(self._sums)
        dist.all_reduce(self._max_prob_diff, op=dist.ReduceOp.MAX)
        sums = dict(zip(self.NAMES, self._sums.tolist(), strict=True))
        tokens = sums.pop("tokens")
        return {**{n: value / tokens for n, value in sums.items()}, "prob_diff_max": self._max_prob_diff.item()}
