"""Attention over packed rows, plugged into transformers' models: each sequence sees its own tokens only.

On CPU one call of PyTorch's kernel a trunk and a branch, in fp32: for judge-shaped sequences this beats a block mask
over the row (by 7x) and the kernel in bf16 (by 1.3-1.8x), which is slow there. On CUDA one flex-attention call a row.
Sliding windows and Gemma-2's soft-cap of the scores are applied; what else a model asks of its attention is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spct_ray.errors import ConfigError
from spct_ray.learn.batch import Tree

NAME = "spct_packed"
_UNSUPPORTED = ("s_aux", "position_bias", "cache", "head_mask")  # attention sinks (gpt-oss), biases, caches


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers. Such a model is called with `trees`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def check_model(model_dir: str, config: Any) -> None:
    """Raise ConfigError for a (text) config whose layers mix tokens by more than the attention that is done here."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConfigError(
            f"{model_dir}: {type(config).__name__} has layers of kind {', '.join(sorted(kinds))}; packed rows are "
            "right for full and sliding attention only"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise ConfigError(f"{model_dir}: attention_dropout is {config.attention_dropout}; set it to 0 in config.json")


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    trees: Sequence[Tree] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, D], key and value [1, kv heads, T, D] -> [1, T, heads, D].

    Raises ConfigError where the model asks for something that is not done here.
    """
    asked = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if trees is None or attention_mask is not None or dropout or asked:
        raise ConfigError(
            f"{type(module).__name__} does not work on packed rows: trees given: {trees is not None}, mask given: "
            f"{attention_mask is not None}, dropout {dropout}, unsupported options: {asked or 'none'}"
        )
    scale = module.head_dim**-0.5 if scaling is None else scaling
    attend = _attend_flex if query.is_cuda else _attend_tree_by_tree
    output = attend(query, key, value, tuple(trees), scale, sliding_window, softcap)
    return output.transpose(1, 2).to(query.dtype), None


def _attend_tree_by_tree(
    query: Tensor, key: Tensor, value: Tensor, trees: tuple[Tree, ...], scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """In fp32 [1, heads, T, D]."""
    query, key, value = query.float(), key.float(), value.float()
    if softcap is None:
        return _TreeAttention.apply(query, key, value, trees, scale, window)  # type: ignore[no-any-return, no-untyped-call]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outputs = []
    for piece in _pieces(trees):
        scores = softcap * torch.tanh(query[:, :, piece.own] @ piece.seen(key).transpose(-1, -2) * (scale / softcap))
        mask = _causal_mask(piece.own.stop - piece.own.start, scores.shape[-1], window)
        outputs.append((scores + mask).softmax(-1) @ piece.seen(value))
    return torch.cat(outputs, 2)


class _TreeAttention(torch.autograd.Function):
    """PyTorch's attention kernel for CPU, once a trunk and a branch, on slices of one row.

    One function for the row, as autograd would keep what each call is given, cut the row up for it, and put the pieces'
    gradients together by copies: here keys of trunk and branch are put side by side again in the backward pass, and
    gradients are written to their places.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, trees: tuple[Tree, ...], scale: float, window: int | None
    ) -> Tensor:
        output, logsumexps = torch.empty_like(query), []
        for piece in _pieces(trees):
            result, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, piece.own], piece.seen(key), piece.seen(value), 0.0, **piece.mask(window), scale=scale
            )
            output[:, :, piece.own] = result
            logsumexps.append(logsumexp)
        ctx.save_for_backward(query, key, value, output, *logsumexps)
        ctx.trees, ctx.scale, ctx.window = trees, scale, window
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *logsumexps = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for piece, logsumexp in zip(_pieces(ctx.trees), logsumexps, strict=True):
            of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, piece.own], query[:, :, piece.own], piece.seen(key), piece.seen(value),
                output[:, :, piece.own], logsumexp, 0.0, **piece.mask(ctx.window), scale=ctx.scale,
            )  # fmt: skip
            grad_query[:, :, piece.own] = of_query
            piece.add(grad_key, of_key)
            piece.add(grad_value, of_value)
        return grad_query, grad_key, grad_value, None, None, None


