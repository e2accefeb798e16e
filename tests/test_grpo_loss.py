"""GRPO's arithmetic against plain-Python references, hand-derived gradients, golden vectors and properties."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spct_ray.learn.grpo import TokenStatistics, advantages, grpo_loss, importance_BT, kl_BT, token_sums

BETA, CLIP, CAP = 0.08, 0.2, 2.0
Sequence = dict[str, list[float]]  # per-token log-probs under "policy", "old", "ref", "engine"


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, -1, -1, -1], [math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)]),
        ([-1, 1, 1, -1], [-1, 1, 1, -1]),
        ([1, 1, -1, 1], [1 / math.sqrt(3), 1 / math.sqrt(3), -math.sqrt(3), 1 / math.sqrt(3)]),
        ([-1, -1, -1, -1], [0, 0, 0, 0]),
        ([1, 1, 1, 1], [0, 0, 0, 0]),
        ([0.1, 0.1, 0.1], [0, 0, 0]),  # their mean is not exactly 0.1
    ],
)
def test_golden_advantages(rewards: list[float], expected: list[float]) -> None:
    assert advantages(torch.tensor(rewards)).tolist() == pytest.approx(expected, abs=1e-6)


rewards_G = st.lists(st.integers(-50, 50).map(lambda n: n / 8), min_size=2, max_size=16)


@given(rewards_G, st.integers(-20, 20), st.integers(1, 20))
def test_advantages_are_centred_unit_and_ignore_shift_and_scale(rewards: list[float], shift: int, scale: int) -> None:
    got = advantages(torch.tensor(rewards))
    assert got.sum().item() == pytest.approx(0, abs=1e-4)
    assert statistics.pstdev(got.tolist()) == pytest.approx(0 if len(set(rewards)) == 1 else 1, abs=1e-4)
    assert got.tolist() == pytest.approx(advantages(torch.tensor(rewards) * scale + shift).tolist(), abs=1e-4)


@given(st.lists(rewards_G.map(lambda r: (r * 4)[:4]), min_size=1, max_size=5))
def test_each_group_is_normalised_alone(groups: list[list[float]]) -> None:
    together = advantages(torch.tensor(groups))
    assert together.tolist() == [advantages(torch.tensor(g)).tolist() for g in groups]


def make_sequences(seed: int) -> tuple[list[Sequence], list[float]]:
    """Seven sequences of 1 to 9 tokens; the policies differ by enough for both clips and the cap to act."""
    rng = torch.Generator().manual_seed(seed)
    sequences = []
    for length in (1, 2, 3, 5, 9, 4, 1):
        policy = -3 * torch.rand(length, generator=rng)
        noisy = {n: policy + 0.6 * torch.randn(length, generator=rng) for n in ("old", "ref", "engine")}
        sequences.append({name: lp.tolist() for name, lp in {"policy": policy, **noisy}.items()})
    return sequences, [1.7, -0.6, -0.6, 0.0, 1.0, -1.0, 0.5]


def collate(sequences: list[Sequence], left: int = 0, right: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Padded tensors with junk outside the mask: `left` prompt positions, `right` extra padding positions."""
    width = left + max(len(s["policy"]) for s in sequences) + right
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    tensors = {name: torch.full((len(sequences), width), -77.0) for name in ("policy", "old", "ref", "engine")}
    tensors["ref"][:] = 77.0  # exp(154) would overflow if it were not masked before the exponential
    for row, sequence in enumerate(sequences):
        place = slice(left, left + len(sequence["policy"]))
        mask[row, place] = True
        for name, values in sequence.items():
            tensors[name][row, place] = torch.tensor(values)
    return tensors, mask


def reference_loss(sequences: list[Sequence], advantages_B: list[float], beta: float, normaliser: float) -> float:
    """Eq. 11 token by token, in plain Python."""
    total = 0.0
    for sequence, advantage in zip(sequences, advantages_B, strict=True):
        objective = 0.0
        for policy, old, ref, engine in zip(*(sequence[n] for n in ("policy", "old", "ref", "engine")), strict=True):
            ratio = math.exp(policy) / math.exp(old)
            surrogate = min(ratio, 1 + CLIP) * advantage if advantage >= 0 else max(ratio, 1 - CLIP) * advantage
            kl = math.exp(ref) / math.exp(policy) - math.log(math.exp(ref) / math.exp(policy)) - 1
            objective += min(math.exp(policy) / math.exp(engine), CAP) * surrogate - beta * kl
        total += objective / len(sequence["policy"])
    return -total / normaliser


