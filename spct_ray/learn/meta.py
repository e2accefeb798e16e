"""The meta RM: a scalar classifier that tells right judgements from wrong ones, read at the judgement's last token.

Training minimises binary cross-entropy against Eq. 10 labels; scoring gives raw logits. Leaves out the votes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spct_ray.chat import encode_example
from spct_ray.learn.batch import EMPTY, Batch, BatchSize, make_batch, plan_rows
from spct_ray.learn.examples import Example
from spct_ray.learn.model import LastTokenScore, load_model
from spct_ray.learn.trainer import Trainer
from spct_ray.precision import resolve
from spct_ray.records import Message


def encode_judgement(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], int]:
    """Token ids of `judge.prompt.meta_messages`, up to and with the end of the judgement's turn, and how many of them
    are its prompt: judgements of the same responses in the same order share it."""
    *prompt, judgement = messages
    return encode_example(tokenizer, prompt, judgement.content)


def meta_loss(trainer: Trainer, batch: Batch, size: BatchSize) -> Tensor:
    """Binary cross-entropy of the logits against `batch.extras["label"]`, mean over the whole update."""
    labels = batch.extras["label"].to(trainer.device)
    return F.binary_cross_entropy_with_logits(trainer.scores(batch), labels, reduction="sum") / size.num_sequences


class MetaScorer:
    """A trained meta RM in one process, without DeepSpeed: what serving and the meta_scores stage use."""

    def __init__(self, model_dir: str, micro_tokens: int = 8192) -> None:
        from transformers import AutoTokenizer

        on_gpu = torch.cuda.is_available()
        self._device = "cuda" if on_gpu else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        dtype = getattr(torch, resolve("auto", on_gpu))
        self._module = LastTokenScore(load_model(model_dir, "scalar", dtype, on_gpu)).to(self._device).eval()
        self._micro_tokens = micro_tokens

    def warm_up(self) -> None:
        """Score a short and a full row, so that no later call waits for attention to be compiled, or is the first to
        find that the memory does not suffice."""
        full = self._micro_tokens if self._device == "cuda" else 512  # on CPU nothing is compiled
        limit = getattr(self._module.model.config, "max_position_embeddings", full)
        for num_tokens in (64, min(full, limit)):
            trunk, branch = num_tokens // 2, num_tokens // 8
            self._score_tokens([[0] * (trunk + branch)] * 4, [trunk] * 4)

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """A raw logit for each of `judge.prompt.meta_messages`, in order; above 0 means "right" is more likely."""
        if not conversations:
            return []
        encoded = [encode_judgement(self._tokenizer, messages) for messages in conversations]
        sequences, prompt_lengths = zip(*encoded, strict=True)
        return self._score_tokens(sequences, prompt_lengths)

    @torch.no_grad()  # not inference mode, whose tensors would have attention compiled once more
    def _score_tokens(self, sequences: Sequence[list[int]], prompt_lengths: Sequence[int]) -> list[float]:
        logits = [0.0] * len(sequences)
        (rows,) = plan_rows(sequences, prompt_lengths, micro_tokens=self._micro_tokens)
        for indices in rows:
            batch = make_batch([sequences[i] for i in indices], [prompt_lengths[i] for i in indices])
            values = self._module(batch.to(self._device)).tolist()
            for index, value in zip(indices, values, strict=True):
                logits[index] = value
        return logits


def score_judgements(model_dir: str, conversations: Sequence[Sequence[Message]]) -> list[float]:
    """One call of `MetaScorer`, for when the model is needed once."""
    return MetaScorer(model_dir).score(conversations)


def score_over_ranks(trainer: Trainer, examples: Sequence[Example], micro_tokens: int) -> list[float]:
    """Logits of all judgements from the model in training, the work shared by all ranks. Collective."""
    sequences, prompt_lengths = [e.ids for e in examples], [e.prompt_length for e in examples]
    plan = plan_rows(sequences, prompt_lengths, micro_tokens=micro_tokens, num_ranks=trainer.world_size)
    logits = torch.zeros(len(sequences), dtype=torch.float64)
    with torch.no_grad():
        for place in range(max(map(len, plan))):  # every rank runs as many passes, ZeRO-3 wants it
            row = plan[trainer.rank][place] if place < len(plan[trainer.rank]) else []
            batch = make_batch([sequences[i] for i in row], [prompt_lengths[i] for i in row]) if row else EMPTY
            logits[row] = trainer.scores(batch).double().cpu()[: len(row)]
    summed: list[float] = trainer.sum_over_ranks(logits).tolist()
    return summed
