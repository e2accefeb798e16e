"""Serves a judge on a cluster, as `spct serve` does, where only the working directory is shipped.

`ray job submit --working-dir . -- python jobs/serve.py RUN_OR_MODEL [--host ... --port ... --meta DIR]`. Or by Serve's
own tools, which then own the address: `serve run jobs.serve:build config=conf/serve.yaml resources.judge.num_gpus=1`.
"""

import sys
from typing import Any

from spct_ray.cli import main


def build(arguments: dict[str, str]) -> Any:
    """The Serve application of `config=`, a YAML file, a run's root or a model directory, and of overrides."""
    from spct_ray.serve.app import application
    from spct_ray.serve.deployment import resolve

    overrides = [f"{key}={value}" for key, value in arguments.items() if key != "config"]
    return application(resolve(arguments["config"], overrides))


if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
