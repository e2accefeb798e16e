"""Whole updates by our code and by TRL's own trainers (the extra `bench`), in tokens per second.

GRPO end to end: TRL generates by transformers, we by a vLLM engine in the trainer's process, whose weights are reloaded
and checked against the trainer's in each step, as in a run. Prompts, numbers of samples, lengths, reward, optimiser,
precision and threads are the same. SFT: judgements of built-in items with their natural spread of lengths, in one
update; TRL gets them sorted by length, so that it pads little. Neither recomputes activations. Tokens are those of
completions for GRPO, and real ones for SFT.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import string
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback

from jobs.bench.compare import Repeat, Side, add_model_arguments, compare, model_directory, num_threads
from jobs.bench.train import OPTIM, make_trainer, sft_packed, write_model
from spct_ray.chat import encode_example, encode_prompt
from spct_ray.cluster.sync import Parity, SentWeights, check_parity, push_weights
from spct_ray.data.builtin import BuiltinConfig, generate
from spct_ray.data.program import ProgramConfig, ProgramJudge
from spct_ray.engines.base import EngineConfig, Request, SamplingParams
from spct_ray.engines.checksums import compare as compare_checksums
from spct_ray.errors import ConfigError, SpctError
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.prompt import JudgeConfig, judge_messages
from spct_ray.learn.batch import make_batch
from spct_ray.learn.examples import Example
from spct_ray.learn.policy import Reference
from spct_ray.learn.train_config import TrainResources
from spct_ray.precision import resolve
from spct_ray.records import Message
from spct_ray.stages.grpo import GrpoConfig, Phases, update
from spct_ray.stages.rollouts import Rollout

SEED = 1


@dataclass(frozen=True)
class Work:
    """Of one update. Prompts have between 3/4 and 5/4 of `prompt_tokens`; completions end at `completion_tokens`."""

    prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    examples: int
    micro_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the bench."""
    add_model_arguments(parser, repeats=3, prompts=8, prompt_tokens=400, completion_tokens=100, examples=16)
    parser.add_argument("--only", nargs="+", choices=tuple(SIDES), default=tuple(SIDES), help="default: all")


def run(options: argparse.Namespace) -> None:
    """Print a line per comparison, and all of them as JSON. Raises ConfigError where TRL is not installed."""
    require_trl()
    threads = num_threads(options.threads)
    names = ("prompts", "group_size", "prompt_tokens", "completion_tokens", "examples", "micro_tokens")
    work = Work(**{n: getattr(options, n) for n in names})
    print(f"{threads} threads, {options.repeats - 1} repeats after one that is dropped; {asdict(work)}", flush=True)
    results = []
    with model_directory(options.model, write_model, options.layers) as model:
        for name in options.only:
            ours, theirs, beta = SIDES[name]
            r = compare(name, ours, theirs, options.repeats, threads, model, work, beta)
            rates = r.tokens_ours / r.ours, r.tokens_theirs / r.theirs
            results.append({**asdict(r), "tokens_per_second": rates, "ratio": rates[0] / rates[1]})
            print(
                f"{name:8} ours {rates[0]:.1f} tokens/s, TRL {rates[1]:.1f}: {rates[0] / rates[1]:.2f}x; seconds "
                f"{r.ours:.1f} / {r.theirs:.1f}; peak GiB {r.peak_gib_ours:.2f} / {r.peak_gib_theirs:.2f}",
                flush=True,
            )
    content = {"bench": "trl", "threads": threads, "work": asdict(work), "results": results}
    if options.json:
        Path(options.json).write_text(json.dumps(content, indent=1))
    print(json.dumps(content))


def require_trl() -> None:
    """Raise ConfigError where TRL is not installed."""
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("this bench needs TRL, which is not installed: pip install 'spct-ray[bench]'")


