"""Runs a job graph on a cluster: `ray job submit --working-dir . -- python jobs/pipeline.py CONFIG [key=value ...]`.

The same as `spct run`, for clusters where only the working directory is shipped. The root must be absolute there.
"""

import shlex
import sys

from spct_ray.cli import guarded, run

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python jobs/pipeline.py CONFIG [key=value ...]")
    command = shlex.join(["python", *sys.argv])
    sys.exit(guarded(lambda: run(sys.argv[1], sys.argv[2:], command), command))
