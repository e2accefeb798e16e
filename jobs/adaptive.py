"""What adaptive k (`"k": "auto"`) would have saved on the stored samples of a finished run, and how often it errs.

`python jobs/adaptive.py ROOT [--errors 0.01,0.05]`, with the root of a run or of an evaluation (`spct evaluate`). No
model is loaded and nothing is written; prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict

from spct_ray.cli import guarded
from spct_ray.errors import ConfigError
from spct_ray.stages.adaptive import savings


def main(root: str, errors: str) -> None:
    """Print the table and the JSON."""
    try:
        chosen = [float(error) for error in errors.split(",")]
    except ValueError as error:
        raise ConfigError(f"--errors {errors!r}: write numbers, e.g. --errors 0.01,0.05") from error
    print(f"{'judge, items, vote':34}{'error':>7}{'k max':>7}{'samples':>9}{'tokens':>9}{'equal decisions':>26}"
          f"{'accuracy':>10}{'of k max':>10}")  # fmt: skip
    found = []
    for saving in savings(root, chosen):
        low, high = (f"{share:.1%}" for share in saving.equal_ci)
        name = f"{saving.judge}, {saving.num_items} {saving.item_set}, {'meta' if saving.guided else 'plain'}"
        print(f"{name:34}{saving.error:>7g}{saving.k_max:>7}{saving.mean_k:>9.2f}{saving.share_of_tokens:>9.1%}"
              f"{f'{saving.equal:.1%} [{low}, {high}]':>26}{saving.accuracy:>10.3f}{saving.accuracy_k_max:>10.3f}",
              flush=True)  # fmt: skip
        found.append(asdict(saving))
    print(json.dumps({"root": root, "savings": found}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", metavar="ROOT", help="of a finished run, or of `spct evaluate`")
    parser.add_argument("--errors", default="0.01,0.05", help="share of decisions that may differ, by the rule's model")
    options = parser.parse_args()
    sys.exit(guarded(lambda: main(options.root, options.errors), shlex.join(["python", *sys.argv])))
