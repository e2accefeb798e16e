"""Runs a job graph on a cluster: `ray job submit --working-dir . -- python jobs/pipeline.py CONFIG [key=value ...]`.

The same as `spct run`, for clusters where only the working directory is shipped. The root must be absolute there.
"""

import sys

from spct_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
