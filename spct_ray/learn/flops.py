"""FLOPs of an update by formula, from a model's shape and what its rows hold: no counter runs beside the work.

Counted is what is really computed of linear layers, attention and output layer; 2 a multiplication with its addition,
attended pairs of tokens one by one (so a causal square is half of one). Leaves out embeddings, norms, activations,
adapters and the optimiser, which are below a percent, and models that are not plain dense decoders. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spct_ray.errors import ConfigError
from spct_ray.learn.train_config import LoraConfig

if TYPE_CHECKING:
    from spct_ray.learn.batch import Batch

_MOE_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder with gated MLP; `num_windowed` of its layers attend to the last `window` tokens only."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = True
    window: int = 0
    num_windowed: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape | None:
        """The shape that a (text) config.json describes; None for a mixture of experts and where a size is missing."""
        config = config.get("text_config", config)
        if any(config.get(key) for key in _MOE_KEYS):
            return None
        try:
            hidden, layers, heads = (config[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
            window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
            types = config.get("layer_types") or ["sliding_attention"] * layers
            return cls(
                hidden,
                layers,
                config["intermediate_size"],
                heads,
                config.get("num_key_value_heads") or heads,
                config.get("head_dim") or hidden // heads,
                config["vocab_size"],
                bool(config.get("tie_word_embeddings", True)),
                window or 0,
                types.count("sliding_attention") if window else 0,
            )
        except KeyError:
            return None

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear maps."""
        hidden, query, key = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key),
            "v_proj": (hidden, key),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, self.intermediate),
            "up_proj": (hidden, self.intermediate),
            "down_proj": (self.intermediate, hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Without norms."""
        return sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def embedding(self) -> int:
        """Weights of the embedding; the output layer has as many."""
        return self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """All of them."""
        return self.layers * self.layer_weights + self.embedding * (1 if self.tied else 2)

    @property
    def kv_numel(self) -> int:
        """Cached values of a token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def activation_numel(self) -> int:
        """Values that one layer keeps of a token for its backward pass: inputs of norms, linear maps and products."""
        return 6 * self.hidden + 2 * (self.heads + self.kv_heads) * self.head_dim + 4 * self.intermediate

    def adapters(self, lora: LoraConfig) -> int:
        """Weights of LoRA's A and B."""
        chosen = [self.linear[name] for name in lora.target_modules or self.linear if name in self.linear]
        return self.layers * lora.rank * sum(inputs + outputs for inputs, outputs in chosen)


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
