"""The model under training: loading, and the two heads a Trainer can drive (next-token log-probs, one score).

Leaves out optimisation and distribution (see trainer.py), and any model code of its own: the network is transformers'.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spct_ray.errors import ConfigError
from spct_ray.learn import attention
from spct_ray.learn.batch import Batch

Head = Literal["lm", "scalar"]

_MAX_LOGITS = 1 << 26  # logits alive at once, in fp32 (256 MiB): more tokens than fit are worked off chunk by chunk


def load_model(model_dir: str, head: Head, dtype: torch.dtype) -> Any:
    """A transformers causal LM, or sequence classifier with one output, with its weights in `dtype`.

    It takes packed rows. Under an active ZeRO-3 `HfDeepSpeedConfig` the weights arrive partitioned. Raises ConfigError
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
    if head == "lm":
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation=attention.NAME)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_pretrained(
        model_dir, config=config, dtype=dtype, attn_implementation=attention.NAME
    )


class TokenLogprobs(nn.Module):
    """A causal LM that answers with log-probabilities of given next tokens instead of all logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = LogprobHead(model.get_output_embeddings(), model.config.get_text_config())

    def forward(self, batch: Batch) -> Tensor:
        """Log p [N] in fp32 of each trained token. Only what predicts them passes through the output layer."""
        return self.head(_hidden_states(self.model, batch)[batch.source_N], batch.target_N)  # type: ignore[no-any-return]


class LogprobHead(nn.Module):
    """The output layer over N tokens. One module, so that ZeRO-3 gathers its weight once for all chunks."""

    def __init__(self, lm_head: nn.Linear, config: Any) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.chunk_size = max(1, _MAX_LOGITS // int(config.vocab_size))

    def forward(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        if len(hidden_NH) <= self.chunk_size:
            return self._logprobs(hidden_NH, targets_N)
        chunks = zip(torch.split(hidden_NH, self.chunk_size), torch.split(targets_N, self.chunk_size), strict=True)
        return torch.cat([checkpoint(self._logprobs, h, t, use_reentrant=False) for h, t in chunks])

    def _logprobs(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        logits_NV = F.linear(hidden_NH, self.lm_head.weight, self.lm_head.bias).float()
        if self.softcap:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return -F.cross_entropy(logits_NV, targets_N, reduction="none")


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
    output = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, trees=batch.trees
    )
    hidden_1TH: Tensor = output.last_hidden_state
    return hidden_1TH[0]
