"""An engine whose answers a function writes: no model is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock

from spct_ray.engines.base import Request
from spct_ray.errors import EngineError
from spct_ray.records import Completion


class ScriptedEngine:
    """Answers with `answer(request)`, one text a sample. Tokens are characters, each with log-probability -1.

    An answer that raises RequestError refuses that request. After `calls_to_live` requests the engine is dead, as a
    real one that lost its process: that request and all later calls raise EngineError.
    """

    def __init__(self, answer: Callable[[Request], Sequence[str]], calls_to_live: int | None = None) -> None:
        self.weight_version = 0
        self._answer = answer
        self._calls_left = calls_to_live
        self._closed = False
        self._lock = Lock()

    def submit(self, request: Request) -> Future[tuple[Completion, ...]]:
        with self._lock:
            self._live(1)
        future: Future[tuple[Completion, ...]] = Future()
        try:
            texts = self._answer(request)
        except Exception as error:  # a future carries whatever its work raised
            future.set_exception(error)
        else:
            future.set_result(tuple(self._completion(request, text) for text in texts))
        return future

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        return [self.submit(request).result() for request in requests]

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self._live(len(sequences))
        return [[-1.0] * (len(token_ids) - 1) for token_ids in sequences]

    def reload(self, weights_dir: str, weight_version: int) -> None:
        self._live(0)
        self.weight_version = weight_version

    def close(self) -> None:
        self._closed = True

    def _live(self, num_calls: int) -> None:
        if self._closed:
            raise EngineError("the scripted engine was closed")
        if self._calls_left is not None:
            self._calls_left -= num_calls
            if self._calls_left < 0:
                raise EngineError("the scripted engine has reached the end of its life")

    def _completion(self, request: Request, text: str) -> Completion:
        shown = text[: request.params.max_tokens]
        prompt_ids = tuple(ord(c) for message in request.messages for c in message.content)
        return Completion(
            text=shown,
            token_ids=tuple(map(ord, shown)),
            logprobs=(-1.0,) * len(shown) if request.params.logprobs else (),
            stop_reason="stop" if shown == text else "length",
            prompt_token_ids=prompt_ids,
            weight_version=self.weight_version,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(shown),
        )
