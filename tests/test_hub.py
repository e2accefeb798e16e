"""Benchmarks by their hub ids, through the real client library, from a hub on loopback."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT = "a" * 40
ROW = {"prompt": "Q?", "chosen": "good", "rejected": "bad", "chosen_model": "m", "rejected_model": "m"}
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: raw, path: data/raw-*}
  - {split: filtered, path: data/filtered-*}
---
"""
# As in the data set's own repository: the split that counts is the second one, and ids are numbers.
ROWS = {
    "raw": [ROW | {"id": i, "subset": "hep-go"} for i in range(5)],
    "filtered": [ROW | {"id": i, "subset": s} for i, s in enumerate(("hep-go", "math-prm"))],
}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


FILES = {"README.md": CARD.encode()} | {
    f"data/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in ROWS.items()
}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that reading one public data set takes: what it is, its tree, its files."""

    repository = "allenai/reward-bench"
    asked: ClassVar[list[str]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        about, files = f"api/datasets/{self.repository}", f"datasets/{self.repository}/resolve/"
        self.asked.append(path)
        if path == about or path.startswith(f"{about}/revision/"):
            known = {"id": self.repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self.answer(json.dumps(known).encode())
        elif path.startswith(f"{about}/tree/"):
            self.answer(json.dumps(self.tree(path.removeprefix(f"{about}/tree/").partition("/")[2])).encode())
        elif path.startswith(files) and (name := path.removeprefix(files).partition("/")[2]) in FILES:
            digest = hashlib.sha1(FILES[name]).hexdigest()
            self.answer(FILES[name], ETag=f'"{digest}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound" if path.startswith(files) else "RepoNotFound")

    do_HEAD = do_GET

    def tree(self, folder: str) -> list[dict[str, Any]]:
        inside = {name.removeprefix(f"{folder}/"): len(FILES[name]) for name in FILES if name.startswith(folder)}
        top = {name.partition("/")[0]: ("directory" if "/" in name else "file", size) for name, size in inside.items()}
        return [
            {"type": kind, "path": f"{folder}/{name}".strip("/"), "size": size, "oid": COMMIT}
            for name, (kind, size) in top.items()
        ]


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


READ = """
import json
from spct_ray.evaluation.benchmarks import parse_spec, read_benchmark
from spct_ray.data.sources import SourceConfig, read_source, rows
from spct_ray.data.validate import Limits
from spct_ray.errors import DataError

items, dropped = read_benchmark(parse_spec("rewardbench"), Limits(), None, 0)
found = {"items": [[i.id, i.subset, *i.responses] for i in items], "dropped": dropped.counts}
raw = SourceConfig("s", "allenai/reward-bench", "hub", split="raw", revision="v9")
found["training"] = [item.id for item in read_source(raw, Limits())[0]]
for name, source in {
    "split": SourceConfig("s", "allenai/reward-bench", "hub", split="test"),
    "repository": SourceConfig("s", "allenai/reward-bnch", "hub"),
}.items():
    try:
        list(rows(source))
    except DataError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow  # importing datasets takes seconds
def test_a_benchmark_is_read_by_its_hub_id(hub: str, tmp_path: Path) -> None:
    # A process of its own, for the library reads its settings when it is imported.
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, "-c", READ], env=os.environ | settings, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["items"] == [
        ["rewardbench:0", "hep-go", "good", "bad"], ["rewardbench:1", "math-prm", "good", "bad"],
    ]  # fmt: skip
    assert found["dropped"] == {}
    assert len(found["training"]) == 5
    assert any("/resolve/v9/" in path for path in Hub.asked)
    assert "'allenai/reward-bench'" in found["split"]
    assert "split 'test'" in found["split"]
    assert "'allenai/reward-bnch'" in found["repository"]
    assert "that the hub can be reached" in found["repository"]
