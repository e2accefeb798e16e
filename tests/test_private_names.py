"""Names of other packages that are not public and that this one uses, each with what it is for."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect

import pytest

ZERO_12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
ZERO_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
NAMES = [
    *(
        (owner, name, "learn/zero_state.py reads and fills the moments of ZeRO-1 and 2")
        for owner in (ZERO_12, BF16)
        for name in ("_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state", "update_lp_params")
    ),
    (ZERO_12, "params_in_partition", "learn/zero_state.py finds Muon's momentum of whole matrices"),
    (ZERO_3, "sub_groups_using_muon", "learn/zero_state.py finds the groups that Muon updates"),
    (ZERO_3, "fp32_partitioned_groups_flat", "learn/zero_state.py reads ZeRO-3's master weights"),
    (ZERO_3, "_get_fp32_opt_state_partition", "learn/zero_state.py reads and fills ZeRO-3's moments"),
    (ZERO_3, "_reassign_or_swap_out_partitioned_parameters", "learn/zero_state.py copies masters into weights"),
    ("deepspeed.utils.tensor_fragment:tensor_fragment", "get_hp_fragment", "learn/zero_state.py, ZeRO-1 and 2"),
    ("deepspeed.ops", "__compatible_ops__", "learn/trainer.py turns off DeepSpeed's shared-memory all-reduce"),
    ("deepspeed.runtime.compiler", "compile", "learn/optimizers.py keeps Muon from being compiled on CPU"),
    ("deepspeed.runtime.zero.muon.original_muon", "ns_compute_dtype", "learn/optimizers.py runs Muon in fp32 on CPU"),
    ("torch._dynamo", "mark_dynamic", "learn/attention.py compiles one graph for rows of all lengths"),
    ("torch._dynamo.config", "recompile_limit", "learn/attention.py refuses to compile without end"),
    ("liger_kernel.transformers", "_apply_liger_kernel_to_instance", "learn/model.py fuses layers on GPUs"),
    ("trackio.run:Run", "_next_step", "learn/metrics_file.py logs each step once over restarts"),
    ("ray.serve.context", "_get_global_client", "serve/app.py ends Serve without a retry that the terminal would show"),
    ("ray.serve.context", "_disconnect", "serve/app.py forgets the Serve that it has ended"),
    ("ray.serve._private.client:ServeControllerClient", "self._controller", "serve/app.py ends Serve"),
    ("ray.serve._private.client:ServeControllerClient", "def shutdown_cached_handles(", "serve/app.py ends Serve"),
    ("ray.serve._private.controller:ServeController", "def graceful_shutdown(", "serve/app.py ends Serve"),
    ("ray.serve.deployment:Deployment", "_internal:", "serve/app.py keeps a replica that only needs new weights"),
    ("ray.serve._private.default_impl:get_request_metadata", "generate_request_id()", "serve/app.py, _as_own_request"),
    ("ray.serve.request_router:RequestRouter", "def replica_queue_len_cache(", "serve/routing.py compares queues"),
    ("ray.serve.request_router:PendingRequest", "routing_context", "serve/routing.py waits when no replica has room"),
    (
        "ray.serve._private.constants",
        '"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"',
        "cluster/session.py, for busy machines",
    ),
]


@pytest.mark.parametrize(("owner", "name", "use"), NAMES, ids=lambda value: value)
def test_a_private_name_is_still_there(owner: str, name: str, use: str) -> None:
    module, _, kind = owner.partition(":")
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = importlib.import_module(module)
    there = hasattr(found, name) or name in inspect.getsource(getattr(found, kind) if kind else found)
    assert there, f"{package} {importlib.metadata.version(package)}: {owner} has no {name}; {use}"
