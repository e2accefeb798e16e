"""GRPO and SFT updates and log-probs, ours beside the usual way, in seconds, memory and FLOP/s.

The usual way is plain transformers with padded batches, as TRL does it: float32 weights, autocast where bf16 is fast,
left-padded prompts, logits of the completions alone. Both sides are given the same samples and optimiser settings, and
must find the same loss.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jobs.bench.compare import (
    Repeat,
    Side,
    SideProcess,
    add_model_arguments,
    compare,
    model_directory,
    num_threads,
)
from jobs.flops import Work, training_flops, work_of
from spct_ray.learn.batch import BatchSize
from spct_ray.learn.examples import Example
from spct_ray.learn.losses import rank_rows, sft_loss
from spct_ray.learn.model import LogprobHead
from spct_ray.learn.policy import Sample, TokenLogps, objective_of, policy_loss, sample_rows, update_policy
from spct_ray.learn.train_config import OptimConfig, PolicyLoss, TrainResources
from spct_ray.learn.trainer import Trainer
from spct_ray.precision import resolve
from spct_ray.stages.plan_check import ModelShape

T = TypeVar("T")
OPTIM = OptimConfig(lr=1e-5, schedule="constant")
OBJECTIVE = objective_of(PolicyLoss(beta=0.0), max_tokens=1024)
SHORTEST = 0.5  # of the longest prompt or completion


@dataclass(frozen=True)
class Sizes:
    """Of one update: `prompts` x `group_size` sequences; lengths are drawn between half of the given ones and all."""

    prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    micro_tokens: int
    head_tokens: int
    head_vocab: int
    head_hidden: int


_PaddedRow = tuple[Tensor, Tensor, int]  # loss, token ids [B, T], places of a sequence with logits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the bench."""
    add_model_arguments(parser, repeats=4, prompts=1, prompt_tokens=256, completion_tokens=64, head_tokens=2048)


def run(options: argparse.Namespace) -> None:
    """Print the three comparisons as a table and as JSON.

    FLOP/s stand beside the best of the machine's matrix products before and after each comparison, on equal threads.
    """
    threads = num_threads(options.threads)
    names = ("prompts", "group_size", "prompt_tokens", "completion_tokens", "micro_tokens", "head_tokens")
    sizes = Sizes(**{n: getattr(options, n) for n in names}, head_vocab=262_144, head_hidden=576)
    print(f"{threads} threads, {options.repeats - 1} repeats after one that is dropped; {asdict(sizes)}", flush=True)
    print(f"{'':14}{'ours s':>9}{'theirs s':>10}{'faster':>8}{'tokens':>16}{'peak GiB':>16}{'GFLOP/s':>16}", flush=True)
    results = []
    ceiling = SideProcess(matmul_ceiling, threads)
    peaks = [ceiling.repeat()[1]]
    with model_directory(options.model, write_model, options.layers) as model:
        for name, ours, theirs in (
            ("grpo update", grpo_ours, grpo_padded),
            ("log-probs 256k", head_ours, head_naive),
            ("sft update", sft_ours, sft_padded),
        ):
            r = compare(name, ours, theirs, options.repeats, threads, model, sizes)
            results.append(r)
            peaks.append(ceiling.repeat()[1])
            tokens, memory = f"{r.tokens_ours} / {r.tokens_theirs}", f"{r.peak_gib_ours:.2f} / {r.peak_gib_theirs:.2f}"
            rates = f"{r.flops_ours / r.ours / 1e9:.0f} / {r.flops_theirs / r.theirs / 1e9:.0f}"
            print(
                f"{name:14}{r.ours:9.3f}{r.theirs:10.3f}{r.ratio:7.2f}x{tokens:>16}{memory:>16}{rates:>16}", flush=True
            )
    ceiling.close()
    best = max(peaks)
    shares = {r.name: (r.flops_ours / r.ours / best, r.flops_theirs / r.theirs / best) for r in results}
    told = ", ".join(f"{name} {mine:.0%} / {other:.0%}" for name, (mine, other) in shares.items())
    print(f"matrix products reach {best / 1e9:.0f} GFLOP/s here; shares of it, ours / theirs: {told}")
    content = {
        "bench": "train", "threads": threads, "sizes": asdict(sizes), "results": [asdict(r) for r in results],
        "ceiling_flops": best, "shares": shares,
    }  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(content, indent=1))
    print(json.dumps(content))


def matmul_ceiling() -> Callable[[], float]:
    """FLOP/s of this machine's best square matrix product in the precision of training, once a call."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides = (2048, 4096, 8192) if device == "cuda" else (512, 1024, 2048)

    def measure() -> float:
        best = 0.0
        for n in sides:
            a, b = (torch.randn(n, n, device=device, dtype=_dtype()) for _ in range(2))
            for _ in range(4):
                started = time.perf_counter()
                float((a @ b)[0, 0])  # waits for a GPU
                best = max(best, 2 * n**3 / (time.perf_counter() - started))
        return best

    return measure


def write_tokenizer(directory: str, vocab_size: int) -> None:
    """Tokens are control tokens (padding, start, end of a turn: 0, 1, 2), bytes, and words that no text encodes to."""
    control = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    pieces = [*control, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"word{i}" for i in range(vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=control[0], eos_token=control[2], additional_special_tokens=[control[1]],
        chat_template=template,
    ).save_pretrained(directory)  # fmt: skip


def write_model(directory: str, layers: int = 30) -> None:
    """A Llama of SmolLM2-135M's shape with random weights."""
    write_tokenizer(directory, 49152)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000.0,
        pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(directory)


