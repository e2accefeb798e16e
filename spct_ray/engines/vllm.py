"""The vLLM engine, inside this process: continuous batching for concurrent callers without a child process.

One background thread owns vLLM (its OpenMP state is per thread): it takes jobs from a queue, steps, and resolves
futures; another turns messages into tokens before, so that neither callers nor vLLM wait for it. Here and in
`vllm_transfer.py` vLLM is imported.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vLLM and torch are imported
os.environ["VLLM_NO_USAGE_STATS"] = os.environ["DO_NOT_TRACK"] = "1"
os.environ["VLLM_CONFIGURE_LOGGING"] = "0"  # it would close all log handlers: Serve's then keep each record for ever
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait starve a shared machine
# What follows warns of things that no user can change: a CPU without Triton, its own NUMA binding, and a deprecation.
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)

import torch
import vllm
from vllm.config import ModelConfig, WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers import utils as vllm_layers
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine

from spct_ray.chat import encode_prompt, end_of_turn
from spct_ray.engines.base import LORA_LAYERS, EngineConfig, Request
from spct_ray.engines.checksums import HeldTensor, held_tensors, note_packed
from spct_ray.errors import ConfigError, EngineError, RequestError, SpctError, TooLongError
from spct_ray.memory import give_back_freed
from spct_ray.precision import resolve
from spct_ray.records import Completion

_logger = logging.getLogger(__name__)
_MAX_SEED = 2**62  # vLLM adds the sample's number to the seed, and the sum must fit 63 bits
_TRIM_PERIOD_S = 30.0
_vllm_pack = vllm_layers.dispatch_cpu_unquantized_gemm


def _pack(layer: Any, remove_weight: bool) -> None:
    """vLLM's packing of a linear layer on CPU, which nobody can read back, with a note of what was packed."""
    note_packed(layer)
    _vllm_pack(layer, remove_weight)


vllm_layers.dispatch_cpu_unquantized_gemm = _pack


_compute_hash = ModelConfig.compute_hash


def _hash_without_directory(config: Any) -> str:
    """vLLM's key for compiled graphs, which also has the model's directory: each new judge would compile them again,
    though they depend on its config alone. (Workers of tensor parallelism still do, as they do not import this.)"""
    directory, config.model = config.model, ""
    try:
        return str(_compute_hash(config))
    finally:
        config.model = directory


ModelConfig.compute_hash = _hash_without_directory


@dataclass(slots=True)
class _Sample:
    request: Request
    token_ids: list[int] = field(default_factory=list)  # of the prompt, once it is encoded
    future: Future[tuple[Completion, ...]] = field(default_factory=Future)


@dataclass(slots=True)
class _Score:
    token_ids: list[int]
    future: Future[list[float]] = field(default_factory=Future)


@dataclass(slots=True)
class _Alone:
    """Something to do while nothing runs. Where it fails, the engine is dead: its weights may be half new."""

    action: Callable[[LLMEngine], None]
    future: Future[None] = field(default_factory=Future)


@dataclass(slots=True)
class _Close:
    future: Future[None] = field(default_factory=Future)


_Job = _Sample | _Score | _Alone | _Close


