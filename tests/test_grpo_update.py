"""GRPO's update on real DeepSpeed against plain torch, and its independence of micro-batches, ranks and ZeRO stage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_model
from transformers import AutoConfig, AutoTokenizer

from spct_ray.errors import ConfigError
from spct_ray.judge.seeds import derive_seed
from spct_ray.learn.batch import BatchSize, make_batch
from spct_ray.learn.policy import (
    Reference,
    Sample,
    add_logprobs,
    mini_batches,
    objective_of,
    sample_rows,
    train_on,
    update_policy,
)
from spct_ray.learn.train_config import LoraConfig, OptimConfig, PolicyLoss, TrainResources
from spct_ray.learn.trainer import Trainer

OPTIM = OptimConfig(lr=1e-2, schedule="constant", betas=(0.0, 0.9), grad_clip=0.5, dtype="float32")
BETA, CAP, NUM_SEQUENCES = 0.3, 1.1, 8
OBJECTIVE, SIZE = objective_of(PolicyLoss(beta=BETA, tis_cap=CAP), 99), BatchSize(NUM_SEQUENCES, 99)
NUM_SAMPLES = (7, 1)  # of each update; of one sample, the second of two ranks has nothing to train on
LORA = LoraConfig(rank=4)


def make_samples(num: int) -> list[Sample]:
    """Sequences of 9 to 34 tokens, groups of three with one prompt; the engine's log-probs are off by enough for the
    cap to act."""
    rng = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 280, (3, 22), generator=rng).tolist()
    samples = []
    for i in range(num):
        prompt, completion = 4 + 9 * (i // 3), 5 + (7 * i) % 17
        ids = prompts[i // 3][:prompt] + torch.randint(3, 280, (completion,), generator=rng).tolist()
        engine = (-6 + torch.randn(completion, generator=rng)).tolist()
        samples.append(Sample(tuple(ids), prompt, tuple(engine), [1.7, -0.6, 0.0, 1.0, -1.0, -0.6, 0.5][i]))
    return samples


def train(
    model_dir: str, out: str, micro_tokens: int, zero_stage: int, lora: LoraConfig | None = None
) -> list[dict[str, float]]:
    """The updates on one rank of whatever process group there is; exports the policy."""
    resources = TrainResources(zero_stage=zero_stage, micro_tokens=micro_tokens, threads=1)  # type: ignore[arg-type]
    trainer = Trainer(model_dir, head="lm", optim=OPTIM, resources=resources, total_steps=2, seed=0, lora=lora)
    reference = Reference(model_dir, trainer, resources)
    numbers = []
    for num_samples in NUM_SAMPLES:
        rows, num_passes = sample_rows(make_samples(num_samples), trainer.rank, trainer.world_size, micro_tokens)
        rows = add_logprobs("ref_logp", reference.logprobs, rows, num_passes)
        numbers.append(update_policy(trainer, rows, OBJECTIVE, SIZE))
    trainer.export(out)
    return numbers


def train_in_plain_torch(model_dir: str, lora: bool = False) -> dict[str, torch.Tensor]:
    """The same two updates sequence by sequence, with transformers' own logits and torch's own optimiser."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if lora:
        torch.manual_seed(derive_seed(0, "adapters"))
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        policy = peft.get_peft_model(policy, config)
    optimiser = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad], lr=OPTIM.lr, betas=OPTIM.betas, weight_decay=0.0
    )
    for num_samples in NUM_SAMPLES:
        optimiser.zero_grad()
        for sample in make_samples(num_samples):
            ids = torch.tensor([sample.token_ids])
            places = list(range(sample.num_prompt_tokens, len(sample.token_ids)))
            logp = policy(ids).logits.log_softmax(-1)[0]
            with torch.no_grad():
                ref_logp = reference(ids).logits.log_softmax(-1)[0]
            terms = []
            for place, engine in zip(places, sample.engine_logprobs, strict=True):
                token = sample.token_ids[place]
                lp, ref = logp[place - 1, token], ref_logp[place - 1, token]
                weight = min((lp.detach() - engine).exp().item(), CAP)
                kl = (ref - lp).exp() - (ref - lp) - 1
                terms.append(weight * sample.advantage * (lp - lp.detach()).exp() - BETA * kl)
            (-sum(terms) / len(terms) / NUM_SEQUENCES).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIM.grad_clip)
        optimiser.step()
    whole = policy.merge_and_unload() if lora else policy
    return {name: weight.detach() for name, weight in whole.named_parameters()}


