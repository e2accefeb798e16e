"""The engine on one GPU: `python jobs/gpu_check_vllm.py --out FILE.jsonl [--only PHASE,...] [--tiny --device cpu]`.

Starts one engine on a random model in the shape of Qwen2.5-0.5B and shows that it generates, agrees with the trainer's
arithmetic, takes new weights, sleeps and wakes, and how fast it is beside vLLM's own `LLM.generate`. Each phase has a
deadline and appends one JSON line at once; what fails is recorded and the next one runs. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from spct_ray.precision import Precision

os.environ["HF_HUB_OFFLINE"] = "1"
for variable, value in {  # read when vLLM is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CONFIGURE_LOGGING": "0", "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # vLLM takes flashinfer for granted here, and only here
    "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",  # names may not resolve
}.items():  # fmt: skip
    os.environ.setdefault(variable, value)

sys.path.insert(0, str(Path(__file__).parent.parent))  # a script's own folder is there, but the package `jobs` is not
Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of the model, the sequences whose log-probs are compared, and the requests that are timed."""

    hidden: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    intermediate: int = 4864
    vocab: int = 151936
    max_model_len: int = 2048
    scored: tuple[int, int] = (4, 1000)  # sequences, tokens
    prompt_tokens: int = 500
    shared_tokens: int = 450  # of a prompt, where prefixes are shared
    output_tokens: int = 256
    num_requests: tuple[int, int] = (256, 1024)
    batched_tokens: tuple[int, int] = (2048, 16384)


TINY = Sizes(64, 2, 2, 2, 192, 384, 256, (2, 100), 60, 40, 8, (8, 16), (256, 1024))


@dataclass
class Check:
    """What phases hand on to later ones."""

    sizes: Sizes
    device: str
    dtype: Precision
    directory: Path
    engine: Any = None
    tokens_per_s: Figures = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, str]:
        return str(self.directory / "first"), str(self.directory / "second")


def shim() -> None:
    """What vLLM 0.26, the last for torch 2.11, lacks: a common class of errors that a request causes, and a name."""
    import vllm.exceptions as exceptions
    from vllm.model_executor.models.utils import WeightsMapper

    if not hasattr(exceptions, "VLLMClientError"):
        exceptions.VLLMClientError = exceptions.VLLMValidationError
    if not hasattr(WeightsMapper, "map_name"):
        WeightsMapper.map_name = WeightsMapper._map_name


def versions(check: Check) -> Figures:
    import torch

    shim()
    import transformers
    import vllm

    import spct_ray.engines.vllm  # noqa: F401

    figures = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    figures |= {"vllm": vllm.__version__, "transformers": transformers.__version__, "device": check.device}
    return figures | ({"gpu": torch.cuda.get_device_name()} if check.device == "cuda" else {})


def model(check: Check) -> Figures:
    """Two directories that differ in every weight."""
    for seed, directory in enumerate(check.models):
        _write_model(directory, check.sizes, check.device, check.dtype, seed)
    return {"bytes": (Path(check.models[0]) / "model.safetensors").stat().st_size}


def start(check: Check) -> Figures:
    from vllm.compilation.counter import compilation_counter

    import spct_ray.engines.vllm as ours
    from spct_ray.engines.base import EngineConfig

    sizes, on_gpu = check.sizes, check.device == "cuda"
    limits = {"max_num_seqs": max(sizes.num_requests), "max_num_batched_tokens": max(sizes.batched_tokens)}
    check.engine = ours.VllmEngine(
        check.models[0],
        EngineConfig(
            max_model_len=sizes.max_model_len, dtype=check.dtype, gpu_memory_utilization=0.4, kv_cache_gib=0.25,
            transfer="ipc" if on_gpu else "directory", **limits,  # type: ignore[arg-type]
        ),
    )  # fmt: skip

    def describe(core: Any) -> Figures:
        config = core.vllm_config
        layers = config.compilation_config.static_forward_context.values()
        return {
            "attention": sorted({type(layer.impl).__name__ for layer in layers if hasattr(layer, "impl")}),
            "kv_blocks": config.cache_config.num_gpu_blocks,
            "compile_s": round(config.compilation_config.compilation_time, 1),
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "cudagraphs": compilation_counter.num_cudagraph_captured,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "runner": type(core.engine_core.engine_core.model_executor.driver_worker.model_runner).__module__,
        }

    figures: Figures = _alone(check, describe)
    if on_gpu:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        figures |= {"flash_attention": get_flash_attn_version(), "used_gib": _used_gib()}
    return figures


