"""What a GPU machine without a network needs for the checks, as archives: `python jobs/gpu_pack.py [GROUP...]`.

Such a machine has torch 2.11 (CUDA 13), transformers and what they need, on CPython 3.12 and x86-64; it takes 64 MiB of
files at a time. So each folder in .gpu-pack holds one archive below that: train for the trainer, vllm-a and vllm-b for
the last vLLM that was built for that torch (with all of train). There, `python3 jobs/gpu_pack.py --unpack /tmp/site
.gpu-pack/train` unpacks a part into a folder for PYTHONPATH; those of vLLM may come one after the other.
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACK = ROOT / ".gpu-pack"
TRAIN = [
    "deepspeed",
    "hjson",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-extensions",
    "typing-inspection",
    "liger-kernel",
    "omegaconf",
]
CONSTRAINED = ["--constraints", str(ROOT / "constraints.txt"), *TRAIN]
GROUPS = {"train": [CONSTRAINED], "vllm": [CONSTRAINED, ["-r", str(ROOT / "jobs" / "gpu_pack_vllm.txt")]]}
LARGEST = "vllm/_C_stable_libtorch.abi3.so"  # a part of its own
# What no check loads. vLLM does without FlashAttention 2 where there is 3, and without kernels for mixtures of experts.
LEFT_OUT = [
    "bin/*",
    "*/__pycache__/*",
    "*.pyc",
    "*/RECORD",
    "*/tests/*",
    "deepspeed/ops/csrc/*",
    "vllm/vllm-rs",
    "vllm/*_fa2_C.*",
    "vllm/_moe_C*",
    "vllm/_flashmla*",
    "vllm/_qutlass*",
    "vllm/third_party/fmha_sm100/*",
    "vllm/third_party/deep_gemm/*",
    "*/static/*",
    "pycountry/locales/*",
    "mistral_common/data/*",
    "tvm_ffi/include/*",
]


def pack(group: str) -> list[Path]:
    """Install the group's packages for the other machine and archive them; the archives."""
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        uv = str(Path(sys.executable).parent / "uv")
        install = [uv, "pip", "install", "--quiet", "--no-deps", "--target", folder]
        install += ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_31"]
        for packages in GROUPS[group]:
            subprocess.run([*install, *packages], check=True)
        names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file())
        names = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT)]
        if LARGEST not in names:
            return [_archive(group, site, names)]
        names.remove(LARGEST)
        return [_archive(f"{group}-a", site, [LARGEST]), _archive(f"{group}-b", site, names)]


def _archive(part: str, site: Path, names: list[str]) -> Path:
    shutil.rmtree(PACK / part, ignore_errors=True)
    (PACK / part).mkdir(parents=True)
    archive = PACK / part / "site.tar.xz"
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for name in names:
            tar.add(site / name, name)
    return archive


def unpack(site: Path, parts: list[Path]) -> None:
    for part in parts:
        started = time.monotonic()
        with tarfile.open(part / "site.tar.xz") as tar:
            tar.extractall(site, filter="data")
        print(f"{part} -> {site}: {time.monotonic() - started:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all where none is named")
    parser.add_argument("--unpack", nargs="+", type=Path, metavar=("SITE", "FOLDER"))
    args = parser.parse_args()
    if args.unpack:
        unpack(args.unpack[0], args.unpack[1:])
        return
    if unknown := set(args.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    for group in args.groups or GROUPS:
        for archive in pack(group):
            print(f"{archive.relative_to(ROOT)}: {archive.stat().st_size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
