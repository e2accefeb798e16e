"""Chat messages to token ids: the one place, used by the engine and by the trainer, so that both see the same prompt.

Text of messages can never turn into control tokens: where a message quotes one ("<|im_end|>"), it is encoded as
ordinary characters; where a tokenizer would still read one, the messages are refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from spct_ray.errors import ConfigError, RequestError
from spct_ray.records import Message

_MARK = "\U000f5bc7"  # private-use character that stands for the assistant's text while a template is examined
_SURROGATE = re.compile("[\ud800-\udfff]")
_STAND_INS = range(0xF0000, 0xF2000)  # private-use characters for quoted control tokens while a template is rendered


class _Template(NamedTuple):
    """What a tokenizer with its chat template tells."""

    special: dict[str, int]  # ids of the special tokens
    control: dict[str, int]  # of these and of others that the template writes (say, "<think>")
    end: int | None  # id of the special token that ends an assistant's turn


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of the conversation, up to where the assistant starts to write (chat template, generation prompt).

    Raises ConfigError when the tokenizer has no usable chat template, RequestError when the template refuses these
    messages (some know no system role) or a text is not Unicode (half of a surrogate pair).
    """
    control = _examine(tokenizer).control
    for place, message in enumerate(messages):
        if _SURROGATE.search(message.content):
            raise RequestError(f"message {place}: a lone surrogate is no Unicode text; remove or replace it")
    quoted = sorted({c for c in control for m in messages if c in m.content}, key=len, reverse=True)
    everything = "".join(m.content for m in messages)
    free = (chr(c) for c in _STAND_INS if chr(c) not in everything)
    originals = dict(zip(free, quoted, strict=False))
    hidden = []
    for message in messages:
        content = message.content
        for stand_in, token in originals.items():
            content = content.replace(token, stand_in)
        hidden.append(Message(message.role, content))
    text = _render(tokenizer, hidden, generate=True)
    ids: list[int] = []
    for piece in re.split(f"([{''.join(originals)}])", text) if originals else [text]:
        if piece in originals:
            ids += _encode_text(tokenizer, originals[piece], control)
        else:
            ids += _encode_raw(tokenizer, piece)
    return _checked(tokenizer, ids, text, control)


def encode_example(tokenizer: Any, messages: Sequence[Message], completion: str) -> tuple[list[int], int]:
    """Token ids of prompt + completion + end-of-turn token, and the prompt's length in tokens."""
    prompt = encode_prompt(tokenizer, messages)
    written = _encode_text(tokenizer, completion, _examine(tokenizer).special)
    return [*prompt, *written, end_of_turn(tokenizer)], len(prompt)


def end_of_turn(tokenizer: Any) -> int:
    """Id of the token that ends an assistant's turn in the chat template (often, but not always, the EOS token)."""
    end = _examine(tokenizer).end
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise ConfigError(f"{_name(tokenizer)}: no special token ends the assistant's turn; set an EOS token")
    return int(end)


def _examine(tokenizer: Any) -> _Template:
    """Raises ConfigError where there is no usable template. Of several templates, the one that is rendered."""
    template = tokenizer.chat_template or ""
    return _examined(tokenizer, template if isinstance(template, str) else str(tokenizer.get_chat_template()))


@functools.lru_cache(maxsize=8)  # tokenizers are told apart by identity; a template put into one later is examined anew
def _examined(tokenizer: Any, template: str) -> _Template:
    if not template:
        raise ConfigError(
            f"{_name(tokenizer)} has no chat template: put a chat_template.jinja into the model directory "
            "(base models have none; copy it from the instruction-tuned sibling)"
        )
    user, answer = Message("user", "a"), Message("assistant", _MARK)
    prompt = _render(tokenizer, [user], generate=True)
    head, mark, tail = _render(tokenizer, [user, answer], generate=False).partition(_MARK)
    between = head.removeprefix(prompt)
    if not mark or (between.strip() and prompt == _render(tokenizer, [user], generate=False)):
        raise ConfigError(
            f"{_name(tokenizer)}: the chat template ignores add_generation_prompt, so a prompt would not end where "
            f"the assistant starts; add `{{% if add_generation_prompt %}}{between}{{% endif %}}` at its end"
        )
    added = tokenizer.added_tokens_decoder.items()
    special = {token.content: i for i, token in added if token.special}
    written = {token.content: i for i, token in added if token.content.strip() and token.content in template}
    after = [i for i in tokenizer.encode(tail, add_special_tokens=False) if i in special.values()]
    return _Template(special, special | written, after[0] if after else None)


def _encode_text(tokenizer: Any, text: str, control: Mapping[str, int]) -> list[int]:
    """Ids of plain text; tokens of `control` in it are cut after their first character, so none is recognised."""
    cuts = [match.start() + 1 for match in re.finditer(f"(?={_any_of(control)})", text)] if control else []
    ids: list[int] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        ids += _encode_raw(tokenizer, text[start:end])
    return _checked(tokenizer, ids, "", control)


def _checked(tokenizer: Any, ids: list[int], template: str, control: Mapping[str, int]) -> list[int]:
    """`ids`, unless more of them are control tokens than `template` spells: a tokenizer that normalises text before it
    looks for them finds some where none is spelt (in full-width letters)."""
    spelt = len(re.findall(_any_of(control), template)) if control else 0
    if sum(map(set(control.values()).__contains__, ids)) > spelt:
        raise RequestError(f"{_name(tokenizer)} reads control tokens where the text spells none; the text is refused")
    return ids


def _any_of(tokens: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


def _encode_raw(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def _render(tokenizer: Any, messages: Sequence[Message], generate: bool) -> str:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))
    except jinja2.TemplateError as error:
        roles = ", ".join(m.role for m in messages)
        raise RequestError(f"{_name(tokenizer)}: the chat template refuses turns ({roles}): {error}") from error


def _name(tokenizer: Any) -> str:
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
