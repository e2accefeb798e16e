"""A judge replica without a model, for tests of what stands around replicas: it thinks a moment, and says who it is."""

from __future__ import annotations

import os
import re
import threading
import time
from concurrent.futures import Future

from spct_ray.errors import EngineError
from spct_ray.serve.app import JudgeReplica
from spct_ray.serve.backends import LocalJudge
from tests.scripted_engine import ScriptedEngine

SECONDS = 0.2  # to think


class _ThinkingEngine(ScriptedEngine):
    """A query "wait for FILE" is thought about until there is that file; "die without FILE" makes it, and ends all."""

    def submit(self, request):
        fatal = re.search(r"die without (\S+)", request.messages[0].content)
        if fatal and not os.path.exists(fatal[1]):
            open(fatal[1], "w").close()
            self._calls_left = 0
        future, awaited = Future(), re.search(r"wait for (\S+)", request.messages[0].content)

        def answer():
            while awaited and not os.path.exists(awaited[1]):
                time.sleep(0.05)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(super(_ThinkingEngine, self).submit(request).result())
                except EngineError as error:
                    future.set_exception(error)

        threading.Timer(SECONDS, answer).start()
        return future


class ScriptedReplica(JudgeReplica):
    """Each judgement is a tie over the two orders, and names the process that wrote it."""

    def __init__(self, config):
        LocalJudge.__init__(self, _ThinkingEngine(lambda request: [f"{os.getpid()} Scores: \\boxed{{5, 6}}"]), config)


class WatchedReplica(JudgeReplica):
    """A real judge that tells how many requests its engine has not finished."""

    def __init__(self, config):
        super().__init__(config)
        self._futures = []
        submit = self._engine.submit

        def watched(request):
            self._futures.append(submit(request))
            return self._futures[-1]

        self._engine.submit = watched

    async def num_under_way(self):
        return sum(not future.done() for future in self._futures)
