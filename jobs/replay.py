"""Feeds the rollouts that a GRPO run dumped through its trainer again: `python jobs/replay.py CONFIG [key=value ...]`.

The arguments are those of the run, made with resources.grpo.dump_rollouts=true. No engine and no cluster is started and
nothing is written; prints loss, KL and gradient norm of each step beside what the run logged.
"""

import shlex
import sys
from collections.abc import Sequence

from spct_ray.cli import guarded, load_graph
from spct_ray.graph.fingerprint import step_ids
from spct_ray.graph.record import step_directory
from spct_ray.graph.step import StepContext
from spct_ray.stages.replay import NAMES, replay


def main(config_path: str, overrides: Sequence[str], command: str) -> None:
    """Replay the step "grpo" of the run that the arguments stand for."""
    recipe, steps, root = load_graph(config_path, overrides)
    ids = step_ids(steps, recipe.seed)
    directories = {step.name: step_directory(root, step.name, ids[step.name]) for step in steps}
    (grpo,) = (step for step in steps if step.name == "grpo")
    inputs = {role: directories[source] for role, source in grpo.inputs.items()}
    context = StepContext("grpo", recipe.seed, directories["grpo"], inputs, command)
    print("step" + "".join(f"{name:>14}{'logged':>14}" for name in NAMES))
    largest = 0.0
    for line in replay(context, grpo.config, grpo.resources):
        cells = ""
        for name in NAMES:
            now, then = line.replayed.get(name), line.logged.get(name)
            cells += "".join(f"{'-' if value is None else f'{value:.6g}':>14}" for value in (now, then))
            if now is not None and then is not None:
                largest = max(largest, abs(now - then))
        print(f"{line.step:4}{cells}", flush=True)
    print(f"largest difference {largest:.3g}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python jobs/replay.py CONFIG [key=value ...]")
    command = shlex.join(["python", *sys.argv])
    sys.exit(guarded(lambda: main(sys.argv[1], sys.argv[2:], command), command))
