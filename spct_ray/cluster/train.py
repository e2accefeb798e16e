"""Training ranks on Ray Train: start a group, run one function on every rank, start it again when a rank dies.

The function resumes from its own checkpoints (Ray Train's would copy whole models), so a restart costs the steps since
the last one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from spct_ray.errors import SpctError, StepError
from spct_ray.learn.metrics_file import require_tracker
from spct_ray.learn.train_config import TrainResources

_COLLECTIVE_TIMEOUT_S = 6 * 3600  # ranks wait for each other while rank 0 starts engines (30 min a wave) or samples


class OutDirectory(Protocol):
    """A step, as far as it concerns where Ray Train may write."""

    @property
    def out(self) -> str: ...


def run_ranks(
    loop: Callable[..., None], args: tuple[Any, ...], resources: TrainResources, context: OutDirectory
) -> None:
    """Run `loop(*args)` on `resources.num_workers` ranks with torch.distributed set up, and wait for it.

    `loop` lives at the top level of a module. When a rank fails, all are started again, `max_failures` times; after
    that the first rank's SpctError is raised as it is, any other failure as StepError.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    require_tracker(resources.tracker)  # a missing package is no reason to start ranks again
    per_worker: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        per_worker["GPU"] = resources.gpus_per_worker
    trainer = TorchTrainer(
        _run_rank,
        train_loop_config={"loop": loop, "args": args},
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(Path(context.out).resolve()),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        causes = [_original(failure) for _, failure in sorted(error.worker_failures.items())]
        for cause in causes:
            if isinstance(cause, SpctError):
                raise cause from error
        raise StepError(f"training failed on {len(causes)} rank(s) and was not restarted again: {error}") from error
    except TrainingFailedError as error:
        raise StepError(f"Ray Train could not run the {resources.num_workers} rank(s): {error}") from error


def _run_rank(config: dict[str, Any]) -> None:
    from ray import train
    from ray.train.torch import get_device

    # What DeepSpeed reads. It takes LOCAL_RANK as the index of the GPU, which is Ray's to choose.
    os.environ["LOCAL_SIZE"] = str(train.get_context().get_local_world_size())
    os.environ["LOCAL_RANK"] = str(get_device().index or 0)
    if get_device().type == "cuda" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        import torch

        # Rows of many lengths leave gaps in segments of fixed size. Not by the environment: engines that a rank starts
        # would inherit it, and vLLM's sleep cannot work with such segments.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    config["loop"](*config["args"])


def _original(failure: BaseException) -> BaseException:
    """The exception that our code raised, out of Ray's wrappers."""
    inner = getattr(failure, "_base_exc", None) or getattr(failure, "cause", None)
    return _original(inner) if isinstance(inner, BaseException) else failure
