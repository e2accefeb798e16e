"""What this project claims of a GPU, shown on a single card: `python jobs/gpu_check.py --out FILE`.

Phases run one after the other, each with a deadline, and each writes one JSON line when it ends. They run in a process
of their own, which is replaced when a phase hangs or breaks its CUDA context. Needs neither network nor Ray; torch
2.11, transformers 5.17 and DeepSpeed are enough. Models are random and of real shapes. `--tiny --device cpu` runs the
same code at toy sizes, with attention traced as CUDA would compile it. The engine has a check of its own,
gpu_check_vllm.py; `--table FILE...` writes the figures of both to docs/results.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import queue
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from spct_ray.learn.batch import Batch, Tree
    from spct_ray.learn.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is there, but the package `jobs` is not
GIB = 2**30
Figures = dict[str, Any]
START_S = 90.0  # of the phases' process: imports, CUDA


@dataclass(frozen=True)
class Phase:
    """One function, which adds its figures to those given. `deadline` in seconds."""

    run: Callable[[Case, Figures], None]
    deadline: float


PHASES: dict[str, Phase] = {}


def phase(deadline: float) -> Callable[[Callable[[Case, Figures], None]], Callable[[Case, Figures], None]]:
    """Register a phase under its function's name."""

    def register(run: Callable[[Case, Figures], None]) -> Callable[[Case, Figures], None]:
        PHASES[run.__name__] = Phase(run, deadline)
        return run

    return register


@dataclass
class Case:
    """Where phases run, and what they share."""

    device: str
    tiny: bool
    scratch: Path
    traces: Path | None = None  # directory for the profiler's
    models: dict[str, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    @functools.cached_property
    def ceiling(self) -> float:
        """FLOP/s of a large matrix product in the dtype of training."""
        import torch

        side = self.size(8192, 512)
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        return 2 * side**3 / self.seconds(lambda: a @ b, repeats=20, warm=5)

    def sync(self) -> None:
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], repeats: int = 5, warm: int = 2) -> float:
        """Median over repeats after `warm` dropped ones."""
        taken = []
        for number in range(warm + repeats):
            self.sync()
            started = time.perf_counter()
            work()
            self.sync()
            if number >= warm:
                taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    @contextlib.contextmanager
    def peak(self) -> Iterator[list[float]]:
        """GiB that torch allocated at most, and reserved, within the block; of a GPU."""
        import torch

        found: list[float] = []
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        yield found
        if self.on_gpu:
            torch.cuda.synchronize()
            found += [torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB]


# Models and data


def model_dir(case: Case, kind: str, layers: int, spread: float = 0.02) -> str:
    """A random model of the kind's widths, with a tokenizer: "qwen" (Qwen2.5-0.5B) or "gemma" (Gemma-2-2B)."""
    name = f"{kind}-{layers}-{spread}"
    if name not in case.models:
        directory = str(case.scratch / name)
        write_model(directory, kind, layers, spread, case.tiny, case.device)
        case.models[name] = directory
    return case.models[name]


def write_model(directory: str, kind: str, layers: int, spread: float, tiny: bool, device: str) -> None:
    """Write bf16 weights drawn with a deviation of `spread`, config, and a tokenizer of bytes and made-up words."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, Qwen2Config

    from jobs.bench.train import write_tokenizer

    vocab = 1024 if tiny else {"qwen": 151936, "gemma": 256000}[kind]
    common: dict[str, Any] = {
        "vocab_size": vocab, "num_hidden_layers": layers, "initializer_range": spread, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": 2, "max_position_embeddings": 32768,
    }  # fmt: skip
    if kind == "qwen":
        sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
        small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        config: Any = Qwen2Config(**common, **(small if tiny else sizes), tie_word_embeddings=True)
    else:
        sizes = {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4}
        small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = Gemma2Config(
            **common, **(small if tiny else sizes), head_dim=16 if tiny else 256, sliding_window=64 if tiny else 512
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    del model
    write_tokenizer(directory, vocab - 8)  # transformers adds one of its own


def draw(rng: random.Random, num: int) -> list[int]:
    return [rng.randrange(3, 500) for _ in range(num)]


def judge_rows(case: Case, prompts: int, share: bool, micro_tokens: int, group: int = 4) -> list[Batch]:
    """Rows of `prompts` groups: a prompt of 1,500 tokens and four completions of 260, or of toy sizes."""
    from spct_ray.learn.policy import Sample, sample_rows

    rng = random.Random(0)
    prompt_tokens, completion_tokens = case.size(1500, 60), case.size(260, 12)
    samples = []
    for _ in range(prompts):
        prompt = draw(rng, prompt_tokens)
        for g in range(group):
            completion = tuple(draw(rng, completion_tokens))
            logps = tuple(-6.0 - rng.random() for _ in completion)
            samples.append(Sample((*prompt, *completion), len(prompt), logps, 1.0 if g % 2 else -0.5))
    return sample_rows(samples, 0, 1, micro_tokens, share)[0]


def make_trainer(case: Case, directory: str, **options: Any) -> Trainer:
    """One rank with AdamW and no warm-up; `options` are of TrainResources, and `lora`, `lr`, `head`, `dtype`."""
    from spct_ray.learn.train_config import OptimConfig, TrainResources
    from spct_ray.learn.trainer import Trainer

    optim = OptimConfig(
        lr=options.pop("lr", 1e-5),
        schedule="constant",
        dtype=options.pop("dtype", "bfloat16" if case.on_gpu else "auto"),
    )
    lora, head = options.pop("lora", None), options.pop("head", "lm")
    resources = TrainResources(gpus_per_worker=int(case.on_gpu), threads=0 if case.on_gpu else 2, **options)
    return Trainer(directory, head=head, optim=optim, resources=resources, total_steps=1000, seed=0, lora=lora)


def sft_step(trainer: Trainer, rows: Sequence[Batch]) -> dict[str, float]:
    """One update on the mean loss of all trained tokens."""
    total = sum(len(row.target_N) for row in rows)
    return trainer.step(rows, lambda row: -trainer.logprobs(row).sum() / total)


def sequences_of(trees: Sequence[Tree]) -> int:
    return sum(tree.trunk + sum(tree.branches) for tree in trees)


def forget() -> None:
    """Free what a phase left behind."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Phases


