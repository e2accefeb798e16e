"""A driver process for tests that kill it: samples 40 items with a judge that notes every task it is given."""

import os
import sys
import time
from functools import partial
from pathlib import Path

from spct_ray.cluster.sampling_resources import SamplingResources
from spct_ray.data.builtin import BuiltinConfig, generate
from spct_ray.data.program import ProgramConfig, ProgramJudge
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.stages.sample import SampleConfig, tasks_of


class NotingJudge:
    def __init__(self, out: str) -> None:
        self._file = Path(out) / f"calls-{os.getpid()}"
        self._program = ProgramJudge(ProgramConfig(), JudgeConfig(template="compact"))

    def judge(self, tasks):
        with self._file.open("a") as file:
            file.writelines(f"{t.item.id} {t.sample} {t.hinted}\n" for t in tasks)
        time.sleep(0.3)  # so that the test finds the run in its middle
        return self._program.judge(tasks)


if __name__ == "__main__":
    import ray

    from spct_ray.cluster.sampling import sample

    out = sys.argv[1]
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=300_000_000)
    train, _ = generate(BuiltinConfig(size_train=40, size_heldout=1), 1)
    tasks = [task for item in train for task in tasks_of(item, SampleConfig(), 5)]
    sample(tasks, partial(NotingJudge, out), out, SamplingResources(block_size=10), lambda *a: None)
    ray.shutdown()
