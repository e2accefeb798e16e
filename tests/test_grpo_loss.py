"""GRPO's arithmetic against plain-Python references, hand-derived gradients, golden vectors and properties."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spct_ray.errors import ConfigError
from spct_ray.learn.batch import BatchSize
from spct_ray.learn.policy import Grpo, TokenLogps, TokenStatistics, kl_N, objective_of, policy_loss
from spct_ray.learn.train_config import PolicyLoss

BETA, CLIP, CAP = 0.08, 0.2, 2.0
Sequence = dict[str, list[float]]  # per-token log-probs under "policy", "old", "ref", "engine"


def make_objective(name: str = "grpo", max_tokens: int = 11, **settings: Any) -> Grpo:
    return objective_of(PolicyLoss(objective=name, updates_per_batch=4, **settings), max_tokens)


def advantages(rewards: torch.Tensor, name: str = "grpo") -> torch.Tensor:
    return make_objective(name).advantages(rewards)


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


def collate(sequences: list[Sequence], advantages_B: list[float]) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Flat tensors over all tokens, and the sequences' lengths."""
    tensors = {n: torch.tensor([lp for s in sequences for lp in s[n]]) for n in ("policy", "old", "ref", "engine")}
    lengths = [len(s["policy"]) for s in sequences]
    tensors["advantages"] = torch.tensor(advantages_B).repeat_interleave(torch.tensor(lengths))
    return tensors, lengths


def reference_loss(sequences: list[Sequence], advantages_B: list[float], objective: Grpo, size: BatchSize) -> float:
    """Eq. 11 (or the variant's) token by token, in plain Python."""
    loss = objective.loss
    high = loss.clip if loss.clip_high is None else loss.clip_high
    total = 0.0
    for sequence, advantage in zip(sequences, advantages_B, strict=True):
        gain = 0.0
        for policy, old, ref, engine in zip(*(sequence[n] for n in ("policy", "old", "ref", "engine")), strict=True):
            ratio = math.exp(policy) / math.exp(old)
            surrogate = min(ratio, 1 + high) * advantage if advantage >= 0 else max(ratio, 1 - loss.clip) * advantage
            x = math.exp(ref) / math.exp(policy)
            kl = {"k2": math.log(x) ** 2 / 2, "k3": x - math.log(x) - 1}[loss.kl]
            gain += min(math.exp(policy) / math.exp(engine), CAP) * surrogate - loss.beta * kl
        total += {
            "grpo": gain / len(sequence["policy"]) / size.num_sequences,
            "dapo": gain / size.num_tokens,
            "dr_grpo": gain / objective.max_tokens / size.num_sequences,
        }[loss.objective]
    return -total


def logps_of(tensors: dict[str, torch.Tensor], with_ref: bool = True) -> TokenLogps:
    return TokenLogps(tensors["policy"], tensors["old"], tensors["engine"], tensors["ref"] if with_ref else None)


def loss_of(tensors: dict[str, torch.Tensor], lengths: list[int], objective: Grpo, size: BatchSize) -> torch.Tensor:
    logps = logps_of(tensors, with_ref=objective.loss.beta > 0)
    return policy_loss(objective, logps, tensors["advantages"], objective.token_weights(lengths, size))


def statistics_of(rows: list[TokenLogps], loss: PolicyLoss, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)  # of one rank
    found = TokenStatistics(loss, torch.device("cpu"))
    for row in rows:
        found.add(row)
    return found.reduce()


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("kl", ["k2", "k3"])
@pytest.mark.parametrize("clip_high", [None, 0.28])
def test_loss_equals_the_plain_python_one(objective: Any, kl: Any, clip_high: float | None, beta: float) -> None:
    sequences, advantages_B = make_sequences(0)
    chosen = make_objective(objective, beta=beta, kl=kl, clip_high=clip_high)
    size = BatchSize(28, 130)
    expected = reference_loss(sequences, advantages_B, chosen, size)
    assert loss_of(*collate(sequences, advantages_B), chosen, size).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_on_policy_equals_the_derivative_by_hand() -> None:
    """With old = policy, d(-loss)/d(log p) of a token is (w A - beta (1 - ref / policy)) / length / sequences."""
    sequences, advantages_B = make_sequences(1)
    tensors, lengths = collate(sequences, advantages_B)
    policy = tensors["policy"].requires_grad_()
    tensors["old"] = policy.detach()
    loss_of(tensors, lengths, make_objective(), BatchSize(7, 25)).backward()
    expected = []
    for sequence, advantage in zip(sequences, advantages_B, strict=True):
        for lp, ref, engine in zip(*(sequence[n] for n in ("policy", "ref", "engine")), strict=True):
            weight = min(math.exp(lp - engine), CAP)
            slope = weight * advantage - BETA * (1 - math.exp(ref - lp))
            expected.append(-slope / len(sequence["policy"]) / 7.0)
    torch.testing.assert_close(policy.grad, torch.tensor(expected))


@pytest.mark.parametrize(("clip_high", "moves"), [(None, [False, True, True, False]), (0.4, [True, True, True, False])])
def test_clipped_tokens_have_no_gradient(clip_high: float | None, moves: list[bool]) -> None:
    """No push further up above 1 + clip (clip-higher: 1 + clip_high) when A > 0, nor down below 1 - clip when A < 0."""
    old = torch.full((4,), -1.0)
    policy = (old + torch.tensor([0.3, -0.3, 0.3, -0.3])).requires_grad_()
    advantages_N, weights_N = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.full((4,), 0.25)
    logps = TokenLogps(policy, old, policy.detach())
    policy_loss(make_objective(beta=0.0, clip_high=clip_high), logps, advantages_N, weights_N).backward()
    assert policy.grad is not None
    assert (policy.grad != 0).tolist() == moves