@phase(40)
def versions(case: Case, result: Figures) -> None:
    """The card, its software and its ceilings: the denominators of what follows."""
    import deepspeed
    import torch
    import transformers

    result |= {
        "torch": torch.__version__, "transformers": transformers.__version__, "deepspeed": deepspeed.__version__,
        "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    with contextlib.suppress(PackageNotFoundError):
        result["liger"] = version("liger-kernel")
    if case.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        result |= {"card": properties.name, "memory_gib": round(properties.total_memory / GIB, 1)}
        result["driver"] = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.strip()
    source = torch.empty(case.size(4 * GIB, 1 << 24), dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    copied = 2 * len(source) / case.seconds(lambda: target.copy_(source), repeats=10)
    result |= {"matmul_tflops": case.ceiling / 1e12, "copy_tb_s": copied / 1e12}


def random_trees(rng: random.Random, total: int) -> tuple[Tree, ...]:
    """Trees of `total` tokens in all: trunks with one to five branches of different lengths, and trunks alone."""
    from spct_ray.learn.batch import Tree

    trees, left = [], total
    while left > 0:
        size = min(left, rng.randint(max(1, total // 8), max(1, total // 3)))
        branches = []
        if size > 20 and rng.random() < 0.8:
            trunk = rng.randint(size // 3, 2 * size // 3)
            rest = size - trunk
            while rest:
                branches.append(min(rest, rng.randint(1, max(1, size // 4))))
                rest -= branches[-1]
        else:
            trunk = size
        trees.append(Tree(trunk, tuple(branches)))
        left -= size
    return tuple(trees)


def dense_mask(trees: Sequence[Tree], window: int | None, device: str) -> Tensor:
    """[T, T]: who sees whom, from what trees mean, without intervals or blocks."""
    import torch

    tree_T, branch_T, place_T = list[int](), list[int](), list[int]()
    for number, tree in enumerate(trees):
        for branch, length in enumerate((tree.trunk, *tree.branches)):
            tree_T += [number] * length
            branch_T += [branch] * length
            place_T += range(tree.trunk if branch else 0, (tree.trunk if branch else 0) + length)
    owner, part, place = (torch.tensor(values, device=device) for values in (tree_T, branch_T, place_T))
    row = torch.arange(len(place), device=device)
    seen = (owner[:, None] == owner) & ((part == 0) | (part[:, None] == part)) & (row <= row[:, None])
    return seen & (place[:, None] - place < window) if window else seen


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The oracle: float32, all scores at once."""
    import torch

    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def attention_inputs(case: Case, shape: str, tokens: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, key and value as a model's projections give them, and what attention is told."""
    import torch

    heads, kv_heads, dim, softcap = {
        "qwen": (14, 2, 64, None), "gemma": (8, 4, 256, 50.0),
    }[shape]  # fmt: skip
    if case.tiny:
        heads, kv_heads, dim = 4, 2, 16
    dtype = torch.bfloat16 if case.on_gpu else torch.float32
    inputs = [
        torch.randn(1, tokens, h, dim, device=case.device, dtype=dtype).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]
    return inputs, {"scale": dim**-0.5, "softcap": softcap}


def flex(case: Case, inputs: Sequence[Tensor], trees: tuple[Tree, ...], window: int | None, **options: Any) -> Tensor:
    from spct_ray.learn import attention

    backend = attention.FLEX_BACKENDS[case.device]
    return attention._attend_flex(tuple(inputs), trees, options["scale"], window, options["softcap"], backend)


def num_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def padded(trees: tuple[Tree, ...], case: Case) -> tuple[Tree, ...]:
    """With the padding that a row of these trees gets."""
    import torch

    from spct_ray.learn.attention import num_padding
    from spct_ray.learn.batch import Tree

    padding = num_padding(sequences_of(trees), torch.device(case.device))
    return (*trees, Tree(padding)) if padding else trees


@phase(120)
def flex_oracle(case: Case, result: Figures) -> None:
    """Compiled attention, forward and backward, against a dense float32 mask; and how often it was compiled."""
    import torch

    before, worst = num_graphs(), 0.0
    for shape, window in (("qwen", None), ("gemma", 512 if not case.tiny else 40), ("gemma", None)):
        for tokens in (2, 253, 2048, 8192) if not case.tiny else (2, 253, 700):
            trees = padded(random_trees(random.Random(tokens), tokens), case)
            num = sequences_of(trees)
            inputs, options = attention_inputs(case, shape, num)
            started = time.perf_counter()
            output = flex(case, inputs, trees, window, **options)
            slope = torch.randn_like(output)
            grads = torch.autograd.grad(output, inputs, slope)
            case.sync()
            if tokens == 2:
                result[f"compile_s_{shape}_{window}"] = time.perf_counter() - started
            exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
            query, key, value = exact
            expected = dense_attention(query, key, value, dense_mask(trees, window, case.device), **options)
            expected_grads = torch.autograd.grad(expected, exact, slope.float())
            for name, got, want in zip("oqkv", (output, *grads), (expected, *expected_grads), strict=True):
                error = float((got.float() - want).norm() / want.norm())
                worst = max(worst, error if math.isfinite(error) else math.inf)
                if tokens == 8192 or case.tiny:
                    result[f"error_{shape}_{window}_{tokens}_{name}"] = error
            with torch.no_grad():
                again = flex(case, [tensor.detach() for tensor in inputs], trees, window, **options)
            worst = max(worst, float((again.float() - expected).norm() / expected.norm()))
            del expected, expected_grads, exact
        forget()
    graphs = num_graphs() - before
    result |= {"graphs": graphs, "worst_error": worst}
    check(worst < (2e-2 if case.on_gpu else 1e-5), f"relative error {worst}")
    check(graphs == 4, f"{graphs} graphs instead of 4: two models, with and without gradients")


def judge_trees(case: Case, tokens: int) -> tuple[Tree, ...]:
    """Trees of 1,500 + 4 x 260 tokens (or toy sizes), and one trunk of what is left of the row."""
    from spct_ray.learn.batch import Tree

    tree = Tree(case.size(1500, 150), (case.size(260, 26),) * 4)
    whole, rest = divmod(tokens, sequences_of([tree]))
    return (*(tree,) * whole, *([Tree(rest)] if rest else []))


def attend(case: Case, shape: str, trees: tuple[Tree, ...], backward: bool) -> Callable[[], None]:
    """One call of compiled attention over the trees, with its gradients."""
    import torch

    inputs, options = attention_inputs(case, shape, sequences_of(trees))
    slope = torch.randn_like(inputs[0])

    def work() -> None:
        with torch.set_grad_enabled(backward):
            given = inputs if backward else [tensor.detach() for tensor in inputs]
            output = flex(case, given, trees, None, **options)
            if backward:
                torch.autograd.grad(output, inputs, slope)

    return work


@phase(60)
def flex_speed(case: Case, result: Figures) -> None:
    """Judge-shaped trees in a row of 8,192 tokens against PyTorch's SDPA on as many causal pairs; and the mask."""
    import torch
    import torch.nn.functional as F

    from spct_ray.learn import attention

    tokens = case.size(8192, 1024)
    trees = judge_trees(case, tokens)
    pairs = sum(t.trunk * (t.trunk + 1) // 2 + sum(t.trunk * b + b * (b + 1) // 2 for b in t.branches) for t in trees)
    result["pairs"] = pairs
    for shape in ("qwen", "gemma") if case.on_gpu else ("qwen",):
        (query, *_), _ = attention_inputs(case, shape, math.isqrt(2 * pairs))
        heads, dim = query.shape[1], query.shape[3]
        plain = [torch.randn_like(query).contiguous().requires_grad_() for _ in range(3)]
        slope = torch.randn_like(plain[0])

        def theirs(backward: bool, plain: Any = plain, slope: Any = slope) -> None:
            with torch.set_grad_enabled(backward):
                query, key, value = plain
                output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
                if backward:
                    torch.autograd.grad(output, plain, slope)

        for name, backward in (("forward", False), ("both", True)):
            mine = case.seconds(attend(case, shape, trees, backward), repeats=10, warm=3)
            other = case.seconds(functools.partial(theirs, backward), repeats=10, warm=3)
            flops = (14 if backward else 4) * pairs * heads * dim
            result |= {
                f"{shape}_{name}_ms": mine * 1e3, f"{shape}_{name}_sdpa_ms": other * 1e3,
                f"{shape}_{name}_ratio": other / mine, f"{shape}_{name}_tflops": flops / mine / 1e12,
            }  # fmt: skip
    for size in (tokens, 2 * tokens):
        many = judge_trees(case, size)

        def build(many: Any = many) -> Any:
            attention._flex_mask.cache_clear()
            return attention._flex_mask(many, None, torch.device(case.device))

        with case.peak() as peak:
            before = torch.cuda.memory_allocated() / GIB if case.on_gpu else 0.0
            build()
        result[f"mask_{size}_ms"] = case.seconds(build) * 1e3
        if peak:
            result[f"mask_{size}_peak_gib"] = peak[0] - before


@phase(110)
def trainer(case: Case, result: Figures) -> None:
    """Updates of a 0.5B model on packed rows of 16,384 tokens: speed, memory against the plan, and where time goes."""
    import torch

    from jobs.flops import training_flops, work_of
    from spct_ray.learn.train_config import LoraConfig, OptimConfig, TrainResources
    from spct_ray.stages.plan_check import ModelShape, Training

    directory = model_dir(case, "qwen", case.size(24, 2))
    micro_tokens = case.size(16384, 512)
    with case.peak() as peak:
        trained = make_trainer(case, directory, micro_tokens=micro_tokens)
        rows = judge_rows(case, prompts=case.size(24, 4), share=True, micro_tokens=micro_tokens)
        losses = [sft_step(trained, rows)["loss"] for _ in range(2)]
        seconds = case.seconds(lambda: losses.append(sft_step(trained, rows)["loss"]), repeats=4, warm=0)
    shape = ModelShape.of(trained.model.config.get_text_config().to_dict())
    assert shape is not None
    work = work_of(
        shape, ((t.trunk, t.branches) for row in rows for t in row.trees), sum(len(row.target_N) for row in rows)
    )
    tokens = sum(row.num_tokens for row in rows)
    result |= {
        "rows": len(rows), "tokens": tokens, "seconds_update": seconds, "tokens_s": tokens / seconds,
        "mfu": 3 * work.forward(shape) / seconds / case.ceiling,  # nothing that is computed twice is counted
        "computed_share": training_flops(trained.model.config, rows) / seconds / case.ceiling,
        "losses": losses,
    }  # fmt: skip
    plan = Training(TrainResources(micro_tokens=micro_tokens), LoraConfig(), OptimConfig(dtype="bfloat16")).memory(
        shape
    )
    result["plan_gib"] = sum(value for name, value in plan.items() if name != "reserve")
    if peak:
        result |= {"peak_gib": peak[0], "reserved_gib": peak[1], "peak_to_plan": peak[0] / result["plan_gib"]}
    one_row = rows[:1]
    result["profile"] = profile(case, lambda: sft_step(trained, one_row))
    result["seconds_row"] = case.seconds(lambda: sft_step(trained, one_row), repeats=3, warm=1)
    if case.on_gpu:
        with torch.no_grad():
            result["seconds_forward_row"] = case.seconds(lambda: trained.logprobs(one_row[0]), repeats=3, warm=1)
    check(losses[-1] < losses[0] and all(map(math.isfinite, losses)), f"losses {losses}")


def profile(case: Case, work: Callable[[], Any]) -> dict[str, Any]:
    """The kernels that take most of the device's time, and how long the device does nothing."""
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if case.on_gpu else [])
    with torch.profiler.profile(activities=activities) as recorded:
        started = time.perf_counter()
        work()
        case.sync()
        seconds = time.perf_counter() - started
    if case.traces:
        case.traces.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(case.traces / "trace.json.gz"))
    kernels: dict[str, list[float]] = {}
    for event in recorded.events() or ():
        if not event.is_user_annotation and event.device_type == (
            torch.autograd.DeviceType.CUDA if case.on_gpu else torch.autograd.DeviceType.CPU
        ):
            taken = kernels.setdefault(event.name[:90], [0.0, 0])
            taken[0] += event.device_time_total / 1e3 if case.on_gpu else event.self_cpu_time_total / 1e3
            taken[1] += 1
    top = sorted(kernels.items(), key=lambda pair: -pair[1][0])[:25]
    busy = sum(milliseconds for milliseconds, _ in kernels.values())
    return {
        "wall_ms": seconds * 1e3, "busy_ms": busy,
        "kernels": [[name, round(ms, 2), count] for name, (ms, count) in top],
    }  # fmt: skip


@phase(60)
def trainer_unfused(case: Case, result: Figures) -> None:
    """The same updates with transformers' own layers: what Liger's kernels bring."""
    from spct_ray.learn import model

    directory, micro_tokens = model_dir(case, "qwen", case.size(24, 2)), case.size(16384, 512)
    fuse, model.fuse_layers = model.fuse_layers, lambda model: None
    try:
        from transformers.models.qwen2 import modeling_qwen2

        rotary = modeling_qwen2.apply_rotary_pos_emb
        modeling_qwen2.apply_rotary_pos_emb = plain_rotary
        trained = make_trainer(case, directory, micro_tokens=micro_tokens)
        rows = judge_rows(case, prompts=case.size(24, 4), share=True, micro_tokens=micro_tokens)
        losses = [sft_step(trained, rows)["loss"]]
        seconds = case.seconds(lambda: losses.append(sft_step(trained, rows)["loss"]), repeats=2, warm=1)
    finally:
        model.fuse_layers, modeling_qwen2.apply_rotary_pos_emb = fuse, rotary
    result |= {"seconds_update": seconds, "losses": losses}


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """transformers' rotary embedding, which Liger replaces for the whole process."""
    import torch

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]

    return turned(q), turned(k)


@phase(80)
def grpo(case: Case, result: Figures) -> None:
    """A GRPO update with prompts shared, repeated, and padded as usual: equal losses, and the seconds of each."""
    from jobs.bench.train import Sizes, grpo_ours, grpo_padded
    from spct_ray.learn.batch import BatchSize
    from spct_ray.learn.policy import objective_of, update_policy
    from spct_ray.learn.train_config import PolicyLoss

    directory, micro_tokens = model_dir(case, "qwen", case.size(24, 2)), case.size(16384, 512)
    prompts, completion = case.size(16, 3), case.size(260, 12)
    trained = make_trainer(case, directory, micro_tokens=micro_tokens, lr=0.0)
    for name, share in (("shared", True), ("own", False)):
        rows = judge_rows(case, prompts, share, micro_tokens)
        size = BatchSize(4 * prompts, 4 * prompts * completion)
        numbers: list[dict[str, float]] = []

        update = functools.partial(update_policy, trained, rows, objective_of(PolicyLoss(beta=0.0), completion), size)
        result[f"seconds_{name}"] = case.seconds(functools.partial(_call, update, numbers), repeats=3, warm=1)
        result[f"loss_{name}"], result[f"tokens_{name}"] = numbers[-1]["loss"], numbers[-1]["tokens_trained"]
        result[f"grad_norm_{name}"] = numbers[-1]["grad_norm"]
    result["shared_to_own"] = result["seconds_own"] / result["seconds_shared"]
    gap = abs(result["loss_shared"] - result["loss_own"])
    del trained, update
    forget()
    sizes = Sizes(
        prompts=prompts, group_size=4, prompt_tokens=case.size(1500, 60), completion_tokens=completion,
        micro_tokens=micro_tokens, head_tokens=0, head_vocab=0, head_hidden=0,
    )  # fmt: skip
    for name, make in (("varied", grpo_ours), ("padded", grpo_padded)):  # lengths from half of the given ones to all
        side = make(directory, sizes)
        first = side()
        result[f"loss_{name}"], result[f"tokens_{name}"] = first.loss, first.tokens
        result[f"seconds_{name}"] = case.seconds(side, repeats=2, warm=1)
        del side
        forget()
    result["shared_to_padded"] = result["seconds_padded"] / result["seconds_varied"]
    check(gap <= 1e-3 * max(1.0, abs(result["loss_own"])), f"losses differ by {gap}")


def _call(work: Callable[[], Any], results: list[Any]) -> None:
    results.append(work())


@phase(90)
def zero(case: Case, result: Figures) -> None:
    """ZeRO 1, 2, 3 and recomputation find the same losses; a resumed run goes on as if it had not stopped."""

    directory, micro_tokens = model_dir(case, "qwen", case.size(4, 2)), case.size(8192, 512)
    rows = judge_rows(case, case.size(6, 3), True, micro_tokens)
    losses: dict[str, list[float]] = {}
    for name, options in (
        ("zero1", {"zero_stage": 1}), ("zero2", {"zero_stage": 2}), ("zero3", {"zero_stage": 3}),
        ("recompute", {"zero_stage": 1, "gradient_checkpointing": True}),
    ):  # fmt: skip
        trained = make_trainer(case, directory, micro_tokens=micro_tokens, lr=1e-4, **options)
        losses[name] = [sft_step(trained, rows)["loss"] for _ in range(2)]
        checkpoints = str(case.scratch / f"checkpoints-{name}")
        trained.save(checkpoints, {"at": 2})
        losses[name].append(sft_step(trained, rows)["loss"])
        resumed = make_trainer(case, directory, micro_tokens=micro_tokens, lr=1e-4, **options)
        state = resumed.resume(checkpoints)
        again = sft_step(resumed, rows)["loss"]
        result[f"resumed_{name}"] = again - losses[name][2]
        check(state == {"at": 2}, f"{name}: resumed with {state}")
        weights = {key: value.float().cpu() for key, value in trained.named_weights()}
        plain = {key: value.float().cpu() for key, value in resumed.named_weights()}
        check(weights.keys() == plain.keys() == {key for key, _ in trained.weight_shapes()}, f"{name}: names")
        result[f"weights_{name}"] = max(float((weights[key] - plain[key]).abs().max()) for key in weights)
        del trained, resumed, weights, plain
        shutil.rmtree(checkpoints)
        forget()
    result["losses"] = losses
    for name, values in losses.items():
        gap = max(abs(a - b) for a, b in zip(values, losses["zero1"], strict=True))
        check(gap < 1e-3 * losses["zero1"][0], f"{name} differs from zero1 by {gap}")
        check(abs(result[f"resumed_{name}"]) < 1e-3, f"{name}: resumed by {result[f'resumed_{name}']}")


@phase(50)
def lora(case: Case, result: Figures) -> None:
    """Adapters of rank 32: seconds and memory of an update, and the reference that is the policy without them."""
    import torch

    from spct_ray.learn.policy import Reference
    from spct_ray.learn.train_config import LoraConfig, TrainResources

    directory, micro_tokens = model_dir(case, "qwen", case.size(24, 2)), case.size(16384, 512)
    rows = judge_rows(case, case.size(6, 3), True, micro_tokens)
    with case.peak() as peak:
        trained = make_trainer(case, directory, micro_tokens=micro_tokens, lora=LoraConfig(rank=32), lr=1e-3)
        with torch.no_grad():
            before = trained.logprobs(rows[0]).cpu()
        losses = [sft_step(trained, rows)["loss"] for _ in range(2)]
        seconds = case.seconds(lambda: losses.append(sft_step(trained, rows)["loss"]), repeats=2, warm=0)
    reference = Reference(directory, trained, TrainResources(gpus_per_worker=int(case.on_gpu)))
    without = reference.logprobs(rows[0])
    gap = float((without.cpu() - before).abs().max())
    with torch.no_grad():
        moved = float((trained.logprobs(rows[0]).cpu() - before).abs().max())
    result |= {"seconds_update": seconds, "losses": losses, "reference_gap": gap, "policy_moved": moved}
    if peak:
        result["peak_gib"] = peak[0]
    check(gap < 1e-6 and moved > 1e-3, f"reference gap {gap}, policy moved {moved}")


@phase(80)
def logprobs(case: Case, result: Figures) -> None:
    """Log-probs of the trainer's network against transformers' own: what rounding alone may cost (the parity gate)."""
    import torch
    from transformers import AutoModelForCausalLM

    from spct_ray.learn.batch import make_batch
    from spct_ray.learn.model import TokenLogprobs, load_model

    rng, length = random.Random(3), case.size(512, 64)
    sequences = [draw(rng, length) for _ in range(4)]
    batch = make_batch(sequences, [1] * 4).to(case.device)
    for kind, other in (("qwen", "sdpa"), ("gemma", "eager")):
        # Wide weights: the logits then spread as a trained model's do, not within a nat of each other.
        directory = model_dir(case, kind, case.size(24 if kind == "qwen" else 6, 2), spread=0.05)
        for dtype in (torch.bfloat16, torch.float32) if case.on_gpu else (torch.float32,):
            plain = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=other)
            plain = plain.to(case.device).eval()
            with torch.no_grad():
                ids = torch.tensor(sequences, device=case.device)
                logits = plain(ids).logits[:, :-1].float()
                expected = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).flatten().cpu()
                spread = float(logits.std(-1).mean())
            del plain, logits
            forget()
            ours = TokenLogprobs(load_model(directory, "lm", dtype, case.on_gpu)).to(case.device).eval()
            with torch.no_grad():
                got = ours(batch).cpu()
            gaps = (got - expected).abs().double()
            name = f"{kind}_{str(dtype).removeprefix('torch.')}"
            result |= {
                f"{name}_mean": float(gaps.mean()), f"{name}_p99": float(gaps.quantile(0.99)),
                f"{name}_max": float(gaps.max()), f"{name}_logit_std": spread,
                f"{name}_mean_logp": float(expected.mean()),
            }  # fmt: skip
            del ours
            forget()
    for name in ("qwen", "gemma"):
        mean, p99 = result[f"{name}_float32_mean"], result[f"{name}_float32_p99"]
        check(mean < 1e-3 and p99 < 1e-2, f"{name} in float32: mean {mean}, p99 {p99}")


@phase(40)
def meta(case: Case, result: Figures) -> None:
    """The meta RM's first call, which compiles, and a warm one, on eight judgements of one item."""
    import torch

    from spct_ray.learn.batch import make_batch
    from spct_ray.learn.model import LastTokenScore, load_model

    directory = model_dir(case, "qwen", case.size(24, 2))
    dtype = torch.bfloat16 if case.on_gpu else torch.float32
    module = LastTokenScore(load_model(directory, "scalar", dtype, case.on_gpu)).to(case.device).eval()
    rng = random.Random(0)
    prompt = draw(rng, case.size(1200, 60))
    sequences = [prompt + draw(rng, case.size(260, 12)) for _ in range(8)]
    batch = make_batch(sequences, [len(prompt)] * 8).to(case.device)

    def score() -> None:
        with torch.no_grad():
            module(batch).tolist()

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        started = time.perf_counter()
        score()
        result["first_s"] = time.perf_counter() - started
    result["warm_s"] = case.seconds(score)


@phase(150)
def flex_options(case: Case, result: Figures) -> None:
    """Which of the kernels' settings is the fastest: torch's own spill registers at head sizes 64 and 256."""
    import torch

    from spct_ray.learn import attention

    trees = judge_trees(case, case.size(8192, 1024))
    kept = dict(attention.KERNEL_OPTIONS)
    candidates: dict[str, tuple[dict[str, int], ...]] = {
        "qwen": ({}, {"fwd_num_warps": 8}, {"fwd_num_warps": 8, "fwd_BLOCK_N": 64}),
        "gemma": ({}, {"bwd_num_warps": 8}),
    }
    try:
        for shape, options in candidates.items():
            for chosen in options:
                torch._dynamo.reset()
                attention.KERNEL_OPTIONS.clear()
                attention.KERNEL_OPTIONS.update({16: chosen, 64: chosen, 256: chosen})
                name = f"{shape}_{'_'.join(f'{key}={value}' for key, value in chosen.items()) or 'torch'}"
                for part, backward in (("forward", False), ("both", True)):
                    work = attend(case, shape, trees, backward)
                    result[f"{name}_{part}_ms"] = case.seconds(work, repeats=case.size(10, 1)) * 1e3
    finally:
        attention.KERNEL_OPTIONS.clear()
        attention.KERNEL_OPTIONS.update(kept)
        torch._dynamo.reset()


@phase(60)
def ipc(case: Case, result: Figures) -> None:
    """A tensor of 1 GiB handed to another process by CUDA IPC, also out of expandable segments."""
    if not case.on_gpu:
        result["skipped"] = "there is no CUDA IPC without a GPU"
        return
    for name, setting in (("default", ""), ("expandable", "expandable_segments:True")):
        environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting}
        done = subprocess.run(
            [sys.executable, __file__, "--ipc"], env=environment, capture_output=True, text=True, timeout=50
        )
        lines = done.stdout.strip().splitlines()
        failed = (done.stderr.strip().splitlines() or ["no output"])[-1]
        answer = json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": failed}
        result |= {f"{name}_{key}": value for key, value in answer.items()}
    check("default_gib_s" in result, "CUDA IPC does not work here")


def ipc_parent() -> None:
    """Both sides of `ipc`, in processes of their own."""
    import torch
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    source = torch.arange(GIB // 4, dtype=torch.int32, device="cuda")
    mine, theirs = context.Pipe()
    child = context.Process(target=ipc_child, args=(theirs,))
    child.start()
    mine.recv()
    started = time.perf_counter()
    mine.send(source)
    seconds, total = mine.recv()
    child.join()
    assert total == int(source.long().sum()), "the other process read other numbers"
    print(json.dumps({"gib_s": 1 / seconds, "handover_s": time.perf_counter() - started}))


def ipc_child(pipe: Any) -> None:
    import torch

    torch.empty(1, device="cuda")
    pipe.send("ready")
    tensor = pipe.recv()
    torch.cuda.synchronize()
    started = time.perf_counter()
    own = tensor.clone()
    torch.cuda.synchronize()
    pipe.send((time.perf_counter() - started, int(own.long().sum())))


# Running them


class CheckError(Exception):
    """A figure is not what it has to be."""


def check(holds: bool, message: str) -> None:
    if not holds:
        raise CheckError(message)


def work(options: argparse.Namespace) -> None:
    """Run the phases in this process; a line to the real standard output each. Ends after an error of CUDA's."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not a line
    import torch

    from spct_ray.learn import attention

    if options.device == "cpu":
        from torch.nn.attention import flex_attention

        torch.set_num_threads(2)
        attention.FLEX_BACKENDS["cpu"] = "aot_eager"
        flex_attention._validate_device = lambda *_: None  # it refuses gradients on CPU, though they can be traced
    case = Case(options.device, options.tiny, Path(options.scratch), options.traces)
    for name in options.only:
        started = time.perf_counter()
        line: dict[str, Any] = {"phase": name, "ok": True}
        try:
            PHASES[name].run(case, line)
        except Exception as error:  # whatever a phase meets, the others are still worth their time
            line |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
            traceback.print_exc()
        line["seconds"] = time.perf_counter() - started
        lines.write(json.dumps(line) + "\n")
        if "CUDA error" in line.get("error", ""):
            os._exit(1)
        forget()


def supervise(options: argparse.Namespace) -> bool:
    """Run all phases, replacing their process where one overruns its deadline or dies; True where all held."""
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        out = stack.enter_context(open(options.out, "a", buffering=1)) if options.out else None
        ends = time.monotonic() + options.budget
        waiting, all_hold = list(options.only), True
        while waiting:
            command = [sys.executable, __file__, "--worker", "--device", options.device, "--scratch", scratch]
            command += ["--tiny"] * options.tiny + ["--only", *waiting]
            command += ["--traces", str(options.traces)] if options.traces else []
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            answers: queue.Queue[str] = queue.Queue()
            threading.Thread(target=_read, args=(process, answers), daemon=True).start()
            grace = START_S
            while waiting:
                name = waiting[0]
                patience = min(PHASES[name].deadline * options.patience + grace, ends - time.monotonic())
                grace, line, answer = 0.0, {"phase": name, "ok": False}, ""
                try:
                    answer = answers.get(timeout=max(0.0, patience))
                except queue.Empty:
                    line["error"] = f"not done within {patience:.0f} s"
                if answer:
                    line = json.loads(answer)
                elif "error" not in line:
                    line["error"] = f"its process ended with exit code {process.wait()}"
                waiting.pop(0)
                all_hold &= line["ok"]
                line = _rounded(line)
                print(json.dumps(line), flush=True)
                if out:
                    out.write(json.dumps(line) + "\n")
                if not answer:
                    break
            process.kill()
            process.wait()
            if time.monotonic() > ends:
                break
    return all_hold and not waiting


def _read(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put("")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


# The table


@dataclass(frozen=True)
class Row:
    """A figure of a phase as docs/results.md shows it, and what it is to be."""

    phase: str
    key: str
    says: str
    aim: str = ""
    unit: str = ""


ROWS = (
    Row("versions", "matmul_tflops", "bf16 matrix product, the ceiling", unit="TFLOP/s"),
    Row("versions", "copy_tb_s", "copy within the card's memory, read + write", unit="TB/s"),
    Row("flex_oracle", "worst_error", "attention against a dense float32 mask, worst relative error", "< 0.02"),
    Row("flex_oracle", "graphs", "graphs compiled for two models over all lengths, trees and windows", "4"),
    Row("flex_speed", "qwen_both_ratio", "attention, judge trees at 8 k, speed beside SDPA (D = 64)", ">= 1", "x"),
    Row("flex_speed", "gemma_both_ratio", "the same, Gemma-2's heads with soft-cap (D = 256)", "", "x"),
    Row("flex_speed", "mask_16384_ms", "block mask of a row of 16 k tokens", unit="ms"),
    Row("trainer", "tokens_s", "trainer, 0.5B, rows of 16 k tokens", unit="tokens/s"),
    Row("trainer", "mfu", "the same, share of the ceiling (nothing counted twice)", ">= 0.40"),
    Row("trainer", "peak_to_plan", "its peak memory over `spct plan`'s", "0.9 to 1.1"),
    Row("trainer_unfused", "seconds_update", "an update with transformers' own layers", unit="s"),
    Row("trainer", "seconds_update", "the same update with Liger's", unit="s"),
    Row("grpo", "shared_to_own", "GRPO update, prompt shared, speed beside each its own", ">= 2", "x"),
    Row("grpo", "shared_to_padded", "the same beside padded batches of plain transformers", "", "x"),
    Row("logprobs", "qwen_bfloat16_mean", "bf16 log-probs against transformers, mean", "< 0.01", "nats"),
    Row("logprobs", "qwen_bfloat16_p99", "the same, 99th percentile", "< 0.06", "nats"),
    Row("logprobs", "gemma_bfloat16_mean", "Gemma-2's, mean", "< 0.01", "nats"),
    Row("logprobs", "gemma_bfloat16_p99", "the same, 99th percentile", "< 0.06", "nats"),
    Row("zero", "resumed_zero3", "ZeRO-3: loss after a resume minus loss without", "0"),
    Row("lora", "seconds_update", "LoRA 32, an update of 6 prompts x 4", unit="s"),
    Row("lora", "peak_gib", "the same, peak memory", unit="GiB"),
    Row("meta", "first_s", "meta RM, first call (compiles)", unit="s"),
    Row("meta", "warm_s", "meta RM, warm call on eight judgements", unit="s"),
    Row("ipc", "default_gib_s", "1 GiB to another process by CUDA IPC", unit="GiB/s"),
    Row("ipc", "expandable_gib_s", "the same from expandable segments", unit="GiB/s"),
    Row("engine_speed", "256 own.ratio", "our engine, 256 requests, tokens/s beside LLM.generate", ">= 0.95", "x"),
    Row("engine_speed", "1024 own.ratio", "the same, 1,024 requests", ">= 0.95", "x"),
    Row("engine_speed", "1024 own.ours", "the same, tokens in all", unit="tokens/s"),
    Row("engine_limits", "1024 x 2048", "the same, at most 2,048 tokens a step", unit="tokens/s"),
    Row("engine_limits", "1024 x 16384", "the same, at most 16,384 tokens a step", unit="tokens/s"),
    Row("engine_trainer", "mean", "engine's log-probs against the trainer's, mean", "< 0.01", "nats"),
    Row("engine_trainer", "p99", "the same, 99th percentile", "< 0.06", "nats"),
    Row("engine_ipc", "ipc_s", "new weights of 0.5B from another process, by IPC", "< 1", "s"),
    Row("engine_sleep", "asleep_gib", "GPU memory while the engine sleeps", unit="GiB"),
    Row("engine_sleep", "wake_s", "until it is awake again", unit="s"),
)  # fmt: skip
RESULTS = Path(__file__).parent.parent / "docs" / "results.md"
BEGIN, END = "<!-- gpu_check: begin -->", "<!-- gpu_check: end -->"


def table(files: Sequence[str]) -> str:
    """Markdown of the newest line of each phase in the files; a figure that no line has is open."""
    found: dict[str, Figures] = {}
    for file in files:
        for text in Path(file).read_text().splitlines():
            parsed = json.loads(text)
            found[parsed["phase"]] = parsed
    told = found.get("versions", {})
    software = ", ".join(
        f"{name} {told[name]}" for name in ("torch", "transformers", "deepspeed", "liger") if name in told
    )
    head = (
        f"{told.get('card', told['python'])}, {told['date']}: {software}" if told else "No card has been at hand yet."
    )
    lines = [head, "", "| figure | measured | to be |", "|---|---|---|"]
    for row in ROWS:
        line: Figures = found.get(row.phase, {})
        figure: Any = line
        for key in row.key.split("."):
            figure = figure.get(key, {})
        value = "open" if figure == {} else f"{figure:.4g} {row.unit}".strip()
        value += "" if line.get("ok", True) else " (the phase failed)"
        lines.append(f"| {row.says} | {value} | {row.aim} |")
    failures = [f"* `{name}` failed: {figures['error']}" for name, figures in found.items() if not figures["ok"]]
    return "\n".join([*lines, "", *failures]).strip()


def write_table(files: Sequence[str]) -> None:
    """Put the table between its marks in docs/results.md."""
    before, _, rest = RESULTS.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    RESULTS.write_text(f"{before}{BEGIN}\n{table(files)}\n{END}{after}")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FILE", help="append the JSON lines here, too")
    parser.add_argument("--traces", metavar="DIR", type=Path, help="write the profiler's traces here")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--only", nargs="+", choices=list(PHASES), default=list(PHASES), metavar="PHASE")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for all phases")
    parser.add_argument("--patience", type=float, default=1.0, help="all deadlines times this")
    parser.add_argument("--table", nargs="*", metavar="FILE", help="write the lines of these files to docs/results.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    parser.add_argument("--ipc", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.table is not None:
        write_table(options.table)
    elif options.ipc:
        ipc_parent()
    elif options.worker:
        work(options)
    else:
        sys.exit(0 if supervise(options) else 1)


if __name__ == "__main__":
    main()
