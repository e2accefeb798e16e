"""A scalar reward model in one process: one number for a query and a response, as any sequence classifier gives it.

Nothing here is this project's own: the model is called as its authors would call it, one sequence at a time, so that
every architecture that transformers knows works. Bradley-Terry training of one is `bradley_terry_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spct_ray.chat import encode_example
from spct_ray.errors import ConfigError
from spct_ray.learn.batch import Batch, BatchSize, Tokens, make_batch, plan_rows
from spct_ray.learn.examples import Example
from spct_ray.learn.trainer import Trainer
from spct_ray.precision import resolve
from spct_ray.records import Message


class RewardModel:
    """A model directory whose config names a ...ForSequenceClassification with one output.

    With a chat template a response is the assistant's turn after the query; without one (encoders), query and response
    are the tokenizer's pair of texts. Raises ConfigError for more than one output.
    """

    def __init__(self, model_dir: str) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        outputs = AutoConfig.from_pretrained(model_dir).num_labels
        if outputs != 1:
            raise ConfigError(f"{model_dir}: a classifier with {outputs} outputs; a scalar reward model has one")
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        dtype = getattr(torch, resolve("auto", on_gpu=self._device == "cuda"))
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=dtype)
        model.config.pad_token_id = None  # one sequence at a time: its last token is the last
        self._model = model.to(self._device).eval()

    @torch.inference_mode()
    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[tuple[float, int]]:
        """(score, tokens read) of each (query, response), in order."""
        found = []
        for messages, response in conversations:
            inputs = self._encode(messages, response)
            logits = self._model(**{name: value.to(self._device) for name, value in inputs.items()}).logits
            found.append((float(logits.float()[0, 0]), int(inputs["input_ids"].shape[1])))
        return found

    def _encode(self, messages: Sequence[Message], response: str) -> dict[str, Tensor]:
        if self._tokenizer.chat_template is None:
            query = "\n\n".join(m.content for m in messages)
            return dict(self._tokenizer(query, response, return_tensors="pt", truncation=True))
        ids, _ = encode_example(self._tokenizer, messages, response)
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def pair_rows(examples: Sequence[Example], rank: int, num_ranks: int, micro_tokens: int) -> list[Batch]:
    """One rank's share of the examples of `make_pair` as packed rows; a row's sequences are chosen and rejected in
    turn, and a pair is never divided."""
    sizes, prompts = [e.ids for e in examples], [e.prompt_length for e in examples]
    rows = plan_rows(sizes, prompts, micro_tokens=micro_tokens, num_ranks=num_ranks, share_prompts=False)[rank]
    batches = []
    for row in rows:
        sequences: list[Tokens] = []
        for example in (examples[i] for i in row):
            prompt, end = example.ids[: example.prompt_length], example.prompt_length + int(example.label)
            sequences += [example.ids[:end], np.concatenate([prompt, example.ids[end:]])]
        batches.append(make_batch(sequences, [examples[i].prompt_length for i in row for _ in range(2)]))
    return batches


def bradley_terry_loss(trainer: Trainer, batch: Batch, size: BatchSize) -> Tensor:
    """-log sigmoid(score of the chosen - score of the rejected response), mean over all pairs of the update."""
    scores = trainer.scores(batch)
    return -F.logsigmoid(scores[0::2] - scores[1::2]).sum() / size.num_sequences
