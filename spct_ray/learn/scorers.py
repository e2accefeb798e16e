"""Inference with scalar models: the meta RM's logits of judgements, and the scores of third-party reward models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spct_ray.chat import encode_example
from spct_ray.errors import ConfigError
from spct_ray.learn.batch import forward_rows, packed_rows
from spct_ray.learn.examples import Example
from spct_ray.learn.model import LastTokenScore, load_model
from spct_ray.learn.trainer import Trainer
from spct_ray.precision import resolve
from spct_ray.records import Message


class MetaScorer:
    """A trained meta RM in one process, without DeepSpeed, for serving and the meta_scores stage."""

    def __init__(self, model_dir: str, micro_tokens: int = 8192) -> None:
        from transformers import AutoTokenizer

        self._device, dtype = _device_and_dtype()
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = load_model(model_dir, "scalar", dtype, on_gpu=self._device == "cuda")
        self._module = LastTokenScore(model).to(self._device).eval()
        self._micro_tokens = micro_tokens

    def warm_up(self) -> None:
        """Score a short and a full row, so that no later call waits for compilation or runs out of memory first."""
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
        logits = torch.zeros(len(sequences))
        for indices, batch in packed_rows(sequences, prompt_lengths, self._micro_tokens)[0]:
            logits[indices] = self._module(batch.to(self._device)).cpu()
        scores: list[float] = logits.tolist()
        return scores


def encode_judgement(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], int]:
    """Token ids of `judge.prompt.meta_messages` including the end of the judgement's turn, and the length of the prompt
    that judgements of the same responses in the same order share."""
    *prompt, judgement = messages
    return encode_example(tokenizer, prompt, judgement.content)


def score_over_ranks(trainer: Trainer, examples: Sequence[Example], micro_tokens: int) -> list[float]:
    """Logits of all judgements from the model in training, computed by all ranks together. Collective."""
    ids, prompts = [e.ids for e in examples], [e.prompt_length for e in examples]
    rows, num_passes = packed_rows(ids, prompts, micro_tokens, (trainer.rank, trainer.world_size))
    logits = torch.zeros(len(examples), dtype=torch.float64)
    outputs = forward_rows(trainer.scores, [row for _, row in rows], num_passes)
    for (indices, _), output in zip(rows, outputs, strict=True):
        logits[indices] = output.double().cpu()
    summed: list[float] = trainer.sum_over_ranks(logits).tolist()
    return summed


class RewardModel:
    """A scalar reward model: a directory whose config names a ...ForSequenceClassification with one output.

    It is called one sequence at a time, as its authors would, so every architecture in transformers works.
    With a chat template a response is the assistant's turn after the query; without one (encoders), query and
    response are the tokenizer's pair of texts. Raises ConfigError for more than one output.
    """

    def __init__(self, model_dir: str) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        outputs = AutoConfig.from_pretrained(model_dir).num_labels
        if outputs != 1:
            raise ConfigError(f"{model_dir}: a classifier with {outputs} outputs; a scalar reward model has one")
        self._device, dtype = _device_and_dtype()
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=dtype)
        model.config.pad_token_id = None  # one sequence at a time: its last token is the last
        self._model = model.to(self._device).eval()

    @torch.inference_mode()
    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[tuple[float, int]]:
        """(score, tokens read) of each (query, response), in order."""
        scores = []
        for messages, response in conversations:
            inputs = self._encode(messages, response)
            logits = self._model(**{name: value.to(self._device) for name, value in inputs.items()}).logits
            scores.append((float(logits.float()[0, 0]), int(inputs["input_ids"].shape[1])))
        return scores

    def _encode(self, messages: Sequence[Message], response: str) -> dict[str, Tensor]:
        if self._tokenizer.chat_template is None:
            query = "\n\n".join(m.content for m in messages)
            return dict(self._tokenizer(query, response, return_tensors="pt", truncation=True))
        ids, _ = encode_example(self._tokenizer, messages, response)
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def _device_and_dtype() -> tuple[str, torch.dtype]:
    on_gpu = torch.cuda.is_available()
    return "cuda" if on_gpu else "cpu", getattr(torch, resolve("auto", on_gpu))