def test_dr_grpo_takes_advantages_without_dividing_by_the_spread() -> None:
    assert advantages(torch.tensor([1.0, -1.0, -1.0, -1.0]), "dr_grpo").tolist() == [1.5, -0.5, -0.5, -0.5]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_rows_add_up_to_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients of shared parameters and reported means, for any split."""
    sequences, advantages_B = make_sequences(2)
    objective, size = make_objective(name), BatchSize(7, 25)

    def run(split: list[list[int]]) -> tuple[float, torch.Tensor, dict[str, float]]:
        shared = torch.tensor([1.0, 0.0], requires_grad=True)
        total, rows = 0.0, []
        for indices in split:
            tensors, lengths = collate([sequences[i] for i in indices], [advantages_B[i] for i in indices])
            tensors["policy"] = tensors["policy"] * shared[0] + shared[1]
            part = loss_of(tensors, lengths, objective, size)
            part.backward()
            total += part.item()
            rows.append(logps_of(tensors))
        assert shared.grad is not None
        return total, shared.grad, statistics_of(rows, objective.loss, monkeypatch)

    total, grad, means = run([[0, 1, 2, 3, 4, 5, 6]])
    for split in ([[4], [0, 6], [1, 2], [3, 5]], [[i] for i in range(7)]):
        got_total, got_grad, got_means = run(split)
        assert got_total == pytest.approx(total, rel=1e-5)
        torch.testing.assert_close(got_grad, grad)
        assert got_means == pytest.approx(means, rel=1e-5)


def test_reported_means_equal_the_plain_python_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, advantages_B = make_sequences(3)
    tensors, _ = collate(sequences, advantages_B)
    loss = PolicyLoss(clip_high=0.5, updates_per_batch=4)
    tokens = [t for s in sequences for t in zip(s["policy"], s["old"], s["engine"], s["ref"], strict=True)]
    expected = {
        "entropy": [-p for p, *_ in tokens],
        "clip_share": [not 0.8 <= math.exp(p - o) <= 1.5 for p, o, *_ in tokens],
        "tis_capped_share": [math.exp(p - e) > CAP for p, _, e, _ in tokens],
        "prob_diff_mean": [abs(math.exp(p) - math.exp(e)) for p, _, e, _ in tokens],
        "kl": [math.exp(r - p) - (r - p) - 1 for p, *_, r in tokens],
    }
    means = {name: statistics.fmean(values) for name, values in expected.items()}
    assert statistics_of([logps_of(tensors)], loss, monkeypatch) == pytest.approx(
        {**means, "prob_diff_max": max(expected["prob_diff_mean"])}, rel=1e-4
    )


def test_k3_is_an_unbiased_estimate_of_the_kl_divergence() -> None:
    """Weighted by the policy's probabilities, k3 over the whole vocabulary is the exact KL(policy || reference)."""
    rng = torch.Generator().manual_seed(4)
    policy, ref = torch.randn(2, 1, 50, generator=rng).log_softmax(-1).double()
    exact = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=policy), torch.distributions.Categorical(logits=ref)
    )
    k3 = kl_N(policy, ref)
    assert (k3 >= 0).all()
    assert (policy.exp() * k3).sum().item() == pytest.approx(exact.item(), rel=1e-6)


def test_gradient_of_k2_is_that_of_the_kl_divergence() -> None:
    """As a loss term, with samples weighted exactly by the policy."""
    rng = torch.Generator().manual_seed(5)
    logits, ref = torch.randn(2, 40, generator=rng).double()
    ref = ref.log_softmax(-1)

    def gradient(term: Any) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        logp = leaf.log_softmax(-1)
        term(logp).backward()
        assert leaf.grad is not None
        return leaf.grad

    exact = gradient(lambda logp: (logp.exp() * (logp - ref)).sum())
    torch.testing.assert_close(gradient(lambda logp: (logp.detach().exp() * kl_N(logp, ref, "k2")).sum()), exact)


class Loo(Grpo):
    """An objective of somebody else's: RLOO's leave-one-out baseline."""

    def advantages(self, rewards_MG: torch.Tensor) -> torch.Tensor:
        num = rewards_MG.shape[-1]
        return rewards_MG - (rewards_MG.sum(-1, keepdim=True) - rewards_MG) / (num - 1)


def test_an_objective_may_be_added_from_outside_the_package() -> None:
    objective = make_objective(f"{__name__}:Loo")
    assert objective.advantages(torch.tensor([1.0, -1.0, -1.0, 1.0])).tolist() == pytest.approx(
        [4 / 3, -4 / 3, -4 / 3, 4 / 3]
    )
    assert objective.loss.objective == f"{__name__}:Loo"
    for wrong, message in (("loo", "it is one of grpo, dr_grpo, dapo, or the import path"),
                           ("nowhere:Loo", "objective: 'nowhere:Loo' cannot be imported"),
                           (f"{__name__}:Nobody", "cannot be imported"),
                           (f"{__name__}:advantages", "no subclass of spct_ray.learn.policy:Grpo")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            make_objective(wrong)


@pytest.mark.parametrize("settings", [{"clip": 0.1}, {"clip_high": 0.28}])
def test_a_clip_that_cannot_act_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"every ratio is 1 and no clip can act\. Set updates_per_batch above 1"):
        PolicyLoss(**settings)  # type: ignore[arg-type]
    PolicyLoss(updates_per_batch=2, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="updates_per_batch is 0"):
        PolicyLoss(updates_per_batch=0)