def clipped_updates_in_plain_torch(model_dir: str, samples: list[Sample], clip: float) -> dict[str, torch.Tensor]:
    """GRPO without KL on parts of 1, 2, 2 and 2 samples, with ratios to the policy before the first update."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=OPTIM.lr, betas=OPTIM.betas, weight_decay=0.0)

    def logprobs(sample: Sample) -> torch.Tensor:
        ids = torch.tensor(sample.token_ids)
        logps = policy(ids[None]).logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        return logps[sample.num_prompt_tokens - 1 :]

    old = {sample: logprobs(sample).detach() for sample in samples}
    for part in (samples[:1], samples[1:3], samples[3:5], samples[5:]):
        optimiser.zero_grad()
        for sample in part:
            logp, advantage = logprobs(sample), sample.advantage
            ratio = (logp - old[sample]).exp()
            importance = (logp.detach() - torch.tensor(sample.engine_logprobs)).exp().clamp(max=CAP)
            gain = importance * torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            (-gain.mean() / len(part)).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIM.grad_clip)
        optimiser.step()
    return {name: weight.detach() for name, weight in policy.named_parameters()}


def assert_moved_alike(model_dir: str, policy: Path, expected: dict[str, torch.Tensor]) -> None:
    """In norm: Adam moves a weight by lr however small its gradient, so rounding shows in a few single weights."""
    start = load_file(Path(model_dir, "model.safetensors"))
    for name, weight in load_file(policy / "model.safetensors").items():
        if torch.equal(expected[name], start[name].float()):  # frozen beside adapters
            assert torch.equal(weight, expected[name])
            continue
        moved = (expected[name] - start[name].float()).norm()
        assert moved > 1e-3 * weight.norm()
        assert (weight - expected[name]).norm() < 1e-3 * moved, name


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("grpo_update") / "model"
    make_tiny_model(directory)
    return str(directory)


@pytest.mark.slow
def test_updates_equal_plain_torch_for_any_micro_batches(model_dir: str, tmp_path: Path) -> None:
    expected = train_in_plain_torch(model_dir)
    for micro_tokens in (10_000, 50):
        numbers = train(model_dir, str(tmp_path / "policy"), micro_tokens, zero_stage=1)
        assert_moved_alike(model_dir, tmp_path / "policy", expected)
        assert numbers[0]["kl"] == 0.0  # the policy is the reference, by the same arithmetic
        assert numbers[1]["kl"] > 0.0
        assert numbers[0]["clip_share"] == 0.0
        assert 0.0 < numbers[0]["tis_capped_share"] < 1.0
        assert numbers[0]["tokens_naive"] == sum(len(s.token_ids) for s in make_samples(7))
        assert numbers[0]["tokens_trained"] < numbers[0]["tokens_naive"]
        assert numbers[1]["tokens_trained"] == numbers[1]["tokens_naive"]  # a sample alone shares nothing


@pytest.mark.slow
def test_updates_of_adapters_equal_plain_peft_and_the_reference_is_the_policy_without_them(
    model_dir: str, tmp_path: Path
) -> None:
    numbers = train(model_dir, str(tmp_path / "policy"), 50, zero_stage=1, lora=LORA)
    assert_moved_alike(model_dir, tmp_path / "policy", train_in_plain_torch(model_dir, lora=True))
    assert numbers[0]["kl"] == 0.0
    assert numbers[1]["kl"] > 0.0


@pytest.mark.slow
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model_dir: str, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(model_dir, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    vocab = AutoConfig.from_pretrained(other).vocab_size
    tokenizer.add_tokens([f"<new{i}>" for i in range(vocab)])
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match=rf"the tokenizer has \d+ tokens, the model's vocabulary {vocab}"):
        Trainer(str(other), head="lm", optim=OPTIM, resources=TrainResources(threads=1), total_steps=2, seed=0)


@pytest.mark.slow
def test_dropout_acts_only_where_a_gradient_is_asked_for(model_dir: str) -> None:
    resources = TrainResources(threads=1)
    lora = LoraConfig(rank=4, dropout=0.5)
    trainer = Trainer(model_dir, head="lm", optim=OPTIM, resources=resources, total_steps=2, seed=0, lora=lora)
    batch = make_batch([list(range(3, 40))], [1])
    trainer.step([batch], lambda b: -trainer.logprobs(b).mean())  # B is 0 before
    with torch.no_grad():
        first, second = trainer.logprobs(batch), trainer.logprobs(batch)
    assert torch.equal(first, second)
    assert not torch.equal(first, trainer.logprobs(batch))


@pytest.mark.slow
def test_updates_after_a_resume_are_bit_equal(model_dir: str, tmp_path: Path) -> None:
    """Given the same samples: 4 updates = 2 updates, checkpoint, a new trainer and reference, 2 more."""
    resources = TrainResources(micro_tokens=50, threads=1)
    checkpoints = str(tmp_path / "checkpoints")

    def run(num_updates: int, out: str) -> None:
        trainer = Trainer(model_dir, head="lm", optim=OPTIM, resources=resources, total_steps=4, seed=0)
        first = (trainer.resume(checkpoints) or {"step": 0})["step"]
        reference = Reference(model_dir, trainer, resources)
        for step in range(first, first + num_updates):
            rows, num_passes = sample_rows(make_samples(7 - step), 0, 1, resources.micro_tokens)
            rows = add_logprobs("ref_logp", reference.logprobs, rows, num_passes)
            update_policy(trainer, rows, OBJECTIVE, SIZE)
        trainer.export(out)
        trainer.save(checkpoints, {"step": first + num_updates})

    run(4, str(tmp_path / "straight"))
    shutil.rmtree(checkpoints)
    run(2, str(tmp_path / "half"))
    run(2, str(tmp_path / "resumed"))
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(weight, resumed[name]) for name, weight in straight.items())
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert not any(torch.equal(weight, half[name]) for name, weight in straight.items())


@pytest.mark.slow
def test_the_clip_acts_on_several_updates_of_a_batch(model_dir: str, tmp_path: Path) -> None:
    """The same batch in 4 updates with a narrow and a wide clip: other weights, each as plain torch has them."""
    samples, weights, shares = make_samples(7), dict[float, dict[str, torch.Tensor]](), dict[float, float]()
    for clip in (0.01, 0.9):
        resources = TrainResources(micro_tokens=50, threads=1)
        trainer = Trainer(model_dir, head="lm", optim=OPTIM, resources=resources, total_steps=4, seed=0)
        loss = PolicyLoss(beta=0.0, tis_cap=CAP, clip=clip, updates_per_batch=4)
        numbers = train_on(trainer, mini_batches(samples, trainer, 50, loss), objective_of(loss, 99))
        trainer.export(str(tmp_path / str(clip)))
        shares[clip] = numbers["clip_share"]
        weights[clip] = clipped_updates_in_plain_torch(model_dir, samples, clip)
        assert_moved_alike(model_dir, tmp_path / str(clip), weights[clip])
    assert shares[0.01] > shares[0.9]
    assert all((weights[0.01][name] - weight).abs().max() > 1e-3 for name, weight in weights[0.9].items())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_of_zero_3_equal_plain_torch(model_dir: str, tmp_path: Path) -> None:
    command = [sys.executable, __file__, model_dir, str(tmp_path / "policy"), str(tmp_path / "store")]
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            env={**os.environ, "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=800)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert_moved_alike(model_dir, tmp_path / "policy", train_in_plain_torch(model_dir))
    assert_moved_alike(model_dir, tmp_path / "policy-lora", train_in_plain_torch(model_dir, lora=True))


if __name__ == "__main__":
    model, out, store, rank = sys.argv[1:]
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    train(model, out, micro_tokens=60, zero_stage=3)
    train(model, f"{out}-lora", micro_tokens=60, zero_stage=3, lora=LORA)
    torch.distributed.destroy_process_group()