def grpo_ours(model_dir: str, sizes: Sizes) -> Side:
    """Packed rows, each prompt once, on the trainer."""
    trainer = make_trainer(model_dir, sizes.micro_tokens)
    samples = _samples(sizes)
    size = BatchSize(len(samples), sum(len(s.engine_logprobs) for s in samples))

    def repeat() -> Repeat:
        batches, _ = sample_rows(samples, 0, 1, sizes.micro_tokens)
        numbers = update_policy(trainer, batches, OBJECTIVE, size)
        return Repeat(numbers["loss"], int(numbers["tokens_trained"]), training_flops(trainer.model.config, batches))

    return repeat


def grpo_padded(model_dir: str, sizes: Sizes) -> Side:
    """Left-padded prompts, right-padded completions, every prompt once a completion."""
    samples = _samples(sizes)
    size = BatchSize(len(samples), sum(len(s.engine_logprobs) for s in samples))
    model, optimiser, autocast = _plain(model_dir)
    device = next(model.parameters()).device

    def row_loss(row: Sequence[Sample]) -> _PaddedRow:
        width = max(s.num_prompt_tokens for s in row)
        length = max(len(s.engine_logprobs) for s in row)
        ids, mask = torch.zeros(len(row), width + length, dtype=torch.long), torch.zeros(len(row), width + length)
        for i, sample in enumerate(row):
            start = width - sample.num_prompt_tokens
            ids[i, start : start + len(sample.token_ids)] = torch.tensor(sample.token_ids)
            mask[i, start : start + len(sample.token_ids)] = 1
        ids, mask = ids.to(device), mask.to(device)
        with autocast():
            logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1, use_cache=False).logits
        targets = ids[:, width:, None]
        logps = [line.float().log_softmax(-1).gather(1, t) for line, t in zip(logits[:, :-1], targets, strict=True)]
        logp_N = torch.stack(logps)[..., 0][mask[:, width:] > 0]
        lengths = [len(s.engine_logprobs) for s in row]
        advantages = torch.tensor([s.advantage for s in row], device=device).repeat_interleave(
            torch.tensor(lengths, device=device)
        )
        engine_N = torch.tensor([lp for s in row for lp in s.engine_logprobs], device=device)
        weights_N = OBJECTIVE.token_weights(lengths, size).to(device)
        token_logps = TokenLogps(logp_N, logp_N.detach(), engine_N)
        return policy_loss(OBJECTIVE, token_logps, advantages, weights_N), ids, length + 1

    longest = max(len(s.token_ids) for s in samples)
    return _plain_repeat(model, optimiser, lambda: map(row_loss, _rows(samples, sizes.micro_tokens // longest)))


def sft_ours(model_dir: str, sizes: Sizes) -> Side:
    """Packed rows on the trainer."""
    return sft_packed(make_trainer(model_dir, sizes.micro_tokens), _examples(sizes), sizes.micro_tokens)


def sft_packed(trainer: Trainer, examples: Sequence[Example], micro_tokens: int) -> Side:
    """An update from all examples."""
    size = BatchSize(len(examples), sum(len(e.ids) - e.prompt_length for e in examples))

    def repeat() -> Repeat:
        rows = rank_rows(examples, 0, 1, micro_tokens)
        numbers = trainer.step(rows, lambda row: sft_loss(trainer, row, size))
        flops = training_flops(trainer.model.config, rows)
        return Repeat(numbers["loss"], sum(row.num_tokens for row in rows), flops)

    return repeat


def sft_padded(model_dir: str, sizes: Sizes) -> Side:
    """Right-padded examples and labels through transformers' own loss, which computes all logits."""
    examples = _examples(sizes)
    num_trained = sum(len(e.ids) - e.prompt_length for e in examples)
    model, optimiser, autocast = _plain(model_dir)
    device = next(model.parameters()).device

    def row_loss(row: Sequence[Example]) -> _PaddedRow:
        width = max(len(e.ids) for e in row)
        ids, mask = torch.zeros(len(row), width, dtype=torch.long), torch.zeros(len(row), width)
        labels = torch.full((len(row), width), -100)
        for i, example in enumerate(row):
            ids[i, : len(example.ids)] = torch.tensor(example.ids)
            mask[i, : len(example.ids)] = 1
            labels[i, example.prompt_length : len(example.ids)] = ids[i, example.prompt_length : len(example.ids)]
        with autocast():
            output = model(
                input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device),
                num_items_in_batch=num_trained, use_cache=False,
            )  # fmt: skip
        return output.loss, ids, width

    longest = max(len(e.ids) for e in examples)
    return _plain_repeat(model, optimiser, lambda: map(row_loss, _rows(examples, sizes.micro_tokens // longest)))


def head_ours(_: str, sizes: Sizes) -> Side:
    """Log-probs of given tokens slice by slice of the vocabulary, forward and backward."""
    lm_head, hidden_NH, targets_N = _head(sizes)
    head = LogprobHead(lm_head, None)
    return _head_repeat(lm_head, hidden_NH, lambda: head(hidden_NH, targets_N), sliced=True)


def head_naive(_: str, sizes: Sizes) -> Side:
    """All logits at once."""
    lm_head, hidden_NH, targets_N = _head(sizes)

    def logprobs() -> Tensor:
        logits_NV = lm_head(hidden_NH).float()
        logp_N: Tensor = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
        return logp_N

    return _head_repeat(lm_head, hidden_NH, logprobs, sliced=False)


def _head(sizes: Sizes) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm_head = nn.Linear(sizes.head_hidden, sizes.head_vocab, bias=False, device=device, dtype=_dtype())
    hidden_NH = torch.randn(sizes.head_tokens, sizes.head_hidden).to(lm_head.weight).requires_grad_()
    return lm_head, hidden_NH, torch.randint(sizes.head_vocab, (sizes.head_tokens,), device=device)


def _head_repeat(lm_head: nn.Linear, hidden_NH: Tensor, logprobs: Callable[[], Tensor], *, sliced: bool) -> Side:
    vocab, hidden = lm_head.weight.shape
    shape = ModelShape(hidden, 0, 0, 0, 0, 0, vocab)

    def repeat() -> Repeat:
        lm_head.weight.grad = hidden_NH.grad = None
        loss = -logprobs().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        work = Work(0, 0, len(hidden_NH))
        flops = work.forward(shape) + work.backward(shape, sliced=sliced)
        return Repeat(loss.item(), len(hidden_NH), flops)

    return repeat


def _dtype() -> torch.dtype:
    dtype: torch.dtype = getattr(torch, resolve("auto", on_gpu=torch.cuda.is_available()))
    return dtype


def make_trainer(model_dir: str, micro_tokens: int) -> Trainer:
    """Ours, in the precision that the machine is fast in."""
    resources = TrainResources(
        gpus_per_worker=int(torch.cuda.is_available()), micro_tokens=micro_tokens, threads=torch.get_num_threads()
    )
    return Trainer(model_dir, head="lm", optim=OPTIM, resources=resources, total_steps=1000, seed=0)


def _plain(model_dir: str) -> tuple[Any, torch.optim.Optimizer, Callable[[], Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).train()
    options = {"lr": OPTIM.lr, "betas": OPTIM.betas, "weight_decay": OPTIM.weight_decay}
    optimiser = torch.optim.AdamW(model.parameters(), fused=True, **options)  # type: ignore[arg-type]
    return model, optimiser, lambda: torch.autocast(device, torch.bfloat16, enabled=_dtype() == torch.bfloat16)


def _plain_repeat(model: Any, optimiser: torch.optim.Optimizer, losses: Callable[[], Iterator[_PaddedRow]]) -> Side:
    shape = ModelShape.of(model.config.to_dict())
    assert shape is not None

    def repeat() -> Repeat:
        total, tokens, flops = 0.0, 0, 0.0
        for loss, ids, num_logits in losses():
            loss.backward()  # type: ignore[no-untyped-call]
            total, tokens = total + loss.item(), tokens + ids.numel()
            work = work_of(shape, [(ids.shape[1], ())] * len(ids), len(ids) * num_logits)
            flops += work.forward(shape) + work.backward(shape, sliced=False)
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimiser.step()
        optimiser.zero_grad()
        return Repeat(total, tokens, flops)

    return repeat


def _rows(sequences: Sequence[T], per_row: int) -> list[Sequence[T]]:
    step = max(1, per_row)
    return [sequences[i : i + step] for i in range(0, len(sequences), step)]


def _draw(rng: random.Random, num: int) -> list[int]:
    return [rng.randrange(3, 1000) for _ in range(num)]


def _length(rng: random.Random, longest: int) -> int:
    return rng.randint(max(1, int(longest * SHORTEST)), longest)


def _samples(sizes: Sizes) -> list[Sample]:
    rng, samples = random.Random(0), []
    for _ in range(sizes.prompts):
        prompt = _draw(rng, _length(rng, sizes.prompt_tokens))
        for g in range(sizes.group_size):
            completion = _draw(rng, _length(rng, sizes.completion_tokens))
            logps = tuple(-10.0 - rng.random() for _ in completion)
            samples.append(Sample((*prompt, *completion), len(prompt), logps, 1.0 if g % 2 else 0.5))
    return samples


def _examples(sizes: Sizes) -> list[Example]:
    rng = random.Random(1)
    lengths = [
        (_length(rng, sizes.prompt_tokens), _length(rng, sizes.completion_tokens))
        for _ in range(sizes.prompts * sizes.group_size)
    ]
    return [Example(_draw(rng, prompt + completion), prompt) for prompt, completion in lengths]
