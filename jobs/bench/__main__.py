"""Measures the product, one bench at a time: `python -m jobs.bench train`, `trl`, `serve`, `load` or `principles`.

Each prints a table and, as its last line, one JSON object. What a bench measures is said in the module of its name.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys

from spct_ray.cli import guarded

BENCHES = {
    "train": "GRPO and SFT updates and log-probs against plain transformers",
    "trl": "GRPO end to end and SFT against TRL's own trainers (pip install 'spct-ray[bench]')",
    "serve": "the voting service against the same engine driven directly",
    "load": "the voting service under twice the load it can bear, with its judge killed once",
    "principles": "what principles cost and do, for a trained judge",
}


def main() -> int:
    """Parse the arguments and run one bench; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description="Measures the product.")
    commands = parser.add_subparsers(required=True, metavar="BENCH", dest="bench")
    for name, words in BENCHES.items():
        commands.add_parser(name, help=words, add_help=False)
    name = parser.parse_args(sys.argv[1:2]).bench
    bench = importlib.import_module(f"jobs.bench.{name}")
    options_parser = argparse.ArgumentParser(
        prog=f"python -m jobs.bench {name}", description=bench.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    bench.add_arguments(options_parser)
    options = options_parser.parse_args(sys.argv[2:])
    return guarded(lambda: bench.run(options), shlex.join(["python", "-m", "jobs.bench", *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
