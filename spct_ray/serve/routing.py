"""Routes a call to the judge replica that judged the same item last, because its cache holds the prompt.

A call carries all samples of one round. The rounds of an adaptive k, a client's retries and repeated requests are
separate calls. Serve's default router (the shorter of two queues) would spread them over the replicas, and its
experimental consistent hashing would stay with a replica however long its queue is.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

MAX_ITEMS = 4096  # with a known replica; the least recent one is forgotten
MAX_LEAD = 4  # calls by which the queue of the item's replica may exceed the shortest before another is chosen


class ItemRouter(RequestRouter):  # type: ignore[misc]
    """Sends calls with the same `handle.options(session_id=...)`, the item, to one replica while it lives and is not
    much busier than others. First calls, and calls without it, go to the shorter of two random queues."""

    def initialize_state(self) -> None:
        """Called by Serve."""
        self._homes: OrderedDict[str, ReplicaID] = OrderedDict()  # least recent first

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas in order of preference; within a group, Serve picks the shortest queue."""
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [two]
        pending_request.routing_context.should_backoff = True  # when none of them has room
        home_id = self._homes.get(pending_request.metadata.session_id)
        home = next((replica for replica in candidate_replicas if replica.replica_id == home_id), None)
        if home is None or self._queue(home) > min(map(self._queue, candidate_replicas)) + MAX_LEAD:
            return [two]
        return [[home], two]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve: the replica has the call."""
        if item := pending_request.metadata.session_id:
            self._homes[item] = replica_id
            self._homes.move_to_end(item)
            if len(self._homes) > MAX_ITEMS:
                self._homes.popitem(last=False)

    def _queue(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