@dataclass(frozen=True, slots=True)
class _Piece:
    """A trunk, or a branch with the trunk before it, as places in the row."""

    own: slice
    trunk: slice | None = None

    def seen(self, row: Tensor) -> Tensor:
        """Keys or values [1, heads, K, D] of all that the piece's tokens may attend to."""
        if self.trunk is None:
            return row[:, :, self.own]
        if self.trunk.stop == self.own.start:
            return row[:, :, self.trunk.start : self.own.stop]
        by_token = row.transpose(1, 2)  # as a model's projections lie in memory
        return torch.cat([by_token[:, self.trunk], by_token[:, self.own]], 1).transpose(1, 2)

    def add(self, row: Tensor, seen: Tensor) -> None:
        """To the row's gradient that of `seen`."""
        length = self.trunk.stop - self.trunk.start if self.trunk else 0
        if self.trunk:
            row[:, :, self.trunk] += seen[:, :, :length]
        row[:, :, self.own] += seen[:, :, length:]

    def mask(self, window: int | None) -> dict[str, Any]:
        """What the kernel is told of who sees whom."""
        num = self.own.stop - self.own.start
        num_keys = num + (self.trunk.stop - self.trunk.start if self.trunk else 0)
        causal = num == num_keys and (window is None or num_keys <= window)
        return {"is_causal": causal, "attn_mask": None if causal else _causal_mask(num, num_keys, window)}


@functools.lru_cache(maxsize=4)  # the layers of a row share its pieces
def _pieces(trees: tuple[Tree, ...]) -> tuple[_Piece, ...]:
    """In the order of the row, but for branches without tokens."""
    pieces, end = [], 0
    for tree in trees:
        trunk = slice(end, end + tree.trunk)
        pieces.append(_Piece(trunk))
        end = trunk.stop
        for length in tree.branches:
            if length:
                pieces.append(_Piece(slice(end, end + length), trunk))
            end += length
    return tuple(pieces)


@functools.lru_cache(maxsize=64)  # the layers of a row share its masks
def _causal_mask(num: int, num_keys: int, window: int | None) -> Tensor:
    """[num, num_keys] of the last tokens to all, added to their scores."""
    back = torch.arange(num_keys - num, num_keys)[:, None] - torch.arange(num_keys)  # tokens from query back to key
    return torch.zeros(num, num_keys).masked_fill_((back < 0) | (back >= (window or num_keys)), -math.inf)


def _attend_flex(
    query: Tensor, key: Tensor, value: Tensor, trees: tuple[Tree, ...], scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    mask = _flex_mask(trees, window, query.device)
    cap = functools.partial(_capped, softcap) if softcap else None
    return _flex_attention(query.is_cuda)(  # type: ignore[no-any-return]
        query, key, value, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


@functools.cache
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def _capped(softcap: float, score: Tensor, *place: Tensor) -> Tensor:
    return softcap * torch.tanh(score / softcap)


@functools.lru_cache(maxsize=4)  # all layers of a row share a mask, or two: with and without a sliding window
def _flex_mask(trees: tuple[Tree, ...], window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    pieces = [(i, j, n) for i, tree in enumerate(trees) for j, n in enumerate((tree.trunk, *tree.branches))]
    lengths = torch.tensor([n for *_, n in pieces])
    tree_T, branch_T = (torch.tensor([p[k] for p in pieces]).repeat_interleave(lengths).to(device) for k in (0, 1))
    starts = [range(0 if j == 0 else trees[i].trunk, n + (0 if j == 0 else trees[i].trunk)) for i, j, n in pieces]
    position_T = torch.tensor([p for r in starts for p in r], device=device)

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (tree_T[q] == tree_T[k]) & ((branch_T[k] == 0) | (branch_T[q] == branch_T[k])) & (k <= q)
        return same & (position_T[q] - position_T[k] < window) if window else same

    return create_block_mask(seen, None, None, len(position_T), len(position_T), device=str(device))
