"""A judge replica without a model, for tests of what stands around replicas: it thinks a moment, and says who it is."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future

import ray

from spct_ray.engines.scripted import ScriptedEngine
from spct_ray.serve.app import JudgeReplica
from spct_ray.serve.backends import LocalJudge

SECONDS = 0.2  # to think


class _ThinkingEngine(ScriptedEngine):
    def submit(self, request):
        future = Future()

        def answer():
            if future.set_running_or_notify_cancel():
                future.set_result(super(_ThinkingEngine, self).submit(request).result())

        threading.Timer(SECONDS, answer).start()
        return future


class ScriptedReplica(JudgeReplica):
    """Each judgement is a tie over the two orders, and names the process and the node that wrote it."""

    def __init__(self, config):
        name = f"{os.getpid()} {ray.get_runtime_context().get_node_id()}"
        LocalJudge.__init__(self, _ThinkingEngine(lambda request: [f"{name} Scores: \\boxed{{5, 6}}"]), config)
