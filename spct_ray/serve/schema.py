"""The wire format of `POST /v1/judge`, for the server, the command line and the client. Leaves out HTTP and judging.

Requests are strict: unknown keys, unknown roles, numbers as strings, blank texts and lone surrogates are refused, each
with the path of what is wrong. Checks that need the model (is the prompt too long?) are the engine's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from spct_ray.errors import SpctError
from spct_ray.records import Role, StopReason

MAX_SAMPLES = 64
MAX_RESPONSES = 64
MAX_SEED = 2**53  # whole numbers up to here survive JSON readers that use doubles

Text = Annotated[str, StringConstraints(pattern=r"\S")]


class InvalidRequest(SpctError):
    """A request that breaks the schema. `details` has one {path, message} a fault."""

    def __init__(self, details: list[dict[str, str]]) -> None:
        super().__init__("; ".join(f"{d['path']}: {d['message']}" for d in details))
        self.details = details


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class MessageIn(_Strict):
    """One turn of the conversation that the responses answer."""

    role: Role
    content: Text


class JudgeRequest(_Strict):
    """One query with the responses to be scored. A temperature or seed left out is the server's choice.

    `k` samples are drawn (Eq. 14); with a meta RM the `k_meta` best of them are summed (default k // 2, at least 1).
    The same seed gives the same response orders and sampling seeds.
    """

    messages: tuple[MessageIn, ...]
    responses: Annotated[tuple[Text, ...], Field(max_length=MAX_RESPONSES)]
    k: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 8
    k_meta: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    reference: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> JudgeRequest:
        if not self.messages or not self.responses:
            raise ValueError(f"{'responses' if self.messages else 'messages'}: must not be empty")
        if self.messages[-1].role != "user":
            raise ValueError(f"messages: the last message must be from the user, not from the {self.messages[-1].role}")
        if self.k_meta is not None and self.k_meta > self.k:
            raise ValueError(f"k_meta: {self.k_meta} samples cannot be kept of k = {self.k}")
        return self


class SampleOut(BaseModel):
    """One judgement. `order[p]` is the index of the response shown at place p; `scores` is in the request's order.

    `scores` is null where `failure` names why there are none. `kept`: whether the vote counted it.
    """

    order: list[int]
    text: str
    scores: list[int] | None
    failure: str | None
    meta_logit: float | None
    kept: bool
    prompt_tokens: int
    completion_tokens: int
    stop_reason: StopReason


class JudgeAnswer(BaseModel):
    """The verdict. Lists over responses are in the request's order.

    `scores` are sums over the `used` samples and `mean_scores` their means; both are null when no sample could be
    used, then `failures` says why by name. `winner` is one of `winners`, drawn with the seed when they tie; a single
    response has no winner. `voting` is "plain" where no meta RM scored the samples; `voting_reason` says why.
    """

    scores: list[int] | None
    mean_scores: list[float] | None
    scale: tuple[int, int]
    winner: int | None
    winners: list[int]
    tie: bool
    num_samples: int
    used: list[int]
    failures: dict[str, int]
    voting: Literal["meta", "plain"]
    voting_reason: str
    samples: list[SampleOut]
    model: str
    weight_version: int
    seed: int
    milliseconds: float


def parse_request(body: bytes | str) -> JudgeRequest:
    """A request from JSON. Raises InvalidRequest with the path of every fault."""
    try:
        return JudgeRequest.model_validate_json(body)
    except ValidationError as error:
        raise InvalidRequest([_detail(e) for e in error.errors(include_url=False, include_input=False)]) from error


def _detail(error: Any) -> dict[str, str]:
    path, message = ".".join(str(part) for part in error["loc"]), error["msg"]
    if error["type"] == "value_error":  # from _consistent, which names the path itself
        path, _, message = str(error["ctx"]["error"]).partition(": ")
    elif error["type"] == "string_pattern_mismatch":
        message = "must not be empty or blank"
    return {"path": path or "body", "message": message}
