"""Tokenising on all cores gives what one process gives, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_tokenizer, same

from spct_ray.cluster import tokenise
from spct_ray.errors import RequestError
from spct_ray.stages import rft


def row(text: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], "completion": text[:9]}


ROWS = [row(f"Name a prime number above {n}" + " and the weather" * (n % 5)) for n in range(60)]


@pytest.fixture
def model_dir(tmp_path: Path) -> str:
    make_tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=int(1e8), log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tasks_encode_what_one_process_does_and_raise_what_it_raises(
    model_dir: str, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [rft.encode(make_tiny_tokenizer(), one) for one in ROWS]
    alone = list(tokenise.encode_all(model_dir, rft.encode, ROWS))
    monkeypatch.setattr(tokenise, "_ALONE_SECONDS", 0.0)
    monkeypatch.setattr(tokenise, "_BLOCK", 7)
    in_tasks = list(tokenise.encode_all(model_dir, rft.encode, ROWS))
    for found in (alone, in_tasks):
        assert len(found) == len(expected)
        assert all(map(same, found, expected))
    with pytest.raises(RequestError, match="a lone surrogate"):
        list(tokenise.encode_all(model_dir, rft.encode, [*ROWS, row("\ud800")]))
