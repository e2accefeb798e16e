"""A small synchronous client of `POST /v1/judge`. Leaves out retries and asynchronous calls."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import httpx

from spct_ray.errors import SpctError
from spct_ray.records import Message
from spct_ray.serve.schema import JudgeAnswer


class ServerError(SpctError):
    """The server refused or failed: HTTP status, the error's type and the message that it sent."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(f"HTTP {status} ({kind}): {message}")
        self.status = status
        self.kind = kind


class JudgeClient:
    """`with JudgeClient("http://127.0.0.1:8000") as client: client.judge(messages, responses, k=8).winner`."""

    def __init__(self, base_url: str, timeout_s: float = 150.0) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s)

    def judge(
        self,
        messages: Sequence[Message],
        responses: Sequence[str],
        *,
        k: int = 8,
        k_meta: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        reference: str = "",
    ) -> JudgeAnswer:
        """The verdict. Raises ServerError for any status but 200, httpx.TransportError when no server answers."""
        request = {
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "responses": list(responses),
            "k": k,
            "k_meta": k_meta,
            "temperature": temperature,
            "seed": seed,
            "reference": reference,
        }
        reply = self._http.post("/v1/judge", json=request)
        if reply.status_code == 200:
            return JudgeAnswer.model_validate_json(reply.content)
        if reply.headers.get("content-type", "").startswith("application/json"):
            error = reply.json()["error"]
            raise ServerError(reply.status_code, error["type"], error["message"])
        raise ServerError(reply.status_code, "http", reply.text)  # from Serve's proxy, before our gateway

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
