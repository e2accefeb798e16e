"""The records that travel from end to end: an Item goes in, Trajectories come out of sampling, a Verdict out of voting.

Axes used in names across the package: K samples of one item, N responses of one item, G rollouts of one group,
B sequences, T tokens. Every record is frozen, slotted and pickles; `to_row` / `from_row` turn it into one flat
Parquet row and back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Role = Literal["system", "user", "assistant"]
StopReason = Literal["stop", "length", "abort"]


class Record:
    """Conversion to and from Parquet rows, shared by all records."""

    __slots__ = ()

    def to_row(self) -> dict[str, Any]:
        """A dict of plain Python values (tuples become lists, nested records dicts)."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Inverse of `to_row`; ignores columns that are not fields (Ray Data may add some)."""
        names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: _freeze(value) for name, value in row.items() if name in names})


def _freeze(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy arrays and scalars, as Ray Data returns them
        value = value.tolist()
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, slots=True)
class Message(Record):
    """One turn of a conversation, e.g. Message("user", "Name a prime.")."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Item(Record):
    """A query with n >= 1 responses and their ground-truth rewards, one per response; none where the truth is unknown.

    Example: Item("vif-17", (Message("user", "Name a prime."),), ("4", "7"), (0.0, 1.0), source="builtin").
    Training needs one highest reward; for n = 1 the reward is 1 (right) or 0 (wrong).
    """

    id: str
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    rewards: tuple[float, ...] = ()
    source: str = ""
    subset: str = ""
    reference: str = ""  # a reference answer, shown to the judge when not empty
    strength: str = ""  # preference strength in words (HelpSteer2), used in the hint
    facts: str = ""  # JSON that the source keeps for itself (the built-in set: its constraints)
    principles: str = ""  # a rubric from the asker or the data, shown to the judge when not empty

    def __post_init__(self) -> None:  # rows read from Parquet carry messages as dicts
        object.__setattr__(
            self, "messages", tuple(m if isinstance(m, Message) else Message(**m) for m in self.messages)
        )

    @property
    def best(self) -> int:
        """Index j of the response with the highest reward (Eq. 10)."""
        return max(range(len(self.rewards)), key=self.rewards.__getitem__)


@dataclass(frozen=True, slots=True)
class Completion(Record):
    """One generated continuation of one prompt. `logprobs` has one value per token id, or is empty unless requested.

    A remote endpoint gives no ids, only the two counts. The ids include the end-of-turn token when the completion
    stopped at it; `text` has no control tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: StopReason
    prompt_token_ids: tuple[int, ...]
    weight_version: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Trajectory(Record):
    """One judgement of one item. `order[p]` is the index (in the item) of the response shown at place p; `scores` is in
    the item's own order, or empty when `failure` says why; `sample` counts from 0 among the item's samples of a kind.
    """

    item_id: str
    sample: int
    order: tuple[int, ...]
    text: str
    scores: tuple[int, ...]
    failure: str  # "" or a value of judge.parse.Failure
    hinted: bool
    guided: bool
    temperature: float
    seed: int
    model: str  # name of the judge that wrote it, e.g. "base", "rft", "grpo", "program"
    weight_version: int
    prompt_tokens: int
    completion_tokens: int
    stop_reason: StopReason
    num_prompts: int = 1  # prompts behind this judgement; token counts are summed

    @property
    def key(self) -> str:
        """Unique among the trajectories of one sampling run, e.g. "vif-17/s2" (h: hinted, g: greedy, s: sampled)."""
        kind = "h" if self.hinted else "s" if self.temperature else "g"
        return f"{self.item_id}/{kind}{self.sample}"


@dataclass(frozen=True, slots=True)
class Verdict(Record):
    """The outcome of a vote over K judgements of one item (Eq. 14).

    `scores` are sums over the used samples in the item's own order (empty when no sample could be used);
    `used` are the indices of the samples that were summed; `failures` counts the samples left out, by name.
    """

    item_id: str
    scores: tuple[float, ...]  # whole numbers unless the samples have weights
    used: tuple[int, ...]
    num_samples: int
    failures: dict[str, int] = field(default_factory=dict)
    logits: tuple[float, ...] = ()  # meta-RM logit per sample (NaN for an unparsable one); empty without meta RM
    weights: tuple[float, ...] = ()  # of the used samples, 1 on average; empty where all count the same

    @property
    def winners(self) -> tuple[int, ...]:
        """Indices of the responses with the highest sum; more than one means a tie, none means no usable sample."""
        return tuple(i for i, s in enumerate(self.scores) if s == max(self.scores))