def grpo_ours(model_dir: str, work: Work, beta: float) -> Side:
    """Engine and trainer in one process; the update is that of the stage `grpo`. Prints the seconds of each phase."""
    from spct_ray.engines.vllm import VllmEngine

    threads, longest = torch.get_num_threads(), work.prompt_tokens * 5 // 4 + work.completion_tokens
    limits = EngineConfig(longest + 64, work.prompts * work.group_size, gpu_memory_utilization=0.3, kv_cache_gib=0.4)
    engine = VllmEngine(model_dir, replace(limits, threads=threads))
    trainer = make_trainer(model_dir, work.micro_tokens)
    torch.set_num_threads(threads)
    weights = SentWeights(trainer, getattr(torch, resolve(limits.dtype, on_gpu=torch.cuda.is_available())))
    reference = Reference(model_dir, trainer, TrainResources()) if beta else None
    prompts = [(Message("user", text),) for text in prompt_texts(trainer.tokenizer, work)]
    config = GrpoConfig(OPTIM, prompts_per_step=work.prompts, group_size=work.group_size, beta=beta, parity_p99=0.3)
    # A quarter of what the stage compares: TRL compares nothing.
    checked = [encode_prompt(trainer.tokenizer, messages)[:64] for messages in prompts[:4]]
    parity_batch = make_batch(checked, [1] * len(checked))
    directory, phase = tempfile.mkdtemp(prefix="spct-bench-"), Phases()

    def repeat() -> Repeat:
        step = trainer.steps_done
        with phase("sync"):
            push_weights(weights, engine, directory, step)  # type: ignore[arg-type]
        with phase("parity"), torch.no_grad():
            logps = [values.tolist() for values in parity_batch.split(trainer.logprobs(parity_batch).cpu())]
            sent = weights.checksums()
            compare_checksums(sent, [engine.held_tensors(list(sent))])
            check_parity(logps, engine.prompt_logprobs(checked), Parity(config.parity_mean, config.parity_p99))
        began = time.monotonic()
        with phase("rollout"):
            params = [SamplingParams(work.completion_tokens, 1.0, step, work.group_size, True) for _ in prompts]
            answers = engine.generate([Request(m, p) for m, p in zip(prompts, params, strict=True)])
        took = time.monotonic() - began
        groups = [
            [
                Rollout(
                    "", a.prompt_token_ids + a.token_ids, a.prompt_tokens, a.logprobs, "correct", True,
                    reward_of(a.token_ids), a.stop_reason, a.weight_version,
                )
                for a in group
            ]
            for group in answers
        ]  # fmt: skip
        numbers = update(trainer, reference, groups, config, work.micro_tokens, phase)
        seconds = phase.finish_step(groups, took)
        parts = ("sync", "parity", "rollout", "reference", "train")
        print("  ours:", ", ".join(f"{name} {seconds[f'seconds_{name}']:.2f} s" for name in parts), flush=True)
        return Repeat(numbers["loss"], sum(a.completion_tokens for group in answers for a in group))

    return repeat


def grpo_trl(model_dir: str, work: Work, beta: float) -> Side:
    """TRL's GRPOTrainer: one generation of the whole batch, then as many rows at once as the token budget holds."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    num, longest = work.prompts * work.group_size, work.prompt_tokens * 5 // 4 + work.completion_tokens
    rows = max(n for n in range(1, num + 1) if num % n == 0 and n * longest <= max(work.micro_tokens, longest))
    counted, begun = [0], [0.0]

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        print(f"  TRL: rollout {time.monotonic() - begun[0]:.2f} s", flush=True)
        counted[0] = sum(map(len, completion_ids))
        return [reward_of(ids) for ids in completion_ids]

    arguments = GRPOConfig(
        beta=beta,
        num_generations=work.group_size,
        max_completion_length=work.completion_tokens,
        temperature=1.0,
        loss_type="grpo",
        shuffle_dataset=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=num // rows,
        **_common(),
    )
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": text}]} for text in prompt_texts(tokenizer, work)]
    )
    driven = Driven()
    driven.attach(
        GRPOTrainer(
            model=model_dir, reward_funcs=reward, args=arguments, train_dataset=data, processing_class=tokenizer,
            callbacks=[driven],
        )
    )  # fmt: skip

    def repeat() -> Repeat:
        begun[0] = time.monotonic()
        return Repeat(driven.update(), counted[0])

    return repeat


def sft_ours(model_dir: str, work: Work, _: float) -> Side:
    """Packed rows on the trainer; counts real tokens."""
    trainer = make_trainer(model_dir, work.micro_tokens)
    examples = judgements(trainer.tokenizer, work.examples)
    update_once = sft_packed(trainer, examples, work.micro_tokens)
    return lambda: Repeat(update_once().loss, sum(len(e.ids) for e in examples))


def sft_trl(model_dir: str, work: Work, _: float) -> Side:
    """TRL's SFTTrainer on padded batches within the same token budget; counts real tokens."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    examples = sorted(judgements(tokenizer, work.examples), key=lambda e: -len(e.ids))
    num, longest = len(examples), len(examples[0].ids)
    rows = max(n for n in range(1, num + 1) if num % n == 0 and n * longest <= max(work.micro_tokens, longest))
    arguments = SFTConfig(
        max_length=None,
        packing=False,
        padding_free=False,
        shuffle_dataset=False,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=num // rows,
        **_common(),
    )
    columns = [
        {"input_ids": e.ids, "labels": [-100] * e.prompt_length + list(e.ids[e.prompt_length :])} for e in examples
    ]
    driven = Driven()
    driven.attach(
        SFTTrainer(
            model=model_dir, args=arguments, train_dataset=Dataset.from_list(columns), processing_class=tokenizer,
            callbacks=[driven],
        )
    )  # fmt: skip
    return lambda: Repeat(driven.update(), sum(len(e.ids) for e in examples))


