"""The shapes of other people's clients: rerankers (Jina, Cohere), OpenRLHF's remote reward model, OpenAI's model list.

Unknown keys are ignored here, for these clients send keys that a judge has no use for. Everything else is as strict as
in schema.py.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from spct_ray.serve.schema import NumSamples, Text

MAX_DOCUMENTS = 1024


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class Document(_Lenient):
    """A document with a text, as Jina and Cohere's first version send it."""

    text: Text


class RerankRequest(_Lenient):
    """`POST /v1/rerank`: documents to be ordered by how well they answer the query."""

    query: Text
    documents: Annotated[tuple[Text | Document, ...], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False
    k: NumSamples = 8
    seed: Annotated[int, Field(ge=0, le=2**53)] | None = None

    @property
    def texts(self) -> list[str]:
        """The documents' texts, in the request's order."""
        return [d.text if isinstance(d, Document) else d for d in self.documents]


class RerankResult(BaseModel):
    """One document: its place in the request, and its mean score on a scale of 0 to 1."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class RerankAnswer(BaseModel):
    """Best first. `results` leaves out documents without a score; `meta.failed` lists their indices."""

    id: str
    model: str
    results: list[RerankResult]
    usage: dict[str, int]
    meta: dict[str, Any]


class RewardRequest(_Lenient):
    """`POST /v1/reward`, as OpenRLHF sends it: `query` is prompt and response in one text, `prompts` the prompt alone.

    A query that does not begin with its prompt is the response alone. `labels` are shown to the judge as reference
    answers where they are texts. Completions of equal prompts (and labels) are judged together.
    """

    query: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    prompts: tuple[Text, ...]
    labels: tuple[Any, ...] | None = None
    k: NumSamples = 8
    seed: Annotated[int, Field(ge=0, le=2**53)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> RewardRequest:
        for name, values in (("prompts", self.prompts), ("labels", self.labels)):
            if values is not None and len(values) != len(self.query):
                raise ValueError(f"{name}: {len(values)} values for {len(self.query)} queries")
        return self


class RewardAnswer(BaseModel):
    """Mean scores of the judge's scale, NaN where there is no verdict; `scores` are the same on a scale of 0 to 1."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