def generate(check: Check) -> Figures:
    (request,) = _requests(check.sizes, 1, shared=False)
    greedy = replace(request, params=replace(request.params, temperature=0.0, logprobs=True))
    first, again = check.engine.generate([greedy, greedy])
    many = check.engine.generate([replace(request, params=replace(request.params, n=4))])[0]
    guided = check.engine.generate([replace(request, params=replace(request.params, guide="[ab]{5}"))])[0][0]
    scored = check.engine.prompt_logprobs([[*first[0].prompt_token_ids, *first[0].token_ids]])[0]
    sampled = scored[-len(first[0].token_ids) :]
    figures = {"tokens": len(first[0].token_ids), "greedy_equal": first[0].token_ids == again[0].token_ids}
    figures |= {"distinct_of_4": len({c.token_ids for c in many}), "guided": guided.text}
    return figures | {"sampling_to_scoring": _differences([list(first[0].logprobs)], [sampled])}


def logprobs(check: Check) -> Figures:
    """The engine's log-probs against transformers' own forward pass, in the engine's dtype and in float32."""
    return _against_transformers(check, check.models[0], ("float32", check.dtype))


def trainer(check: Check) -> Figures:
    """The engine's log-probs against the forward pass that the trainer makes."""
    import torch

    from spct_ray.learn.batch import make_batch
    from spct_ray.learn.model import TokenLogprobs, load_model

    sequences = _sequences(check.sizes)
    module = TokenLogprobs(load_model(check.models[0], "lm", getattr(torch, check.dtype), check.device == "cuda"))
    module = module.to(check.device).eval()
    batch = make_batch(sequences, [1] * len(sequences))
    with torch.no_grad():
        logps = [part.tolist() for part in batch.split(module(batch.to(check.device)).cpu())]
    return _differences(logps, check.engine.prompt_logprobs(sequences))


def reload(check: Check) -> Figures:
    """Seconds to take new weights from a directory, and whether the engine then computes with them."""
    seconds = []
    for version, directory in enumerate((*reversed(check.models), check.models[1]), 1):
        started = time.perf_counter()
        check.engine.reload(directory, version)
        seconds.append(round(time.perf_counter() - started, 3))
    figures = _against_transformers(check, check.models[1], (check.dtype,))
    check.engine.reload(check.models[0], 4)
    return {"reload_s": seconds, "parity": figures}


def sleep(check: Check) -> Figures:
    sequences = _sequences(check.sizes)
    before, used = check.engine.prompt_logprobs(sequences), [_used_gib()]
    seconds = []
    for step in (check.engine.sleep, check.engine.wake):
        started = time.perf_counter()
        step()
        seconds.append(round(time.perf_counter() - started, 3))
        used.append(_used_gib())
    figures = {"sleep_s": seconds[0], "wake_s": seconds[1]}
    figures |= dict(zip(("awake_gib", "asleep_gib", "woken_gib"), used, strict=True))
    return figures | {"same_after": _differences(before, check.engine.prompt_logprobs(sequences))}


