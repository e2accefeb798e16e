"""An engine behind an OpenAI-compatible HTTP endpoint, without what such an endpoint does not tell or do: token ids,
log-probabilities, guides, new weights."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any, NoReturn

import httpx

from spct_ray.engines.base import Request
from spct_ray.errors import ConfigError, EngineError, RequestError, TooLongError
from spct_ray.records import Completion, StopReason

_WORTH_ANOTHER_TRY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_STOP_REASONS: dict[str, StopReason] = {"stop": "stop", "length": "length"}
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """Where the endpoint is. The API key itself stays out of configs: `api_key_env` names the variable holding it."""

    base_url: str  # up to and with the version, e.g. "https://api.example.com/v1"
    model: str
    api_key_env: str = ""  # empty: no key is sent
    concurrency: int = 16  # requests in flight
    timeout_s: float = 300.0  # of one attempt
    max_attempts: int = 6
    first_wait_s: float = 1.0  # doubled after each attempt, unless the endpoint says how long to wait


class RemoteEngine:
    """`POST {base_url}/chat/completions`. Busy, failing and slow answers are tried again, then raise EngineError.

    A thought that the endpoint tells apart from the answer is put before it as `<think>...</think>`. Ids are empty on
    its completions. RequestError for n > 1, as an endpoint counts the tokens of all samples together.
    """

    weight_version = 0

    def __init__(self, config: RemoteConfig) -> None:
        headers, self._key = {}, ""
        if config.api_key_env:
            if not (key := os.environ.get(config.api_key_env)):
                raise ConfigError(f"the environment variable {config.api_key_env} (api_key_env) is not set")
            headers["Authorization"], self._key = f"Bearer {key}", key
        self._config = config
        self._url = f"{config.base_url.rstrip('/')}/chat/completions"
        limits = httpx.Limits(max_connections=config.concurrency)
        self._client = httpx.Client(headers=headers, timeout=config.timeout_s, limits=limits)
        self._threads = ThreadPoolExecutor(config.concurrency, thread_name_prefix="remote-engine")
        self._closed = Event()

    def submit(self, request: Request) -> Future[tuple[Completion, ...]]:
        if self._closed.is_set():
            raise EngineError(f"the engine on {self._url} was closed")
        return self._threads.submit(self._complete, request)

    def generate(self, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
        futures = [self.submit(request) for request in requests]
        return [future.result() for future in futures]

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> NoReturn:
        raise RequestError("prompt_logprobs is not supported by a remote endpoint")

    def reload(self, weights_dir: str, weight_version: int) -> NoReturn:
        raise RequestError("reload is not supported by a remote endpoint: its weights are its own")

    def close(self) -> None:
        self._closed.set()
        self._threads.shutdown()
        self._client.close()

    def _complete(self, request: Request) -> tuple[Completion, ...]:
        params = request.params
        if params.guide or params.logprobs or params.n > 1:
            raise RequestError("a guide, log-probabilities and n > 1 are not supported by a remote endpoint")
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
        }
        if params.seed is not None:
            body["seed"] = params.seed
        answer = self._post(body)
        try:
            (choice,), usage = answer["choices"], answer["usage"]
            text, stop = _text(choice["message"]), _STOP_REASONS.get(choice["finish_reason"], "abort")
            num_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self._url}: not an answer of the chat completions API: {error!r}") from error
        return (Completion(text, (), (), stop, (), self.weight_version, *num_tokens),)

    def _post(self, body: dict[str, Any]) -> Any:
        """The endpoint's JSON answer; RequestError when it refuses the request, EngineError when it cannot work."""
        config, last = self._config, ""
        for attempt in range(config.max_attempts):
            wait_s = min(config.first_wait_s * 2**attempt * random.uniform(0.5, 1.0), _LONGEST_WAIT_S)
            if self._closed.is_set():
                raise EngineError(f"the engine on {self._url} was closed")
            try:
                response = self._client.post(self._url, json=body)
            except httpx.TransportError as error:  # no connection, or no answer within the timeout
                last = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return self._json(response)
                last = f"HTTP {response.status_code}: {self._shown(response.text)}"
                if response.status_code in (401, 403, 404):
                    raise EngineError(f"{self._url}, model {config.model}: {last}; check base_url, model, api_key_env")
                if response.status_code not in _WORTH_ANOTHER_TRY:
                    too_long = re.search(r"context[ _](length|window)", response.text, re.IGNORECASE)
                    kind = TooLongError if too_long else RequestError  # there is no code for it that all agree on
                    raise kind(f"{self._url} refuses the request: {last}")
                wait_s = _retry_after(response, wait_s)
            if attempt + 1 < config.max_attempts:
                self._closed.wait(wait_s)
        raise EngineError(f"{self._url}: no answer after {config.max_attempts} attempts, the last: {last}")

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise EngineError(f"{self._url}: the answer is not JSON: {self._shown(response.text)}") from error

    def _shown(self, text: str) -> str:
        """The beginning of what the endpoint said; some quote the key that they were sent."""
        return (text.replace(self._key, "***") if self._key else text)[:300]


def _text(message: Mapping[str, Any]) -> str:
    """The answer, after the thought where there is one under a name of its own."""
    thought, answer = message.get("reasoning_content") or message.get("reasoning") or "", message["content"] or ""
    if not thought:
        return answer
    return f"<think>{thought}</think>\n{answer}" if answer else f"<think>{thought}"


def _retry_after(response: httpx.Response, default_s: float) -> float:
    """Seconds to wait: the Retry-After header (seconds or a date) up to a minute, else the default."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return default_s
    return min(max(seconds, 0.0), _LONGEST_WAIT_S)
