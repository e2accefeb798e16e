"""The prompts of the judge and the meta RM: the paper's frame in our words, and a compact one for tiny judges.

All n responses go into one prompt, in a user turn without a system prompt. `full` (full.j2) has the general criteria
with their bands; `compact` is for models with a context of a few hundred tokens. Responses are between numbered begin
and end markers.

Text from outside (conversation, responses, reference, principles) cannot pass as part of the frame: a marker, heading
or turn label in it gets a backslash before its name, and `\\boxed{` a space before its brace, so that a judge that
quotes it gives no score. Distinct texts stay distinct, and other text is shown unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from spct_ray.errors import DataError
from spct_ray.judge.modes import MODES, Mode, ModeName
from spct_ray.judge.parse import Failure, Scale, after_thinking
from spct_ray.records import Item, Message, StopReason


@dataclass(frozen=True)
class JudgeConfig:
    """The judge's prompt and the length of its answer, the same in every stage of a run.

    `single` is the scale for n = 1: binary 0/1 (the paper's training template) or 1..10 (its test time). A model that
    thinks before it answers gets `thinking_tokens` on top of `max_tokens`; 0 means that it does not think.
    """

    template: Literal["full", "compact"] = "full"
    single: Literal["binary", "scale"] = "binary"
    max_tokens: int = 1024  # of one judgement; a longer one is the failure "truncated"
    mode: ModeName = "list"  # see `spct_ray.judge.modes`
    thinking_tokens: int = 0

    @property
    def budget(self) -> int:
        """Tokens of one reply, thought included."""
        return self.max_tokens + self.thinking_tokens


_FULL = Environment(
    loader=PackageLoader("spct_ray.judge", "."), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
).get_template("full.j2")
_ASK_PRINCIPLES = """You are a skilled expert at scoring responses. State the principles by which responses to the \
query below should be scored: only such as matter for this query, each with its weight. Do not answer the query.

#### Conversation ####
{conversation}

#### Output format ####
Specific Criteria: <principles, each with its weight>
"""


def mode_of(num_responses: int, config: JudgeConfig) -> Mode:
    """How `num_responses` are judged."""
    mode = MODES[config.mode]
    return MODES["list"] if num_responses == 1 and mode.compares else mode


def scale_of(num_responses: int, config: JudgeConfig) -> Scale:
    """The scale of an item's scores: 0..1 for a single response under the binary template, else 1..10; in mode "best"
    0..1, in mode "pairwise" two points per pair that a response can win."""
    if config.mode == "best" and num_responses > 1:
        return Scale(0, 1)
    if config.mode == "pairwise" and num_responses > 1:
        return Scale(0, 2 * (num_responses - 1))
    alone = num_responses == 1 or config.mode == "single"
    return Scale(0, 1) if alone and config.single == "binary" else Scale(1, 10)


def check_items(items: Iterable[Item], config: JudgeConfig) -> None:
    """Raise DataError unless all items have what the mode needs."""
    for item in items:
        needs = mode_of(len(item.responses), config).needs
        if needs and not getattr(item, needs).strip():
            raise DataError(
                f"judge.mode {config.mode!r} needs {needs!r} with every item, but {item.id} has none; give it in a "
                "column of that name, in a file of the own shape, or judge in another mode"
            )


def judge_messages(item: Item, order: Sequence[int], config: JudgeConfig, hint: bool = False) -> tuple[Message, ...]:
    """One user turn that asks for principles, critique and scores of the item's responses, shown in `order`.

    With `hint`, the prompt ends with the position of the best response (and HelpSteer2's preference strength): for
    sampling only, never for training targets.
    """
    num = len(order)
    assert num == len(item.responses), f"{item.id}: an order of {num} places for {len(item.responses)} responses"
    check_items([item], config)
    shown, mode, scale = [item.responses[i] for i in order], mode_of(num, config), scale_of(num, config)
    principles = item.principles if mode.criteria else ""
    if config.template == "compact":
        ask = mode.short.format(num=num) if mode.short else f"Score {scale.low}-{scale.high}."
        text = _compact(ask, item.messages, shown, Principles=principles, Reference=item.reference)
    else:
        box = "x" if num == 1 else ", ".join(f"x{p}" for p in range(1, num + 1))
        text = _FULL.render(
            mode=mode,
            scale=scale,
            binary=num == 1 and scale.high == 1,
            task=mode.task.format(each="the response" if num == 1 else f"each of the {num} responses", num=num),
            conversation=conversation(item.messages),
            principles=_inert(principles),
            reference=_inert(item.reference),
            responses=[_inert(response) for response in shown],
            answer=mode.answer or f"Scores: \\boxed{{{box}}}",
        )
    return (Message("user", text + (_hint(item, order) + "\n" if hint else "")),)


def principles_messages(messages: Sequence[Message], config: JudgeConfig) -> tuple[Message, ...]:
    """One user turn that asks for principles from the conversation alone, before any response is shown.

    The compact prompt does not ask: it ends where the responses would begin, and the judge begins with its principles
    as always.
    """
    if config.template == "compact":
        return (Message("user", _compact("Score 1-10.", messages)),)
    return (Message("user", _ASK_PRINCIPLES.format(conversation=conversation(messages))),)


def _hint(item: Item, order: Sequence[int]) -> str:
    if len(order) == 1:
        return f"The correct score is: {int(item.rewards[0])}"
    strength = f" ({item.strength})" if item.strength else ""
    return f"The best response is: Response {list(order).index(item.best) + 1}{strength}"


def _compact(ask: str, messages: Sequence[Message], shown: Sequence[str] = (), **given: str) -> str:
    """What is asked, the query, what is given with it, and the responses between their markers."""
    query = _inert_turn(messages[0].content) if len(messages) == 1 else conversation(messages)
    lines = [ask, f"Query: {query}", *(f"{name}: {_inert_turn(text)}" for name, text in given.items() if text)]
    lines += [f"[Response {p}]\n{_inert(text)}\n[End {p}]" for p, text in enumerate(shown, 1)]
    return "\n".join(lines) + "\n"


def read_principles(text: str, stop_reason: StopReason, config: JudgeConfig) -> str | Failure:
    """The principles in a reply to `principles_messages`: from "Specific Criteria:" to "Analysis:" or the end.

    A last line cut off by the token limit is dropped.
    """
    written = after_thinking(text, config.thinking_tokens > 0, stop_reason)
    if written is None:
        return Failure.TRUNCATED_THINKING
    criteria, has_end, _ = written.partition("Specific Criteria:")[2].partition("Analysis:")
    is_cut = stop_reason == "length" and not has_end
    if is_cut:
        criteria = criteria.rpartition("\n")[0]
    return criteria.strip() or (Failure.TRUNCATED if is_cut else Failure.NO_PRINCIPLES)


def conversation(messages: Sequence[Message]) -> str:
    """A conversation as text, with a label before each turn."""
    return "\n\n".join(f"{m.role.capitalize()}: {_inert_turn(m.content)}" for m in messages)


_FRAME = re.compile(
    r"(?:\[|####)\s*\\*(?=(?:The\s+(?:Begin|End)\s+of\s+Response|Response|End)\s*\d+\s*\]"
    r"|(?:General\s+criteria|Conversation|Principles\s+for\s+this\s+query|Reference\s+answer"
    r"|Responses\s+to\s+be\s+scored|Output\s+format)\s*####)",
    re.IGNORECASE,
)
_BOX = re.compile(r"(\\boxed\s*)\{")
_BREAK = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"  # whatever a model may take for the end of a line
_LABEL = re.compile(
    rf"(?<=[{_BREAK}])[^\S{_BREAK}]*\\*(?=(?:System|User|Assistant|Query|Principles|Reference)\s*:)", re.IGNORECASE
)


def _inert(text: str) -> str:
    """`text` with every marker, heading and box of the frame disarmed, safe between two markers."""
    return _BOX.sub(r"\1 {", _FRAME.sub(r"\g<0>\\", text))


def _inert_turn(text: str) -> str:
    """The same with turn labels disarmed, safe where labels separate texts."""
    return _LABEL.sub(r"\g<0>\\", _inert(text))


_LINE = "[A-Za-z0-9 .,;:'()%\"!?-]"
PRINCIPLES_GUIDE = f"Specific Criteria:( {_LINE}{{10,120}}\\n){{1,3}}"


def guide(num_responses: int, config: JudgeConfig) -> str:
    """A regular expression for the three parts of a judgement, for engines with structured output.

    It bounds the length of each part, so that a model that has not learnt the format gets to its scores.
    """
    low_high = scale_of(num_responses, config)
    score = "[01]" if low_high.high == 1 else "(10|[1-9])"
    box = ", ".join([score] * num_responses)
    return f"{PRINCIPLES_GUIDE}Analysis:( {_LINE}{{10,160}}\\n){{1,{num_responses + 2}}}Scores: \\\\boxed\\{{{box}\\}}"


def meta_messages(item: Item, order: Sequence[int], judgement: str) -> tuple[Message, ...]:
    """The meta RM's conversation: query and responses as the judge saw them, and the judgement, without any thought
    before it, as the answer."""
    ask = _compact("Please score the responses.", item.messages, [item.responses[i] for i in order])
    return (Message("user", ask), Message("assistant", after_thinking(judgement) or ""))