def ipc(check: Check) -> Figures:
    """New weights from another process on the same GPU, as its tensors' IPC handles."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_offer_weights, args=(check.models[1], theirs), daemon=True)
    process.start()
    try:
        offer = pipe.recv()
        started = time.perf_counter()
        check.engine.transfer("init_weight_transfer_engine", {}, 5)
        check.engine.transfer("start_weight_update", None, 5)
        check.engine.transfer("update_weights", offer, 5)
        check.engine.transfer("finish_weight_update", None, 5)
        seconds = time.perf_counter() - started
        figures = _against_transformers(check, check.models[1], (check.dtype,))
    finally:
        process.kill()
    check.engine.reload(check.models[0], 6)
    return {"ipc_s": round(seconds, 3), "parity": figures}


def speed(check: Check) -> Figures:
    """Tokens a second of our engine and of `LLM.generate`, the better of two turns each: the very same engine and
    requests, no prefixes in its cache."""
    sizes, figures = check.sizes, Figures()
    _ours(check, min(sizes.num_requests), shared=False)  # compiles what only now is
    for num in sizes.num_requests:
        for shared in (True, False):
            ours = theirs = 0.0
            for _ in range(2):
                ours = max(ours, _ours(check, num, shared))
                theirs = max(theirs, _alone(check, partial(_theirs, check.models[0], sizes, num, shared)))
            name = f"{num} {'shared' if shared else 'own'}"
            check.tokens_per_s[name] = ours
            figures[name] = {"ours": round(ours), "generate": round(theirs), "ratio": round(ours / theirs, 3)}
    return figures


def limits(check: Check) -> Figures:
    """Our tokens a second where a step takes fewer tokens: the scheduler's limit, lowered in the running engine."""
    sizes, figures = check.sizes, Figures()

    def limit(tokens: int, core: Any) -> None:
        core.engine_core.engine_core.scheduler.max_num_scheduled_tokens = tokens

    for tokens in sizes.batched_tokens:
        _alone(check, partial(limit, tokens))
        for num in sizes.num_requests:
            figures[f"{num} x {tokens}"] = round(_ours(check, num, shared=False))
    return figures


def peer(check: Check) -> Figures:
    """`LLM.generate` as vLLM starts it by itself: its engine in a child process, beside tokenising and detokenising."""
    check.engine.close()
    command = [sys.executable, __file__, "--peer", check.models[0], "--device", check.device, "--dtype", check.dtype]
    command += ["--tiny"] if check.sizes is TINY else []
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    theirs: Figures = json.loads(done.stdout.splitlines()[-1])
    start_s = theirs.pop("start_s")
    ratios = {name: round(check.tokens_per_s[name] / theirs[name], 3) for name in theirs if name in check.tokens_per_s}
    return {"start_s": start_s, "generate": theirs, "ratio": ratios}


# In this order; the deadlines are seconds on a GPU.
PHASES: dict[str, tuple[Callable[[Check], Figures], float]] = {
    "versions": (versions, 60), "model": (model, 30), "start": (start, 180), "generate": (generate, 30),
    "logprobs": (logprobs, 30), "reload": (reload, 30), "sleep": (sleep, 30), "speed": (speed, 90),
    "limits": (limits, 60), "ipc": (ipc, 40), "trainer": (trainer, 90), "peer": (peer, 120),
}  # fmt: skip
FIRST = ("versions", "model", "start")  # what all others need
GPU_ONLY = ("sleep", "ipc")


def run_peer(model_dir: str, sizes: Sizes, device: str, dtype: str) -> None:
    """Print tokens a second of every kind of requests, from an LLM of its own, as JSON."""
    import vllm

    started = time.perf_counter()
    options: dict[str, Any] = {"gpu_memory_utilization": 0.4}
    if device == "cpu":
        options = {"kv_cache_memory_bytes": 2**28, "enable_chunked_prefill": False, "enforce_eager": True}
    llm = vllm.LLM(
        model_dir, dtype=dtype, max_model_len=sizes.max_model_len, max_num_seqs=max(sizes.num_requests),
        max_num_batched_tokens=max(sizes.batched_tokens), generation_config="vllm", disable_log_stats=True, **options,
    )  # fmt: skip
    figures: Figures = {"start_s": round(time.perf_counter() - started, 1)}
    _generate_timed(llm, sizes, min(sizes.num_requests), shared=False)
    for num in sizes.num_requests:
        for shared in (True, False):
            llm.reset_prefix_cache()
            figures[f"{num} {'shared' if shared else 'own'}"] = round(_generate_timed(llm, sizes, num, shared))
    print(json.dumps(figures), flush=True)


