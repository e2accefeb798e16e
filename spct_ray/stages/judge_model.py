"""A finished model directory as a step of a graph: a link, whose identity is what the model's files hold."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spct_ray.data.sources import SourceConfig, with_content
from spct_ray.errors import ConfigError
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext


@dataclass(frozen=True)
class JudgeModelConfig:
    """`content` is `digest` of the directory: the same model at another place is the same step."""

    content: str


@dataclass(frozen=True)
class JudgeModelResources:
    """Where the model lies; every node must see it there."""

    path: str


@stage(version=1)
def run(context: StepContext, config: JudgeModelConfig, resources: JudgeModelResources) -> dict[str, Any]:
    """Link model/. Raises ConfigError when the directory no longer holds what the configuration says."""
    if digest(resources.path) != config.content:
        raise ConfigError(f"{resources.path} changed since the command began; start it again")
    link = Path(context.out) / "model"
    link.unlink(missing_ok=True)
    os.symlink(os.path.abspath(resources.path), link)
    return {"model": os.path.abspath(resources.path)}


def digest(directory: str) -> str:
    """Hash of a model directory's weights, configuration and tokenizer."""
    found = hashlib.blake2b(digest_size=16)
    for pattern in ("*.safetensors", "*.json", "*.jinja", "*.model"):
        for file in sorted(Path(directory).glob(pattern)):
            found.update(f"{file.name}:{with_content(SourceConfig('', str(file))).content};".encode())
    return found.hexdigest()


def check(directory: str, needs_template: bool = True) -> None:
    """Raise ConfigError unless the directory holds safetensors and, for a judge, a chat template."""
    path = Path(directory)
    if not list(path.glob("*.safetensors")):
        raise ConfigError(f"{directory}: no *.safetensors in it; other weight formats are not read")
    settings = path / "tokenizer_config.json"
    inside = settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    if needs_template and not inside and not (path / "chat_template.jinja").is_file():
        raise ConfigError(
            f"{directory}: the tokenizer has no chat template, so no prompt can be made. Copy chat_template.jinja (or "
            "the tokenizer files) of its instruction-tuned sibling into the directory"
        )