SIDES: dict[str, tuple[Callable[..., Side], Callable[..., Side], float]] = {
    "grpo": (grpo_ours, grpo_trl, 0.0),
    "grpo-kl": (grpo_ours, grpo_trl, 0.04),
    "sft": (sft_ours, sft_trl, 0.0),
}


class Driven(TrainerCallback):  # type: ignore[misc]
    """A transformers Trainer that does one update a call: it trains in a thread of its own and waits in between."""

    def __init__(self) -> None:
        self._go, self._done = threading.Semaphore(0), SimpleQueue[float | BaseException]()
        self._thread: threading.Thread | None = None

    def attach(self, trainer: Any) -> None:
        """The trainer that has this callback."""
        threads = torch.get_num_threads()

        def train() -> None:
            torch.set_num_threads(threads)  # a setting of each thread
            try:
                trainer.train()
            except BaseException as error:
                self._done.put(error)

        self._thread = threading.Thread(target=train, daemon=True)

    def update(self) -> float:
        """One update; its loss. Raises SpctError with what the trainer raised."""
        assert self._thread is not None
        if self._thread.ident is None:  # not started yet
            self._thread.start()
        self._go.release()
        answer = self._done.get()
        if isinstance(answer, BaseException):
            raise SpctError(f"TRL's trainer stopped: {answer}") from answer
        return answer

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._go.acquire()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self._done.put(logs["loss"])


def prompt_texts(tokenizer: Any, work: Work) -> list[str]:
    """Random words, of about the asked-for number of tokens with the chat template around them."""
    rng, texts = random.Random(SEED), []
    for _ in range(work.prompts):
        target = rng.randint(work.prompt_tokens * 3 // 4, work.prompt_tokens * 5 // 4)
        text = ""
        while len(encode_prompt(tokenizer, (Message("user", text),))) < target:
            text += "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 7))) + " "
        texts.append(text)
    return texts


def judgements(tokenizer: Any, num: int) -> list[Example]:
    """Judgements of built-in items by the checker program, as RFT sees them."""
    items, _ = generate(BuiltinConfig(size_train=num, size_heldout=1), SEED)
    judge = JudgeConfig(template="compact")
    program = ProgramJudge(ProgramConfig(finding_error=0, format_error=0), judge)
    examples = []
    for item in items:
        order = tuple(range(len(item.responses)))
        text = program.judge([JudgeTask(item, order, 0, 1.0, SEED)])[0].text
        examples.append(Example(*encode_example(tokenizer, judge_messages(item, order, judge), text)))
    return examples


def reward_of(token_ids: Sequence[int]) -> float:
    """As good as random, so that nearly every group has a signal."""
    return 1.0 if sum(token_ids) % 2 else -1.0


def _common() -> dict[str, Any]:
    """Settings that all of TRL's trainers take."""
    cuda = torch.cuda.is_available()
    return {
        "output_dir": tempfile.mkdtemp(prefix="spct-bench-"),
        "model_init_kwargs": {"dtype": "float32"},
        "bf16": resolve("auto", on_gpu=cuda) == "bfloat16",
        "use_cpu": not cuda,
        "gradient_checkpointing": False,
        "learning_rate": OPTIM.lr,
        "adam_beta1": OPTIM.betas[0],
        "adam_beta2": OPTIM.betas[1],
        "max_grad_norm": OPTIM.grad_clip,
        "lr_scheduler_type": "constant",
        "max_steps": 1_000_000,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": SEED,
    }
