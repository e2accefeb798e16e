"""Attention over packed rows for transformers' models: each sequence attends only to its own tokens.

On CPU, one call of PyTorch's kernel per sequence, in fp32: for judge-shaped sequences this beats a block
mask over the row (by 7x) and the kernel in bf16 (by 1.3-1.8x). On CUDA, one compiled call. Sliding windows and
Gemma-2's soft-capping of the scores are applied; models with any other kind of attention are refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spct_ray.errors import ConfigError
from spct_ray.learn.batch import Tree

NAME = "spct_packed"
BLOCK = 128  # tokens per block of flex attention's mask
FLEX_BACKENDS = {"cuda": "inductor"}  # torch.compile's, by kind of device; elsewhere attention runs tree by tree
KERNEL_OPTIONS: dict[int, Any] = {}  # by head size, to override torch's choice for flex attention
Ordered = tuple[Tensor, Tensor]
Rows = tuple[Tensor, ...]  # query, key and value, or the three bounds of `intervals`

_MAX_GRAPHS = 16  # with and without gradients, of the few models that a process may hold
_UNSUPPORTED = ("s_aux", "position_bias", "cache", "head_mask")  # attention sinks (gpt-oss), biases, caches


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers. Such a model is called with `trees`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def check_model(model_dir: str, config: Any) -> None:
    """Raise ConfigError for a (text) config whose layers mix tokens in a way that is not implemented here."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConfigError(
            f"{model_dir}: {type(config).__name__} has layers of kind {', '.join(sorted(kinds))}; packed rows support "
            "full and sliding attention only"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise ConfigError(f"{model_dir}: attention_dropout is {config.attention_dropout}; set it to 0 in config.json")


