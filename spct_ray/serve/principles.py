"""Principles written once for each query and kept: for all samples of a verdict, and for later requests.

They come from the query alone, so they are the same for every answer to it. Leaves out the prompt (judge/prompt.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from spct_ray.judge.parse import Failure
from spct_ray.judge.prompt import JudgeConfig, read_principles
from spct_ray.records import Completion, Message
from spct_ray.serve.backends import JudgeBackend
from spct_ray.serve.schema import PrinciplesSource


@dataclass(frozen=True)
class Principles:
    """What the judge is shown as principles, where it came from, and the tokens it cost now (none for a cached one)."""

    text: str
    source: PrinciplesSource
    prompt_tokens: int = 0
    completion_tokens: int = 0


class PrinciplesCache:
    """The judge's texts on the `size` queries used last. What an older version of the judge wrote is no hit."""

    def __init__(self, judge: JudgeBackend, config: JudgeConfig, size: int, timeout_s: float) -> None:
        self._judge, self._config, self._size, self._timeout_s = judge, config, size, timeout_s
        self._texts: OrderedDict[bytes, asyncio.Task[Completion]] = OrderedDict()  # the one used last is the last
        self._newest_version = 0

    async def of(self, messages: Sequence[Message]) -> Principles:
        """Principles for a conversation.

        Requests that come together wait for one text, which goes on when one of them is cancelled. Raises as the judge,
        TimeoutError, and then asks anew next time; a text without principles is kept, for it would come out the same.
        """
        key = hashlib.sha256(json.dumps([(m.role, m.content) for m in messages]).encode()).digest()
        work = self._texts.get(key)
        is_hit = work is not None and self._is_usable(work)
        if work is None or not is_hit:
            work = self._texts[key] = asyncio.create_task(self._write(tuple(messages)))
        self._texts.move_to_end(key)
        if len(self._texts) > self._size:
            self._texts.popitem(last=False)
        written = await asyncio.shield(work)
        read = read_principles(written.text, written.stop_reason, self._config)
        text = "" if isinstance(read, Failure) else read
        source: PrinciplesSource = "failed" if not text else "cached" if is_hit else "generated"
        tokens = (0, 0) if is_hit else (written.prompt_tokens, written.completion_tokens)
        return Principles(text, source, *tokens)

    def saw_version(self, weight_version: int) -> None:
        """A judgement came from this version of the judge."""
        self._newest_version = max(self._newest_version, weight_version)

    def _is_usable(self, work: asyncio.Task[Completion]) -> bool:
        if not work.done():
            return True
        has_failed = work.cancelled() or work.exception() is not None
        return not has_failed and work.result().weight_version >= self._newest_version

    async def _write(self, messages: tuple[Message, ...]) -> Completion:
        async with asyncio.timeout(self._timeout_s):
            return await self._judge.principles(messages)