def loss_of(
    tensors: dict[str, torch.Tensor], mask: torch.Tensor, advantages_B: list[float], beta: float, normaliser: float
) -> torch.Tensor:
    return grpo_loss(
        tensors["policy"],
        tensors["old"],
        tensors["ref"] if beta else None,
        torch.tensor(advantages_B),
        mask,
        beta=beta,
        clip=CLIP,
        normaliser=normaliser,
        weights_BT=importance_BT(tensors["policy"], tensors["engine"], mask, CAP),
    )


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("padding", [(0, 0), (3, 2)])
def test_loss_equals_the_plain_python_one(beta: float, padding: tuple[int, int]) -> None:
    sequences, advantages_B = make_sequences(0)
    tensors, mask = collate(sequences, *padding)
    expected = reference_loss(sequences, advantages_B, beta, 28.0)
    assert loss_of(tensors, mask, advantages_B, beta, 28.0).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_on_policy_equals_the_derivative_by_hand() -> None:
    """With old = policy, d(-loss)/d(log p) of a token is (w A - beta (1 - ref / policy)) / length / normaliser."""
    sequences, advantages_B = make_sequences(1)
    tensors, mask = collate(sequences, left=2)
    policy = tensors["policy"].requires_grad_()
    tensors["old"] = policy.detach()
    loss_of(tensors, mask, advantages_B, BETA, 7.0).backward()
    expected = torch.zeros_like(policy)
    for row, (sequence, advantage) in enumerate(zip(sequences, advantages_B, strict=True)):
        for t, (lp, ref, engine) in enumerate(zip(*(sequence[n] for n in ("policy", "ref", "engine")), strict=True)):
            weight = min(math.exp(lp - engine), CAP)
            slope = weight * advantage - BETA * (1 - math.exp(ref - lp))
            expected[row, 2 + t] = -slope / len(sequence["policy"]) / 7.0
    torch.testing.assert_close(policy.grad, expected)


def test_clipped_tokens_have_no_gradient() -> None:
    """Eq. 11: no push further up above 1 + clip when A > 0, nor further down below 1 - clip when A < 0."""
    old = torch.full((4, 1), -1.0)
    policy = (old + torch.tensor([[0.3], [-0.3], [0.3], [-0.3]])).requires_grad_()
    mask = torch.ones(4, 1, dtype=torch.bool)
    grpo_loss(
        policy, old, None, torch.tensor([1.0, 1.0, -1.0, -1.0]), mask, beta=0.0, clip=0.2, normaliser=4.0
    ).backward()
    assert policy.grad is not None
    assert (policy.grad[:, 0] != 0).tolist() == [False, True, True, False]


def test_micro_batches_add_up_to_the_batch() -> None:
    """Loss, gradients of shared parameters and reported sums, for any split and padding."""
    sequences, advantages_B = make_sequences(2)

    def run(split: list[list[int]], right: int) -> tuple[float, torch.Tensor, dict[str, float]]:
        shared = torch.tensor([1.0, 0.0], requires_grad=True)
        loss, sums = 0.0, dict.fromkeys(TokenStatistics.NAMES, 0.0)
        for rows in split:
            tensors, mask = collate([sequences[r] for r in rows], right=right)
            tensors["policy"] = tensors["policy"] * shared[0] + shared[1]
            part = loss_of(tensors, mask, [advantages_B[r] for r in rows], BETA, 7.0)
            part.backward()
            loss += part.item()
            logps = [tensors[name] for name in ("policy", "old", "engine", "ref")]
            for name, value in token_sums(*logps, mask, clip=CLIP, cap=CAP).items():
                sums[name] += value.item()
        assert shared.grad is not None
        return loss, shared.grad, sums

    loss, grad, sums = run([[0, 1, 2, 3, 4, 5, 6]], right=0)
    for split, right in [([[4], [0, 6], [1, 2], [3, 5]], 0), ([[r] for r in range(7)], 3)]:
        got_loss, got_grad, got_sums = run(split, right)
        assert got_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(got_grad, grad)
        assert got_sums == pytest.approx(sums, rel=1e-5)


def test_reported_sums_equal_the_plain_python_ones() -> None:
    sequences, _ = make_sequences(3)
    tensors, mask = collate(sequences, left=1, right=1)
    logps = [tensors[name] for name in ("policy", "old", "engine", "ref")]
    got = {name: value.item() for name, value in token_sums(*logps, mask, clip=CLIP, cap=CAP).items()}
    tokens = [t for s in sequences for t in zip(s["policy"], s["old"], s["engine"], s["ref"], strict=True)]
    assert got == pytest.approx(
        {
            "tokens": len(tokens),
            "entropy": sum(-p for p, *_ in tokens),
            "clip_share": sum(not 0.8 <= math.exp(p - o) <= 1.2 for p, o, *_ in tokens),
            "tis_capped_share": sum(math.exp(p - e) > CAP for p, _, e, _ in tokens),
            "prob_diff_mean": sum(abs(math.exp(p) - math.exp(e)) for p, _, e, _ in tokens),
            "kl": sum(math.exp(r - p) - (r - p) - 1 for p, *_, r in tokens),
        },
        rel=1e-4,
    )


def test_k3_is_an_unbiased_estimate_of_the_kl_divergence() -> None:
    """Weighted by the policy's probabilities, k3 over the whole vocabulary is the exact KL(policy || reference)."""
    rng = torch.Generator().manual_seed(4)
    policy, ref = torch.randn(2, 1, 50, generator=rng).log_softmax(-1).double()
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=policy), torch.distributions.Categorical(logits=ref)
    )
    k3 = kl_BT(policy, ref, torch.ones(1, 50, dtype=torch.bool))
    assert (k3 >= 0).all()
    assert (policy.exp() * k3).sum().item() == pytest.approx(exact.item(), rel=1e-6)