class VllmEngine:
    """One vLLM engine on one model directory (HF safetensors and a tokenizer with a chat template).

    Safe to share between threads: all waiting requests run as one batch. To cancel a future ends its request's work. A
    `reload` waits for the requests before it, and those after it wait for the reload, so every completion comes from
    one version of the weights.
    The constructor raises ConfigError on settings or a chat template that cannot work, EngineError when vLLM does
    not start. After an EngineError the engine is dead: every pending and later call raises it.
    """

    def __init__(self, model_dir: str, config: EngineConfig) -> None:
        self.weight_version = 0
        self._model_dir = model_dir
        self._config = config
        self._adapter: LoRARequest | None = None
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._dead = ""  # why the engine no longer works
        self._lock = Lock()  # between a call that queues a job and the thread's end, which fails all queued jobs
        self._encoder = ThreadPoolExecutor(1, "encode-prompts")  # one, as jobs must keep their order
        started: Future[None] = Future()
        self._thread = Thread(target=self._run, args=(started,), name="vllm-engine", daemon=True)
        self._thread.start()
        started.result()

    def submit(self, request: Request) -> Future[tuple[Completion, ...]]:
        job = _Sample(request)
        self._put(job)
        return job.future

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        futures = [self.submit(request) for request in requests]
        return [future.result() for future in futures]

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """As in `Engine`; RequestError for max_model_len tokens or more (vLLM wants room for one more)."""
        jobs = [_Score(list(token_ids)) for token_ids in sequences]
        for job in jobs:
            self._put(job)
        return [job.future.result() for job in jobs]

    def reload(self, weights_dir: str, weight_version: int) -> None:
        self._alone(partial(self._reload, weights_dir, weight_version))

    def transfer(self, method: str, info: dict[str, Any] | None, weight_version: int) -> None:
        """A step of vLLM's weight transfer, GPU only. The last one, finish_weight_update, drops cached prefixes and
        sets the version."""
        self._alone(partial(self._transfer, method, info, weight_version))

    def sleep(self) -> None:
        """Free the GPU: weights go to the host, the cache is dropped. Nothing may be asked until `wake`."""
        self._alone(lambda core: core.sleep(level=1))

    def wake(self) -> None:
        """Take the GPU again. Nothing happens where the engine is awake."""
        self._alone(lambda core: core.wake_up() if core.is_sleeping() else None)

    def held_tensors(self, names: Sequence[str]) -> list[list[HeldTensor]]:
        """What each worker holds of the trainer's tensors of these names, see `checksums.held_tensors`."""
        held: list[list[HeldTensor]] = []
        self._alone(lambda core: held.extend(core.collective_rpc(held_tensors, args=(list(names),))))
        return held

    def _alone(self, action: Callable[[LLMEngine], None]) -> None:
        job = _Alone(action)
        self._put(job)
        job.future.result()

    def close(self) -> None:
        with contextlib.suppress(EngineError):  # it may be dead already
            self._put(_Close())
        self._thread.join()
        self._encoder.shutdown()

    def _put(self, job: _Job) -> None:
        with self._lock:
            if self._dead:
                raise EngineError(self._dead)
        self._encoder.submit(self._encode_and_queue, job)

    def _encode_and_queue(self, job: _Job) -> None:
        if isinstance(job, _Sample) and not job.future.cancelled():
            try:
                job.token_ids = list(self._encoded(job.request.messages))
            except Exception as error:  # whatever a template or tokenizer raised is about this request alone
                _fail(job, error if isinstance(error, SpctError) else RequestError(f"no prompt can be made: {error!r}"))
                return
        with self._lock:
            if not self._dead:
                self._jobs.put(job)
                return
        _fail(job, EngineError(self._dead))

    # Everything below runs in the owner thread.

    def _run(self, started: Future[None]) -> None:
        core: LLMEngine | None = None
        running: dict[str, _Sample | _Score] = {}
        waiting: deque[_Job] = deque()
        try:
            core = self._start()
            started.set_result(None)
            self._serve(core, running, waiting)
            end = f"the engine on {self._model_dir} was closed"
        except Exception as error:  # whatever vLLM raised, this thread ends here and its callers must learn of it
            what = "died" if started.done() else "did not start"
            end = f"the vLLM engine on {self._model_dir} {what}: {type(error).__name__}: {error}"
            if started.done():
                _logger.exception(end)
            else:
                started.set_exception(error if isinstance(error, SpctError) else EngineError(end))
        _shut_down(core)
        with self._lock:
            self._dead = end
            while not self._jobs.empty():
                waiting.append(self._jobs.get())
        for job in (*running.values(), *waiting):
            _fail(job, EngineError(end))

    def _start(self) -> LLMEngine:
        config, on_cpu = self._config, current_platform.is_cpu()
        if on_cpu and config.tensor_parallel > 1:
            raise ConfigError(
                f"tensor_parallel is {config.tensor_parallel}, but the CPU engine has no tensor parallelism"
            )
        if on_cpu:
            torch._dynamo.config.disable = True  # else the first request for log-probs compiles a kernel for 20 s
        if on_cpu and config.threads:
            torch.set_num_threads(config.threads)
        arguments: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
        if on_cpu:  # chunked prefill rewinds a seeded request's generator, which torch's CPU generator cannot do
            arguments = {"kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30), "enable_chunked_prefill": False}
            arguments["block_size"] = 32  # the least that CPU attention takes: vLLM's 128 would share no short prompt
        if config.lora_rank:
            arguments |= {"enable_lora": True, "max_lora_rank": config.lora_rank, "max_loras": 1, "max_cpu_loras": 1}
            # Not the output layer: vLLM's adapter of it cannot score prompts.
            arguments["lora_target_modules"] = list(LORA_LAYERS)
        if config.transfer != "directory":
            if on_cpu:
                raise ConfigError(
                    f"transfer is {config.transfer}, which is from GPU to GPU; leave it at directory on CPU"
                )
            arguments["weight_transfer_config"] = WeightTransferConfig(backend=config.transfer)
            arguments["enable_sleep_mode"] = config.transfer == "ipc"  # it shares its GPU with the trainer
        core = LLMEngine.from_engine_args(
            EngineArgs(
                model=self._model_dir,
                load_format="safetensors",
                use_tqdm_on_load=False,
                dtype=resolve(config.dtype, on_gpu=not on_cpu),
                max_model_len=config.max_model_len,
                max_num_seqs=config.max_num_seqs or None,
                max_num_batched_tokens=config.max_num_batched_tokens or None,
                tensor_parallel_size=config.tensor_parallel,
                distributed_executor_backend="uni" if config.tensor_parallel == 1 else "mp",
                enforce_eager=on_cpu or config.enforce_eager,
                enable_prefix_caching=True,
                generation_config="vllm",  # the model's own sampling defaults must not change ours
                disable_log_stats=True,
                **arguments,
            ),
            UsageContext.LLM_CLASS,  # of vLLM's defaults for batches, those for throughput
        )
        tokenizer = core.renderer.tokenizer
        # Samples of one item share prompts. The copy is the encoding thread's own: a tokenizer is not for two at once.
        self._encoded = lru_cache(maxsize=64)(partial(encode_prompt, copy.deepcopy(tokenizer)))
        self._end_of_turn = end_of_turn(tokenizer)
        return core

    def _serve(self, core: LLMEngine, running: dict[str, _Sample | _Score], waiting: deque[_Job]) -> None:
        """Until a _Close job: admit what waits (an _Alone one when nothing runs), step, resolve what finished."""
        num_admitted, trimmed_at = 0, time.monotonic()
        while True:
            while not (waiting or running) or not self._jobs.empty():
                waiting.append(self._jobs.get())
            while waiting:
                job = waiting[0]
                if isinstance(job, _Close):
                    return
                if isinstance(job, _Alone):
                    if running:
                        break
                    job.action(core)
                    job.future.set_result(None)
                elif not job.future.cancelled() and self._admit(core, job, str(num_admitted)):
                    running[str(num_admitted)] = job
                    num_admitted += 1
                waiting.popleft()
            unwanted = [request_id for request_id, job in running.items() if job.future.cancelled()]
            if unwanted:
                core.abort_request(unwanted)
                for request_id in unwanted:
                    del running[request_id]
            if running:
                for output in core.step():
                    if output.finished and output.request_id in running:
                        self._resolve(running.pop(output.request_id), output)
            if current_platform.is_cpu() and time.monotonic() > trimmed_at + _TRIM_PERIOD_S:
                give_back_freed()
                trimmed_at = time.monotonic()

    def _admit(self, core: LLMEngine, job: _Sample | _Score, request_id: str) -> bool:
        try:
            token_ids = job.token_ids
            if isinstance(job, _Sample):
                params = self._sampling_params(job.request)
                wanted = f"a prompt of {len(token_ids)} tokens + max_tokens {params.max_tokens}"
            else:
                params = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
                wanted = f"a sequence of {len(token_ids)} tokens to score + 1"
            if len(token_ids) + params.max_tokens > self._config.max_model_len:
                raise TooLongError(f"{wanted} exceeds the engine's max_model_len of {self._config.max_model_len}")
            core.add_request(request_id, {"prompt_token_ids": token_ids}, params, lora_request=self._adapter)
        except RequestError as error:
            _fail(job, error)
        except (ValueError, VLLMClientError) as error:  # vLLM's words for a request that it will not take
            _fail(job, RequestError(f"vLLM refuses the request: {error}"))
        else:
            return True
        return False

    def _sampling_params(self, request: Request) -> vllm.SamplingParams:
        params = request.params
        return vllm.SamplingParams(
            n=params.n,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            seed=None if params.seed is None else params.seed % _MAX_SEED,
            logprobs=0 if params.logprobs else None,  # 0: of the sampled token only
            stop_token_ids=[self._end_of_turn],
            structured_outputs=StructuredOutputsParams(regex=params.guide) if params.guide else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _resolve(self, job: _Sample | _Score, output: RequestOutput) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        if isinstance(job, _Score):
            entries = zip(job.token_ids[1:], output.prompt_logprobs[1:], strict=True)
            job.future.set_result([entry[token].logprob for token, entry in entries])
            return
        failed = {o.finish_reason for o in output.outputs} - {"stop", "length", "abort"}
        if failed:
            job.future.set_exception(RequestError(f"vLLM ended the request with finish reason {failed}"))
            return
        outputs = sorted(output.outputs, key=lambda o: o.index)
        job.future.set_result(tuple(self._completion(tuple(output.prompt_token_ids), o) for o in outputs))

    def _completion(self, prompt_token_ids: tuple[int, ...], output: CompletionOutput) -> Completion:
        logprobs = zip(output.token_ids, output.logprobs, strict=True) if output.logprobs is not None else ()
        return Completion(
            text=output.text,
            token_ids=tuple(output.token_ids),
            logprobs=tuple(entry[token].logprob for token, entry in logprobs),
            stop_reason=output.finish_reason,
            prompt_token_ids=prompt_token_ids,
            weight_version=self.weight_version,
            prompt_tokens=len(prompt_token_ids),
            completion_tokens=len(output.token_ids),
        )

    def _reload(self, weights_dir: str, weight_version: int, core: LLMEngine) -> None:
        if Path(weights_dir, "adapter_config.json").exists():
            self._load_adapter(weights_dir, core)
        else:
            core.collective_rpc("reload_weights", kwargs={"weights_path": weights_dir})
            if current_platform.is_cpu():
                core.collective_rpc(_repack_kept_weights)
        self._take_version(weight_version, core)

    def _load_adapter(self, directory: str, core: LLMEngine) -> None:
        """In place of the adapter before; under a number of its own, as vLLM takes an old one's for loaded."""
        number = 1
        if self._adapter is not None:
            core.remove_lora(self._adapter.lora_int_id)
            number += self._adapter.lora_int_id
        self._adapter = LoRARequest(str(number), number, directory)
        if not core.add_lora(self._adapter):
            raise EngineError(f"vLLM does not take the adapter in {directory}")

    def _transfer(self, method: str, info: dict[str, Any] | None, weight_version: int, core: LLMEngine) -> None:
        core.collective_rpc(method, args=() if info is None else (info,))
        if method == "finish_weight_update":
            self._take_version(weight_version, core)

    def _take_version(self, weight_version: int, core: LLMEngine) -> None:
        """Nothing that was computed with the old weights may serve the new ones."""
        if not core.reset_prefix_cache():
            raise EngineError(f"vLLM does not drop its cached prefixes, so weights {weight_version} would mix with old")
        self.weight_version = weight_version


def _shut_down(core: LLMEngine | None) -> None:
    """End vLLM's core now. Left to the garbage collector, it would take the process groups of torch.distributed away
    from an engine that the process started later; of a core that did not start, only the collector knows."""
    if core is None:
        gc.collect()
        return
    try:
        core.engine_core.shutdown()
    except Exception:
        _logger.exception("the end of a vLLM engine failed")


def _fail(job: _Job, error: Exception) -> None:
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)


def _repack_kept_weights(worker: Any) -> None:
    """Pack again what vLLM's CPU reload forgets: a tied lm_head keeps the packed copy of the old embedding."""
    for module in worker.model_runner.get_model().modules():
        if hasattr(module, "cpu_linear") and module.weight.numel() > 0:
            _pack(module, remove_weight=False)
