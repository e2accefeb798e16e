"""FLOPs of an update by formula, from a model's shape and what its rows hold: no counter runs beside the work.

Counted is what is really computed of linear layers, attention and output layer; 2 a multiplication with its addition,
attended pairs of tokens one by one (so a causal square is half of one). Leaves out embeddings, norms, activations,
adapters and the optimiser, which are below a percent, and models that are not plain dense decoders. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spct_ray.errors import ConfigError
from spct_ray.stages.plan_check import ModelShape

if TYPE_CHECKING:
    from spct_ray.learn.batch import Batch


@dataclass(frozen=True)
class Work:
    """What passes through a network: `tokens` through its layers, `logits` of them through its output layer, and pairs
    of tokens that attend to each other, summed over all layers."""

    tokens: float
    pairs: float
    logits: float

    def forward(self, shape: ModelShape) -> float:
        """FLOPs of a forward pass: attention is two products, scores and their sum over values."""
        return self._linear(shape) + 2 * self._product(shape) + self._output(shape)

    def backward(self, shape: ModelShape, *, frozen: bool = False, sliced: bool = True) -> float:
        """FLOPs of the backward pass: to inputs and, unless they are `frozen`, to weights; attention's kernels compute
        the scores again beside four products, and so does our output layer its logits (`sliced`, see `learn.model`)."""
        grads = 1 if frozen else 2
        return grads * self._linear(shape) + 5 * self._product(shape) + (grads + sliced) * self._output(shape)

    def _linear(self, shape: ModelShape) -> float:
        return 2 * shape.layers * shape.layer_weights * self.tokens

    def _product(self, shape: ModelShape) -> float:
        return 2 * shape.heads * shape.head_dim * self.pairs

    def _output(self, shape: ModelShape) -> float:
        return 2 * shape.embedding * self.logits


def work_of(shape: ModelShape, trees: Iterable[tuple[float, Sequence[float]]], logits: float) -> Work:
    """The work of packed rows, given the tokens of each tree's trunk and of its branches."""
    tokens = pairs = 0.0
    for trunk, branches in trees:
        tokens += trunk + sum(branches)
        for window, layers in ((0, shape.layers - shape.num_windowed), (shape.window, shape.num_windowed)):
            before = _causal_pairs(trunk, window)
            pairs += layers * (before + sum(_causal_pairs(trunk + n, window) - before for n in branches))
    return Work(tokens, pairs, logits)


def training_flops(config: Any, batches: Sequence[Batch]) -> float:
    """FLOPs of forward and backward pass of a network (transformers config) on packed rows, without checkpointing.

    The output layer works on trained tokens alone. Raises ConfigError for what is no plain dense decoder.
    """
    shape = ModelShape.of(config.get_text_config().to_dict())
    if shape is None:
        raise ConfigError(f"{type(config).__name__}: FLOPs are known of dense decoders with gated MLP only")
    trees = ((tree.trunk, tree.branches) for batch in batches for tree in batch.trees)
    work = work_of(shape, trees, sum(len(batch.target_N) for batch in batches))
    return work.forward(shape) + work.backward(shape)


def _causal_pairs(tokens: float, window: int) -> float:
    """Of a sequence whose tokens attend to themselves and to those before them, at most `window` (0: any number)."""
    inside = min(tokens, window) if window else tokens
    return inside * (inside + 1) / 2 + (tokens - inside) * window