def _theirs(model_dir: str, sizes: Sizes, num: int, shared: bool, core: Any) -> float:
    import vllm
    from vllm.v1.engine.llm_engine import LLMEngine

    made = LLMEngine.__dict__["from_engine_args"]
    LLMEngine.from_engine_args = classmethod(lambda cls, *_, **__: core)
    try:
        llm = vllm.LLM(model_dir)
    finally:
        LLMEngine.from_engine_args = made
    core.reset_prefix_cache()
    return _generate_timed(llm, sizes, num, shared)


def _generate_timed(llm: Any, sizes: Sizes, num: int, shared: bool) -> float:
    """Tokens a second from messages to completions, so with what else our engine does: chat template, parameters."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    requests, tokenizer = _requests(sizes, num, shared), llm.get_tokenizer()
    started = time.perf_counter()
    turns = [[{"role": m.role, "content": m.content} for m in r.messages] for r in requests]
    prompts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
    params = [
        vllm.SamplingParams(
            max_tokens=r.params.max_tokens, temperature=r.params.temperature, seed=r.params.seed,
            stop_token_ids=[tokenizer.eos_token_id], output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for r in requests
    ]  # fmt: skip
    outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return tokens / (time.perf_counter() - started)


def _ours(check: Check, num: int, shared: bool) -> float:
    requests = _requests(check.sizes, num, shared)
    _alone(check, lambda core: core.reset_prefix_cache())
    started = time.perf_counter()
    tokens: int = sum(completions[0].completion_tokens for completions in check.engine.generate(requests))
    return tokens / (time.perf_counter() - started)


def _alone(check: Check, action: Callable[[Any], Any]) -> Any:
    """The result of `action` on vLLM's engine in the thread that owns it, which outlives an error here."""
    done: Future[Any] = Future()

    def act(core: Any) -> None:
        try:
            done.set_result(action(core))
        except Exception as error:
            done.set_exception(error)

    check.engine._alone(act)
    return done.result()


