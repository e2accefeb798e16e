"""Optimizers for DeepSpeed's ZeRO: AdamW, or Muon for the matrices and AdamW for the rest.

The trainer sets learning rates before each update; zero_state.py checkpoints the moments.
"""

from __future__ import annotations

from typing import Any

import torch

from spct_ray.errors import ConfigError, SpctError
from spct_ray.learn.train_config import OptimConfig, TrainResources


def run_muon_eagerly() -> None:
    """Make DeepSpeed's Muon run uncompiled and in fp32 in this process.

    DeepSpeed decorates its Newton-Schulz iteration with torch.compile, which on CPU needs a C++ compiler, takes 20 s at
    the first update and gains nothing; and it iterates in fp16 on CPUs that support it. Raises SpctError for a
    DeepSpeed version that does either differently.
    """
    import deepspeed
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        from deepspeed.runtime.zero.muon import original_muon as muon
    finally:
        compiler.compile = compile_
    functions = (muon.muon_update, muon.zeropower_via_gram_newtonschulz)
    if any(hasattr(f, "_torchdynamo_orig_callable") for f in functions) or not hasattr(muon, "ns_compute_dtype"):
        raise SpctError(
            f"DeepSpeed {deepspeed.__version__} would compile Muon or choose its precision in another way than 0.19.8, "
            "or has loaded it before the trainer could make it eager: install the version of constraints.txt, and "
            "start the trainer before anything else that uses DeepSpeed in this process"
        )
    muon.ns_compute_dtype = lambda ns_method="gram": torch.float32


def make_optimizer(module: Any, optim: OptimConfig, resources: TrainResources) -> Any:
    """For the weights that are trained of a module whose `model` is a transformers model.

    Raises ConfigError for Muon with an offloaded optimizer.
    """
    parameters: list[Any] = [p for p in module.parameters() if p.requires_grad]
    options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "weight_decay": optim.weight_decay}
    if optim.muon_lr:
        if resources.offload_optimizer:
            raise ConfigError(
                f"offload_optimizer with muon_lr {optim.muon_lr}: DeepSpeed then keeps the momentum in another form, "
                "which checkpoints here do not hold; set offload_optimizer to false, or muon_lr to 0 for AdamW alone"
            )
        return _make_muon(module.model.base_model, parameters, optim, options)
    if resources.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def _make_muon(trunk: Any, parameters: list[Any], optim: OptimConfig, options: dict[str, Any]) -> Any:
    """Muon for the trunk's matrices except embeddings, AdamW with `options` for the other `parameters`."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    embeddings = {m.weight for m in trunk.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = {p for p in trunk.parameters() if len(getattr(p, "ds_shape", p.shape)) == 2} - embeddings
    for parameter in parameters:
        parameter.use_muon = parameter in matrices  # where ZeRO looks for it
    chosen, rest = ([p for p in parameters if p.use_muon is muon] for muon in (True, False))
    groups: list[dict[str, Any]] = [
        {"params": chosen, "use_muon": True, "lr": optim.muon_lr, "weight_decay": optim.weight_decay},
        {"params": rest, "use_muon": False, **options, "eps": 1e-8},
    ]
    groups = [group for group in groups if group["params"]]
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})
