"""The bodies of requests and answers, for server, command line and client.

Our own requests are strict: unknown keys, unknown roles, numbers as strings, blank texts and lone surrogates are
refused with the path of each fault. Requests of third-party clients (rerankers, OpenRLHF) are equally strict, except
that unknown keys are ignored, because these clients send keys that a judge does not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from spct_ray.errors import SpctError
from spct_ray.records import Role, StopReason

MAX_SAMPLES = 64
MAX_RESPONSES = 64
MAX_SEED = 2**53  # the largest range of integers that JSON readers with doubles keep exact
MAX_BATCH = 256  # requests per batch
MAX_DOCUMENTS = 1024
MAX_DETAILS = 20  # faults reported per request
MAX_PATH = 200  # characters of a fault's path, which may contain a key from the request

PrinciplesSource = Literal["none", "given", "generated", "cached", "failed"]


class InvalidRequest(SpctError):
    """A request that breaks the schema. `details` has one {path, message} per fault."""

    def __init__(self, details: list[dict[str, str]]) -> None:
        super().__init__("; ".join(f"{d['path']}: {d['message']}" for d in details))
        self.details = details

    @classmethod
    def of(cls, faults: Sequence[Any]) -> InvalidRequest:
        """From pydantic's or FastAPI's list of faults."""
        return cls([_detail(fault) for fault in faults[:MAX_DETAILS]])


def _detail(fault: Any) -> dict[str, str]:
    path = ".".join(str(part) for part in fault["loc"]).removeprefix("body.") or "body"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "json_invalid":  # FastAPI's `loc` has the position
        path, message = "body", f"Invalid JSON: {fault['ctx']['error']}"
    elif fault["type"] in ("string_pattern_mismatch", "too_short"):
        message = "must not be empty or blank"
    return {"path": path[:MAX_PATH], "message": message}


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], body: bytes | str) -> Model:
    """A `model` from JSON. Raises InvalidRequest with the path of every fault."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise InvalidRequest.of(error.errors(include_url=False, include_input=False)) from error


def _num_samples(value: Any) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if type(value) is not int or not 1 <= value <= MAX_SAMPLES:
        raise ValueError(f'must be a whole number from 1 to {MAX_SAMPLES}, or "auto"')
    return value


def _document_text(document: Any) -> Any:
    """Jina and Cohere's first API version also send documents as `{"text": ...}`."""
    return document["text"] if isinstance(document, dict) and "text" in document else document


NumSamples = Annotated[
    int | Literal["auto"], PlainValidator(_num_samples, json_schema_input_type=int | Literal["auto"])
]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Text = Annotated[str, Field(pattern=r"\S")]
DocumentText = Annotated[Text, BeforeValidator(_document_text, json_schema_input_type=str | dict[str, Any])]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class MessageIn(_Strict):
    """One turn of the conversation that the responses answer."""

    role: Role
    content: Text


class Budget(_Strict):
    """What a verdict may cost: no round of samples begins after `tokens` completion tokens, and samples that take
    longer than `milliseconds` are cancelled. The samples that are complete by then are counted."""

    tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    milliseconds: Annotated[int, Field(ge=1, le=2**31)] | None = None


class JudgeRequest(_Strict):
    """One query with the responses to score. The server chooses a temperature or seed that is not given.

    `k` samples are drawn (Eq. 14), or with "auto" as many as settle the winner; with a meta RM the `k_meta` best of
    them are summed (default: half, at least 1). `principles` is a rubric to judge by, or "auto" to have the judge write
    one from the query alone, once for all samples; `reference` is an answer known to be right.
    """

    messages: Annotated[list[MessageIn], Field(min_length=1)]
    responses: Annotated[list[Text], Field(min_length=1, max_length=MAX_RESPONSES)]
    k: NumSamples = 8
    k_meta: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Seed | None = None
    reference: str = ""
    principles: str = ""
    budget: Budget = Budget()
    stream: bool = False

    @field_validator("messages")
    @classmethod
    def _ends_with_the_user(cls, messages: list[MessageIn]) -> list[MessageIn]:
        if messages[-1].role != "user":
            raise ValueError(f"the last message must be from the user, not from the {messages[-1].role}")
        return messages

    @field_validator("k_meta")
    @classmethod
    def _at_most_k(cls, k_meta: int | None, info: ValidationInfo) -> int | None:
        k = info.data.get("k", MAX_SAMPLES)
        if k_meta is not None and k == "auto":
            raise ValueError('must not be given when k is "auto", where it is half of the samples')
        if k_meta is not None and k_meta > k:
            raise ValueError(f"{k_meta} samples cannot be kept of k = {k}")
        return k_meta


