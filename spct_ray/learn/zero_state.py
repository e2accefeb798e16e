"""One rank's part of the optimizer state under ZeRO: fp32 master weights and moments, as views for checkpoints.

DeepSpeed's own checkpoints are pickles of its partitioning. Its public functions (`safe_get_local_fp32_param` and
similar) cover only ZeRO-3 and copy offloaded state, so views need private names of its optimizers;
tests/test_private_names.py names each one that a version drops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spct_ray.learn.checkpoint import Fragment


class ZeroState:
    """One rank's state: of a DeepSpeed `engine` at a ZeRO `stage`, the torch `optimizer` inside it, and the model."""

    def __init__(self, engine: Any, optimizer: Any, model: torch.nn.Module, stage: int, rank: int) -> None:
        self._zero, self._optimizer, self._model, self._stage, self._rank = (
            engine.optimizer, optimizer, model, stage, rank,
        )  # fmt: skip

    def fragments(self) -> Iterator[Fragment]:
        """Views of the master weights and moments that this rank owns; call `create_moments` first."""
        momentum = dict[Any, Tensor]()  # of whole matrices
        for master, matrices in self._muon_masters():
            if matrices is not None:
                buffer = self._optimizer.state[master]["momentum_buffer"]
                momentum.update(zip(matrices, buffer.split([p.numel() for p in matrices]), strict=True))
        for name, param in self._model.named_parameters():
            if not param.requires_grad:
                continue  # as in the model that training began with
            keys: dict[str, str | None] = {"fp32": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
            if getattr(param, "use_muon", False):
                keys = {"fp32": None} if param in momentum else {"fp32": None, "momentum_buffer": "momentum_buffer"}
            if param in momentum:
                yield Fragment(name, 0, {"momentum_buffer": momentum[param]})
            if start_and_views := self._views(param, keys):
                yield Fragment(name, *start_and_views)

    def _views(self, param: Any, keys: dict[str, str | None]) -> tuple[int, dict[str, Tensor]] | None:
        """Where this rank's part of a parameter starts, and its state by kind; None if it owns none of it."""
        if self._stage == 3:
            start = self._rank * param.partition_numel()
            length = min(param.partition_numel(), param.ds_numel - start)  # the rest is padding
            if length <= 0:
                return None
            parts = {k: self._zero._get_fp32_opt_state_partition(param, True, key)[0] for k, key in keys.items()}
            return start, {k: part.detach()[:length] for k, part in parts.items()}
        mapping = param._hp_mapping
        if mapping is None:
            return None
        parts = {k: mapping.get_hp_fragment(key) for k, key in keys.items()}
        return mapping.lp_fragment_address.start, {k: part.detach() for k, part in parts.items()}

    def create_moments(self) -> None:
        """Create the optimizer state of before the first update, where there is none yet."""
        for master, matrices in self._muon_masters():
            numel = len(master) if matrices is None else sum(p.numel() for p in matrices)
            self._optimizer.state[master].setdefault("momentum_buffer", master.new_zeros(numel, requires_grad=False))
        for master in self._masters():
            state = self._optimizer.state[master]
            if not state:
                on_cpu = type(self._optimizer).__name__ == "DeepSpeedCPUAdam"
                state["step"] = 0 if on_cpu else torch.zeros((), device=master.device)
                state["exp_avg"] = torch.zeros_like(master, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
        if self._stage < 3:
            # DeepSpeed links the state of all groups only once, after the first update, when some may have none.
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def set_step(self, step: int) -> None:
        """Set the number of updates in the optimizer."""
        for state in (self._optimizer.state[master] for master in self._masters()):
            counter = state.get("step")
            if counter is not None:
                state["step"] = torch.full_like(counter, step) if isinstance(counter, Tensor) else step

    def update_weights(self) -> None:
        """Copy the master weights into the weights of the forward pass."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()
        for sub_group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        self._zero.checkpoint_event_epilogue()

    def _masters(self) -> list[Tensor]:
        """The flat fp32 tensors that the optimizer updates (under ZeRO-3 they are not in the parameter groups)."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _muon_masters(self) -> Iterator[tuple[Tensor, list[Any] | None]]:
        """The masters that Muon updates. DeepSpeed keeps their momentum in the form of the master or, under ZeRO-2 and
        in fp32 under ZeRO-1, for each whole matrix of which this rank has a part: then with those matrices."""
        if self._stage == 3:
            is_muon = getattr(self._zero, "sub_groups_using_muon", [False] * len(self._zero.fp16_groups))
        else:
            is_muon = [group.get("use_muon", False) for group in self._optimizer.param_groups]
        whole = getattr(self._zero, "params_in_partition", [None] * len(is_muon))
        masters = zip(self._masters(), whole, is_muon, strict=True)
        return ((master, matrices) for master, matrices, chosen in masters if chosen)