def num_padding(num_tokens: int, device: torch.device) -> int:
    """Tokens of padding that complete a row to whole blocks, at least two; 0 on devices that do not use blocks."""
    return max(2 * BLOCK, -(-num_tokens // BLOCK) * BLOCK) - num_tokens if device.type in FLEX_BACKENDS else 0


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

    Raises ConfigError where the model asks for something that is not implemented here.
    """
    refused = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if trees is None or attention_mask is not None or dropout or refused:
        raise ConfigError(
            f"{type(module).__name__} does not work on packed rows: trees given: {trees is not None}, mask given: "
            f"{attention_mask is not None}, dropout {dropout}, unsupported options: {refused or 'none'}"
        )
    scale = module.head_dim**-0.5 if scaling is None else scaling
    arguments = ((query, key, value), tuple(trees), scale, sliding_window, softcap)
    backend = FLEX_BACKENDS.get(query.device.type)
    output = _attend_flex(*arguments, backend) if backend else _attend_tree_by_tree(*arguments)
    return output.transpose(1, 2).to(query.dtype), None


def _attend_tree_by_tree(
    qkv: Rows, trees: tuple[Tree, ...], scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """In fp32 [1, heads, T, D].

    Rows are split once, not sliced: the gradient of a slice is a row of zeros around it.
    """
    pieces = _pieces(trees)
    query, key, value = (torch.split(rows.float(), [piece.length for piece in pieces], 2) for rows in qkv)
    groups = query[0].shape[1] // key[0].shape[1]
    outputs = []
    for own, own_keys, own_values, piece in zip(query, key, value, pieces, strict=True):
        keys, values = piece.seen(key, own_keys), piece.seen(value, own_values)
        if softcap is None:
            outputs.append(
                F.scaled_dot_product_attention(
                    own, keys, values, **piece.mask(window), scale=scale, enable_gqa=groups > 1
                )
            )
            continue
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        scores = softcap * torch.tanh(own @ keys.transpose(-1, -2) * (scale / softcap))
        outputs.append((scores + _causal_mask(own.shape[2], keys.shape[2], window)).softmax(-1) @ values)
    return torch.cat(outputs, 2)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A trunk with its first branch, as one sequence, or a later branch, which attends to `trunk` tokens of the piece
    `first` as well."""

    length: int
    first: int = 0
    trunk: int = 0

    def seen(self, pieces: Rows, own: Tensor) -> Tensor:
        """Keys or values [1, heads, K, D] that the piece's tokens may attend to."""
        if not self.trunk:
            return own
        trunk = pieces[self.first][:, :, : self.trunk]
        return torch.cat([trunk.transpose(1, 2), own.transpose(1, 2)], 1).transpose(1, 2)  # as they lie in memory

    def mask(self, window: int | None) -> dict[str, Any]:
        """The kernel's arguments for the mask."""
        num_keys = self.trunk + self.length
        causal = not self.trunk and (window is None or num_keys <= window)
        return {"is_causal": causal, "attn_mask": None if causal else _causal_mask(self.length, num_keys, window)}


@functools.lru_cache(maxsize=4)  # the layers of a row share its pieces
def _pieces(trees: tuple[Tree, ...]) -> tuple[_Piece, ...]:
    """In the order of the row, without empty branches."""
    pieces = list[_Piece]()
    for tree in trees:
        branches = [length for length in tree.branches if length]
        first = len(pieces)
        pieces.append(_Piece(tree.trunk + sum(branches[:1])))
        pieces += [_Piece(length, first, tree.trunk) for length in branches[1:]]
    return tuple(pieces)


@functools.lru_cache(maxsize=64)  # the layers of a row share its masks
def _causal_mask(num: int, num_keys: int, window: int | None) -> Tensor:
    """[num, num_keys], from the last `num` tokens to all, to add to the scores."""
    back = torch.arange(num_keys - num, num_keys)[:, None] - torch.arange(num_keys)  # tokens from query back to key
    return torch.zeros(num, num_keys).masked_fill_((back < 0) | (back >= (window or num_keys)), -math.inf)


def _attend_flex(
    qkv: Rows, trees: tuple[Tree, ...], scale: float, window: int | None, softcap: float | None, backend: str
) -> Tensor:
    """One compiled flex-attention call [1, heads, T, D]; T is a multiple of BLOCK and at least two of it.

    Only T varies between calls, and all that depends on it is marked dynamic: each model has one graph with gradients
    and one without, whatever its rows hold. Compiling more than _MAX_GRAPHS of them raises instead of running eagerly,
    which would materialise T x T scores.
    """
    blocks = tuple(rows.view(1, rows.shape[1], -1, BLOCK, rows.shape[3]) for rows in qkv)
    for rows in blocks:
        torch._dynamo.mark_dynamic(rows, 2)
    return _compiled_flex(backend)(blocks, *_flex_mask(trees, window, qkv[0].device), scale, softcap)  # type: ignore[no-any-return]


@functools.cache
def _compiled_flex(backend: str) -> Any:
    torch._dynamo.config.recompile_limit = max(_MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    return torch.compile(_flex, backend=backend, fullgraph=True, dynamic=False)


def _flex(qkv: Rows, sees: Rows, blocks: tuple[Ordered, ...], scale: float, softcap: float | None) -> Tensor:
    """Query, key, value [1, heads, T / BLOCK, BLOCK, D]: so the compiler knows that BLOCK divides T, and omits the
    kernel's bounds checks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    own, start, stop = sees

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= own[q]) & (k <= q)) | ((k >= start[q]) & (k < stop[q]))

    def capped(score: Tensor, *place: Tensor) -> Tensor:
        assert softcap
        return softcap * torch.tanh(score / softcap)

    query, key, value = (rows.flatten(2, 3) for rows in qkv)
    partial, full, partial_by_key, full_by_key = blocks
    mask = BlockMask(
        (query.shape[2], key.shape[2]), *partial, *full, *partial_by_key, *full_by_key,
        BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=seen,
    )  # fmt: skip
    return flex_attention(
        query, key, value, capped if softcap else None, mask, scale, enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=KERNEL_OPTIONS.get(query.shape[3]),
    )  # fmt: skip


@functools.lru_cache(maxsize=4)  # all layers of a row share a mask, or two: with and without a sliding window
def _flex_mask(trees: tuple[Tree, ...], window: int | None, device: torch.device) -> tuple[Rows, tuple[Ordered, ...]]:
    """`intervals` on the device, and which of its blocks are partly and wholly seen, by queries and by keys."""
    intervals_3T = intervals(trees, window).to(device, non_blocking=True)
    partial_QK, full_QK = _seen_blocks(intervals_3T)
    sees = tuple(places_T.clone() for places_T in intervals_3T)
    for places_T in sees:
        torch._dynamo.mark_dynamic(places_T, 0)
    return sees, (_ordered(partial_QK), _ordered(full_QK), _ordered(partial_QK.T), _ordered(full_QK.T))


def intervals(trees: Sequence[Tree], window: int | None) -> Tensor:
    """What each token of a row attends to, as two intervals of the row: own .. itself, and start .. stop - 1.

    Returns (own, start, stop) [3, T] int32. A trunk's token sees its trunk so far, a branch's token its branch so far
    and the trunk, and either no more than `window` tokens, itself included.
    """
    pieces, end = list[tuple[int, int, int, int]](), 0  # length, own, start, stop of trunks and branches in the row
    for tree in trees:
        first, stop = end, end + tree.trunk
        pieces.append((tree.trunk, first, 0, 0))
        end = stop
        for length in tree.branches:
            joined = end == stop  # with the trunk right before it, both are one interval
            pieces.append((length, first, 0, 0) if joined else (length, end, first, stop))
            end += length
    lengths_P, *intervals_P = torch.tensor(pieces, dtype=torch.int32).T
    own_T, start_T, stop_T = (places_P.repeat_interleave(lengths_P) for places_P in intervals_P)
    if window:
        place_T = torch.arange(len(own_T), dtype=torch.int32)
        # The token `window` back from a branch's token lies in the trunk where the branch so far is shorter.
        start_T = torch.maximum(start_T, stop_T - window + 1 + place_T - own_T).minimum(stop_T)
        own_T = torch.maximum(own_T, place_T - window + 1)
    return torch.stack([own_T, start_T, stop_T])


def _seen_blocks(intervals_3T: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [T / BLOCK of queries, T / BLOCK of keys] of which some but not all places are seen, and all."""
    num = intervals_3T.shape[1]
    own_T1, start_T1, stop_T1 = intervals_3T[:, :, None]
    after_T1 = torch.arange(1, num + 1, dtype=torch.int32, device=intervals_3T.device)[:, None]
    low_K = torch.arange(0, num, BLOCK, dtype=torch.int32, device=intervals_3T.device)
    high_K = low_K + BLOCK
    seen_TK = (after_T1.minimum(high_K) - own_T1.maximum(low_K)).clamp_(min=0)
    seen_TK += (stop_T1.minimum(high_K) - start_T1.maximum(low_K)).clamp_(min=0)
    seen_QBK = seen_TK.view(-1, BLOCK, len(low_K))
    full_QK = seen_QBK.amin(1) == BLOCK
    return (seen_QBK.amax(1) > 0) & ~full_QK, full_QK


def _ordered(chosen_RC: Tensor) -> Ordered:
    """How many are chosen in each row, and the columns with the chosen ones first: [1, 1, R] and [1, 1, R, C]."""
    count, columns = chosen_RC.sum(1), chosen_RC.int().argsort(dim=1, descending=True, stable=True)
    ordered = count.int()[None, None], columns.int()[None, None].contiguous()
    for tensor in ordered:
        for dim in range(2, tensor.dim()):
            torch._dynamo.mark_dynamic(tensor, dim)
    return ordered