def _against_transformers(check: Check, model_dir: str, dtypes: Sequence[str]) -> Figures:
    import torch
    from transformers import AutoModelForCausalLM

    sequences = _sequences(check.sizes)
    engine, theirs, figures = check.engine.prompt_logprobs(sequences), list[list[float]](), Figures()
    exact: list[list[float]] = []
    for dtype in dict.fromkeys(dtypes):
        network = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).to(check.device).eval()
        theirs = []
        with torch.no_grad():
            for ids in torch.tensor(sequences, device=check.device):
                logps = network(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
                theirs.append(logps.gather(1, ids[1:, None])[:, 0].tolist())
        figures[f"engine_to_{dtype}"] = _differences(engine, theirs)
        if exact:
            figures[f"{dtype}_to_{dtypes[0]}"] = _differences(theirs, exact)
        exact = exact or theirs
    flat = [value for line in theirs for value in line]
    return figures | {"mean_logprob": round(sum(flat) / len(flat), 3), "spread": round(max(flat) - min(flat), 3)}


def _differences(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> Figures:
    pairs = [pair for lines in zip(left, right, strict=True) for pair in zip(*lines, strict=True)]
    gaps = sorted(abs(a - b) for a, b in pairs)
    mean, p99, largest = sum(gaps) / len(gaps), gaps[int(0.99 * (len(gaps) - 1))], gaps[-1]
    return {"mean": round(mean, 6), "p99": round(p99, 6), "max": round(largest, 6), "tokens": len(gaps)}


def _sequences(sizes: Sizes) -> list[list[int]]:
    rng, (num, length) = random.Random(1), sizes.scored
    return [[rng.randrange(3, sizes.vocab) for _ in range(length)] for _ in range(num)]


def _requests(sizes: Sizes, num: int, shared: bool) -> list[Any]:
    from spct_ray.engines.base import Request, SamplingParams
    from spct_ray.records import Message

    rng = random.Random(2)
    start = "".join(rng.choices("abcdefghijklmnopqrst ", k=sizes.shared_tokens))
    around = 20  # tokens of the chat template
    requests = []
    for index in range(num):
        text = "".join(rng.choices("abcdefghijklmnopqrst ", k=sizes.prompt_tokens - around))
        text = start + text[len(start) :] if shared else text
        params = SamplingParams(max_tokens=sizes.output_tokens, seed=index)
        requests.append(Request((Message("user", text),), params))
    return requests


def _write_model(directory: str, sizes: Sizes, device: str, dtype: str, seed: int) -> None:
    """A random Qwen2 whose next tokens depend on all before and are about as uncertain as a trained model's."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from jobs.bench.train import write_tokenizer

    write_tokenizer(directory, sizes.vocab)
    config = Qwen2Config(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=32768, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=2,
        architectures=["Qwen2ForCausalLM"], dtype=dtype,
    )  # fmt: skip
    config.save_pretrained(directory)
    torch.manual_seed(seed)
    with torch.device(device):
        network = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "proj.weight" in name:  # so that the layers outweigh the embedding, which is also the output layer
                weight.normal_(std=weight.shape[1] ** -0.5)
        network.model.norm.weight.fill_(2.4 / (0.02 * sizes.hidden**0.5))  # logits spread by about 2.4
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})


def _offer_weights(model_dir: str, pipe: Connection) -> None:
    """In a process of its own: all weights on the GPU, as vLLM's update info; kept until the process is killed."""
    import torch
    from safetensors.torch import load_file
    from torch.multiprocessing.reductions import reduce_tensor

    weights = load_file(Path(model_dir) / "model.safetensors", device="cuda")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    torch.cuda.synchronize()
    pipe.send(
        {
            "names": list(weights),
            "dtype_names": [str(tensor.dtype).split(".")[-1] for tensor in weights.values()],
            "shapes": [list(tensor.shape) for tensor in weights.values()],
            "ipc_handles": [{uuid: reduce_tensor(tensor)[1]} for tensor in weights.values()],  # type: ignore[no-untyped-call]
            "packed": False,
        }
    )
    while True:
        signal.pause()


def _used_gib() -> float:
    """Of the whole GPU, without what this process only keeps."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / 2**30, 2)


def run(check: Check, only: Sequence[str], out: Path) -> bool:
    """Whether all phases passed."""
    passed = True

    def late(*_: Any) -> None:
        raise TimeoutError("the phase's deadline has passed")

    signal.signal(signal.SIGALRM, late)
    for name, (phase, deadline) in PHASES.items():
        if only and name not in (*FIRST, *only):
            continue
        line: Figures = {"phase": f"engine_{name}", "ok": True}
        started = time.perf_counter()
        if check.device == "cpu" and name in GPU_ONLY:
            line["skipped"] = "needs a GPU"
        else:
            signal.setitimer(signal.ITIMER_REAL, deadline if check.device == "cuda" else 0)
            try:
                if name not in FIRST and check.engine is None:
                    raise RuntimeError("the engine did not start")
                line |= phase(check)
            except Exception as error:
                line |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
                traceback.print_exc()
            signal.setitimer(signal.ITIMER_REAL, 0)
        line["seconds"] = round(time.perf_counter() - started, 2)
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        passed = passed and line["ok"]
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check_vllm.jsonl"), help="JSON lines are appended to it")
    parser.add_argument("--only", default="", help=f"phases, separated by commas, of {', '.join(PHASES)}")
    parser.add_argument("--tiny", action="store_true", help="a model of some thousand weights, few requests")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer", default="", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    sizes = TINY if args.tiny else Sizes()
    if args.peer:
        run_peer(args.peer, sizes, args.device, args.dtype)
        return
    directory = Path(tempfile.mkdtemp())
    passed = False
    try:
        passed = run(Check(sizes, args.device, args.dtype, directory), [n for n in args.only.split(",") if n], args.out)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        sys.stdout.flush()
        os._exit(0 if passed else 1)  # an engine thread that hangs must not keep the machine


if __name__ == "__main__":
    main()
