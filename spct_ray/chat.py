"""Chat messages to token ids: the one place, used by the engine and by the trainer, so that both see the same prompt.

Text of messages can never turn into control tokens: where a message quotes one ("<|im_end|>"), it is encoded as
ordinary characters; where a tokenizer would still read one, the messages are refused. Leaves out decoding, and loading
of tokenizers (any transformers tokenizer fits).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from spct_ray.errors import ConfigError, RequestError
from spct_ray.records import Message

_MARK = "\U000f5bc7"  # private-use character that stands for the assistant's text while a template is examined
_SURROGATE = re.compile("[\ud800-\udfff]")
_FIRST_STAND_IN = 0xF0000  # private-use characters that stand for quoted control tokens while a template is rendered


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of the conversation, up to where the assistant starts to write (chat template, generation prompt).

    Raises ConfigError when the tokenizer has no usable chat template, RequestError when the template refuses these
    messages (some know no system role) or a text is not Unicode (half of a surrogate pair).
    """
    _check_template(tokenizer, _template(tokenizer))
    return _encode(tokenizer, messages, generate=True)


@functools.lru_cache(maxsize=8)  # tokenizers are told apart by identity; a template put into one later is examined anew
def _check_template(tokenizer: Any, template: str) -> None:
    _end_of_prompt(tokenizer)


def encode_example(tokenizer: Any, messages: Sequence[Message], completion: str) -> tuple[list[int], int]:
    """Token ids of prompt + completion + end-of-turn token, and the prompt's length in tokens."""
    prompt = encode_prompt(tokenizer, messages)
    return [*prompt, *_encode_text(tokenizer, completion, _special_tokens(tokenizer)), end_of_turn(tokenizer)], len(
        prompt
    )


def end_of_turn(tokenizer: Any) -> int:
    """Id of the token that ends an assistant's turn in the chat template (often, but not always, the EOS token)."""
    return _end_of_turn(tokenizer, _template(tokenizer))


@functools.lru_cache(maxsize=8)
def _end_of_turn(tokenizer: Any, template: str) -> int:
    _, _, tail = _end_of_prompt(tokenizer)
    ids = tokenizer.encode(tail, add_special_tokens=False)
    special = next((i for i in ids if i in _special_tokens(tokenizer).values()), tokenizer.eos_token_id)
    if special is None:
        raise ConfigError(f"{_name(tokenizer)}: no special token ends the assistant's turn; set an EOS token")
    return int(special)


def _encode(tokenizer: Any, messages: Sequence[Message], generate: bool) -> list[int]:
    control = _control_tokens(tokenizer)
    for place, message in enumerate(messages):
        if _SURROGATE.search(message.content):
            raise RequestError(f"message {place}: a lone surrogate is no Unicode text; remove or replace it")
    quoted = sorted({c for c in control for m in messages if c in m.content}, key=len, reverse=True)
    if not quoted:
        text = _render(tokenizer, messages, generate)
        return _checked(tokenizer, _encode_raw(tokenizer, text), text, control)
    stand_ins = _stand_ins(quoted, "".join(m.content for m in messages))
    hidden = []
    for message in messages:
        content = message.content
        for token, stand_in in stand_ins.items():
            content = content.replace(token, stand_in)
        hidden.append(Message(message.role, content))
    originals = {stand_in: token for token, stand_in in stand_ins.items()}
    ids: list[int] = []
    text = _render(tokenizer, hidden, generate)
    for piece in re.split(f"([{''.join(originals)}])", text):
        ids += (
            _encode_text(tokenizer, originals[piece], control) if piece in originals else _encode_raw(tokenizer, piece)
        )
    return _checked(tokenizer, ids, text, control)


def _encode_text(tokenizer: Any, text: str, control: Mapping[str, int]) -> list[int]:
    """Ids of plain text; tokens of `control` in it are cut after their first character, so none is recognised."""
    ids: list[int] = []
    start = 0
    for match in re.finditer(f"(?={_any_of(control)})", text) if control else ():
        ids += _encode_raw(tokenizer, text[start : match.start() + 1])
        start = match.start() + 1
    return _checked(tokenizer, ids + _encode_raw(tokenizer, text[start:]), "", control)


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


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> dict[str, int]:
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _control_tokens(tokenizer: Any) -> dict[str, int]:
    """The special tokens, and those that are not called so but that the chat template writes (say, "<think>")."""
    return _tokens_of_template(tokenizer, _template(tokenizer))


@functools.lru_cache(maxsize=8)
def _tokens_of_template(tokenizer: Any, template: str) -> dict[str, int]:
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    written = {token: i for token, i in added.items() if token.strip() and token in template}
    return _special_tokens(tokenizer) | written


def _stand_ins(tokens: Sequence[str], text: str) -> dict[str, str]:
    free = (chr(c) for c in range(_FIRST_STAND_IN, _FIRST_STAND_IN + 0x2000) if chr(c) not in text)
    return dict(zip(tokens, free, strict=False))


def _render(tokenizer: Any, messages: Sequence[Message], generate: bool) -> str:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))
    except jinja2.TemplateError as error:
        roles = ", ".join(m.role for m in messages)
        raise RequestError(f"{_name(tokenizer)}: the chat template refuses turns ({roles}): {error}") from error


def _template(tokenizer: Any) -> str:
    """The chat template, "" for none; of several, the one that is rendered."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else str(tokenizer.get_chat_template())


def _end_of_prompt(tokenizer: Any) -> tuple[str, str, str]:
    """(prompt, what the template puts between prompt and answer, what it puts after the answer), for a short chat."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{_name(tokenizer)} has no chat template: put a chat_template.jinja into the model directory "
            "(base models have none; copy it from the instruction-tuned sibling)"
        )
    user, answer = Message("user", "a"), Message("assistant", _MARK)
    prompt = _render(tokenizer, [user], generate=True)
    head, found, tail = _render(tokenizer, [user, answer], generate=False).partition(_MARK)
    between = head.removeprefix(prompt)
    if not found or (between.strip() and prompt == _render(tokenizer, [user], generate=False)):
        raise ConfigError(
            f"{_name(tokenizer)}: the chat template ignores add_generation_prompt, so a prompt would not end where "
            f"the assistant starts; add `{{% if add_generation_prompt %}}{between}{{% endif %}}` at its end"
        )
    return prompt, between, tail


def _name(tokenizer: Any) -> str:
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
