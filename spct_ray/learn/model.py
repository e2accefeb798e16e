"""The model in training: loading it, and the two heads of a Trainer (next-token log-probs, one score).

The network is transformers' own; trainer.py optimises and distributes it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spct_ray.errors import ConfigError
from spct_ray.learn import attention
from spct_ray.learn.batch import Batch, Tree

Head = Literal["lm", "scalar"]

_MAX_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}  # in memory at once, in fp32: fits a CPU's cache, keeps a GPU busy


def load_model(model_dir: str, head: Head, dtype: torch.dtype, on_gpu: bool) -> Any:
    """A transformers causal LM, or sequence classifier with one output, with its weights in `dtype`.

    It takes packed rows. On a GPU, norms, gated MLPs and rotary embeddings are Liger's fused kernels for architectures
    that Liger supports. Under an active ZeRO-3 `HfDeepSpeedConfig` the weights arrive partitioned. Raises ConfigError
    for models whose output layer does more than a linear map and a soft-cap, or whose attention is of another kind.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(model_dir)
    text = config.get_text_config()
    for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise ConfigError(f"{model_dir}: {type(text).__name__}.{name} scales the logits, which is not supported")
    attention.check_model(model_dir, text)
    attention.register()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention.NAME}
    if head == "lm":
        model = AutoModelForCausalLM.from_pretrained(model_dir, **options)
    else:
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, config=config, **options)
    if on_gpu:
        fuse_layers(model)
    return model


@contextlib.contextmanager
def partitioned_loading(config: dict[str, Any] | None) -> Iterator[None]:
    """Inside the block, transformers partitions weights as it loads them, for the DeepSpeed `config` of ZeRO stage 3;
    None changes nothing."""
    if config is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    active = HfDeepSpeedConfig(config)  # from_pretrained looks for it while this object lives
    yield
    del active


def fuse_layers(model: Any) -> None:
    """Switch a loaded model to Liger's Triton kernels; weights and their names do not change.

    This also replaces the rotary embedding in the architecture's module of transformers, for all models in the process.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise ConfigError(f"training on GPUs takes liger-kernel: pip install 'spct-ray[gpu]' ({error})") from error
    # Not its loss: see _Logprobs, which also serves ZeRO-3.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)


class TokenLogprobs(nn.Module):
    """A causal LM that returns log-probs of given next tokens instead of all logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = LogprobHead(model.get_output_embeddings(), model.config.get_text_config())

    def forward(self, batch: Batch) -> Tensor:
        """Log p [N] in fp32 of each trained token. Only positions that predict one pass through the output layer."""
        return self.head(_hidden_states(self.model, batch)[batch.source_N], batch.target_N)  # type: ignore[no-any-return]


class LogprobHead(nn.Module):
    """The output layer over N tokens. One module, so that ZeRO-3 gathers its weight once for all slices."""

    def __init__(self, lm_head: nn.Linear, config: Any) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        weight, bias = self.lm_head.weight, self.lm_head.bias
        return _Logprobs.apply(hidden_NH, weight, bias, targets_N, self.softcap)  # type: ignore[no-any-return, no-untyped-call]


class _Logprobs(torch.autograd.Function):
    """Log-softmax of given tokens, slice by slice of the vocabulary, without keeping any logits.

    The forward pass keeps the logsumexp of each token. The backward pass recomputes a slice's logits, and from them its
    rows of the weight's gradient, which are then final, and its share of the hidden states' gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, softcap: float | None
    ) -> Tensor:
        logsumexp_N = torch.full(targets_N.shape, -math.inf, device=hidden_NH.device)
        chosen_N = torch.zeros_like(logsumexp_N)
        for part in _slices(weight_VH, hidden_NH):
            logits_NS = _logits(hidden_NH, weight_VH, bias_V, part, softcap)
            place_N, inside_N = _places(targets_N, part)
            chosen_N += logits_NS.gather(1, place_N[:, None])[:, 0] * inside_N
            logsumexp_N = torch.logaddexp(logsumexp_N, logits_NS.logsumexp(1))
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, logsumexp_N)
        ctx.softcap = softcap
        return chosen_N - logsumexp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, logsumexp_N = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_hidden_NH = torch.zeros(hidden_NH.shape, device=hidden_NH.device) if wanted[0] else None
        grad_weight_VH = torch.empty_like(weight_VH) if wanted[1] else None
        grad_bias_V = torch.empty_like(bias_V) if wanted[2] else None
        for part in _slices(weight_VH, hidden_NH):
            grad_NS = _logits(hidden_NH, weight_VH, bias_V, part, ctx.softcap)
            slope_NS = 1 - (grad_NS / ctx.softcap) ** 2 if ctx.softcap else None
            grad_NS.sub_(logsumexp_N[:, None]).exp_().mul_(-grad_N[:, None])
            place_N, inside_N = _places(targets_N, part)
            grad_NS.scatter_add_(1, place_N[:, None], (grad_N * inside_N)[:, None])
            if slope_NS is not None:
                grad_NS *= slope_NS
            if grad_bias_V is not None:
                grad_bias_V[part] = grad_NS.sum(0)
            grad_NS = grad_NS.to(hidden_NH.dtype)
            if grad_weight_VH is not None:
                grad_weight_VH[part] = grad_NS.T @ hidden_NH
            if grad_hidden_NH is not None:
                grad_hidden_NH += grad_NS @ weight_VH[part]
        hidden = None if grad_hidden_NH is None else grad_hidden_NH.to(hidden_NH.dtype)
        return hidden, grad_weight_VH, grad_bias_V, None, None


def _slices(weight_VH: Tensor, hidden_NH: Tensor) -> Iterator[slice]:
    vocab, size = len(weight_VH), max(1, _MAX_LOGITS[hidden_NH.device.type] // max(1, len(hidden_NH)))
    return (slice(start, min(start + size, vocab)) for start in range(0, vocab, size))


def _logits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, part: slice, softcap: float | None) -> Tensor:
    """[N, S] in fp32."""
    logits_NS = F.linear(hidden_NH, weight_VH[part], None if bias_V is None else bias_V[part]).float()
    return logits_NS.div_(softcap).tanh_().mul_(softcap) if softcap else logits_NS


def _places(targets_N: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Each target's index in a slice of the vocabulary (any index if it is outside), and whether it is inside."""
    place_N = (targets_N - part.start).clamp(0, part.stop - part.start - 1)
    return place_N, (targets_N >= part.start) & (targets_N < part.stop)


class LastTokenScore(nn.Module):
    """A sequence classifier with one output, read at each sequence's last token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Raw logits [B] in fp32."""
        scores_B1: Tensor = self.model.score(_hidden_states(self.model, batch)[batch.last_B])
        return scores_B1.float()[:, 0]


def _hidden_states(model: Any, batch: Batch) -> Tensor:
    """[T, H]."""
    ids, positions, trees = batch.input_ids, batch.position_ids, batch.trees
    if padding := attention.num_padding(batch.num_tokens, ids.device):
        ids, positions = F.pad(ids, (0, padding)), F.pad(positions, (0, padding))
        trees = (*trees, Tree(padding))
    output = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, trees=trees)
    hidden_1TH: Tensor = output.last_hidden_state
    return hidden_1TH[0, : batch.num_tokens]