class SampleOut(BaseModel):
    """One judgement. `order[p]` is the index of the response shown at position p; `scores` is in the request's order,
    and null where `failure` names the reason. `kept` says whether the vote counted it."""

    model_config = ConfigDict(from_attributes=True)  # of a Trajectory

    sample: int
    order: list[int]
    text: str
    scores: Annotated[list[int] | None, BeforeValidator(lambda scores: scores or None)]
    failure: Annotated[str | None, BeforeValidator(lambda failure: failure or None)]
    meta_logit: float | None = None
    kept: bool = False
    prompt_tokens: int
    completion_tokens: int
    stop_reason: StopReason
    weight_version: int


class Tally(BaseModel):
    """One sample of a stream, and the plain sums (in the request's order) over the usable samples so far."""

    sample: SampleOut
    num_samples: int
    scores: list[int | float] | None


class JudgeAnswer(BaseModel):
    """The verdict. Lists over responses are in the request's order.

    `scores` are sums over the `used` samples and `mean_scores` their means; both are null when no sample could be
    used, and `failures` counts the reasons. `winner` is one of `winners`, drawn with the seed when they tie; a single
    response has no winner. `confidence` is the share of bootstrap resamples of the used samples that `winner` wins
    (null for fewer than two). `voting` is "plain" where no meta RM scored the samples; `voting_reason` says why.
    `principles` are those that the judge was shown: "given" by the request, "generated" for it, or "cached" from an
    earlier one; "failed" means that the judge wrote none when asked to, and judged without. `stopped`: all `k` were
    sampled, an adaptive k was "settled", or the "budget" was spent. `weight_version` is the newest of the samples'.
    """

    scores: list[int | float] | None
    mean_scores: list[float] | None
    scale: tuple[int, int]
    winner: int | None
    winners: list[int]
    tie: bool
    confidence: float | None
    num_samples: int
    stopped: Literal["k", "settled", "budget"]
    used: list[int]
    failures: dict[str, int]
    voting: Literal["meta", "weighted", "plain"]
    voting_reason: str
    principles: str
    principles_source: PrinciplesSource
    samples: list[SampleOut]
    model: str
    weight_version: int
    seed: int
    prompt_tokens: int
    completion_tokens: int
    milliseconds: float


class Fault(BaseModel):
    """What is wrong: `type` is for programs, `message` for people, `details` have the paths of a malformed request."""

    type: str
    message: str
    details: list[dict[str, str]] = []


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: Fault


class BatchedRequest(JudgeRequest):
    """A request of a batch, which is answered as a whole."""

    stream: Literal[False] = False


class BatchRequest(_Strict):
    """Requests to judge side by side; each gets its own verdict or error."""

    requests: Annotated[list[BatchedRequest], Field(min_length=1, max_length=MAX_BATCH)]


class BatchResult(BaseModel):
    """The verdict on one request of a batch, or why there is none."""

    answer: JudgeAnswer | None = None
    error: Fault | None = None


class BatchAnswer(BaseModel):
    """One result per request, in order."""

    results: list[BatchResult]


class CohortRequest(_Strict):
    """What requests to score many responses share; they come from clients that also send keys of their own."""

    model_config = ConfigDict(extra="ignore")

    k: NumSamples = 8
    seed: Seed | None = None


class RerankRequest(CohortRequest):
    """`POST /v1/rerank`: documents to rank by how well they answer the query."""

    query: Text
    documents: Annotated[list[DocumentText], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False


class RerankResult(BaseModel):
    """One document: its index in the request, and its mean score on a scale of 0 to 1."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class RerankAnswer(BaseModel):
    """Documents with a score, best first; `meta.failed` has the indices of those without one."""

    id: str
    model: str
    results: list[RerankResult]
    usage: dict[str, int]
    meta: dict[str, Any]


class RewardRequest(CohortRequest):
    """`POST /v1/reward`, as OpenRLHF sends it: `query` is prompt and response in one text, `prompts` the prompts alone.

    A query that does not contain its prompt is taken as the response. `labels` that are texts are shown to the judge as
    reference answers. Completions with equal prompts (and labels) are judged together.
    """

    query: Annotated[list[Text], Field(min_length=1, max_length=MAX_DOCUMENTS)]
    prompts: list[Text]
    labels: list[Any] | None = None

    @field_validator("prompts", "labels")
    @classmethod
    def _one_per_query(cls, values: list[Any] | None, info: ValidationInfo) -> list[Any] | None:
        queries = info.data.get("query")
        if values is not None and queries is not None and len(values) != len(queries):
            raise ValueError(f"{len(values)} values for {len(queries)} queries")
        return values


class RewardAnswer(BaseModel):
    """Mean scores on the judge's scale, NaN where there is no verdict; `scores` are the same on a scale of 0 to 1."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # NaN is not JSON, but Python's readers accept it

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
