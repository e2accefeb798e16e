"""Attention over packed rows, plugged into transformers' models: each sequence sees its own tokens only.

On CPU one SDPA call a trunk and a branch, in fp32: for judge-shaped sequences this beats a block mask over the row (by
7x) and SDPA in bf16 (by 1.3-1.8x), whose kernels are slow there. On CUDA one flex-attention call a row. Sliding windows
and Gemma-2's soft-cap of the scores are applied; what else a model asks of its attention is refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    pieces = [length for tree in trees for length in (tree.trunk, *tree.branches)]
    queries, keys, values = (iter(torch.split(x.float(), pieces, 2)) for x in (query, key, value))
    outputs = []
    for tree in trees:
        trunk_key, trunk_value = next(keys), next(values)
        outputs.append(_attend(next(queries), trunk_key, trunk_value, scale, window, softcap))
        for _ in tree.branches:
            branch_key = torch.cat([trunk_key, next(keys)], 2)
            branch_value = torch.cat([trunk_value, next(values)], 2)
            outputs.append(_attend(next(queries), branch_key, branch_value, scale, window, softcap))
    return torch.cat(outputs, 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of the last tokens of a sequence (query) to all of it."""
    num, num_keys = query.shape[2], key.shape[2]
    if num == 0:
        return query
    if softcap is None and num == num_keys and (window is None or num_keys <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    mask = _causal_mask(num, num_keys, window)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    return (scores + mask).softmax(-1) @ value


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
