"""Which judge replica gets a call: the one that judged the same item last, because its cache holds the prompt.

A call carries all samples of one round. Rounds of an adaptive k, retries of a client and requests that repeat an item
are several calls; Serve's own choice (the shorter of two queues) would spread them over the replicas, and its
experimental consistent hash would stay with a replica however long its queue is.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

MAX_ITEMS = 4096  # whose replica is remembered
MAX_LEAD = 4  # calls that the item's replica may have more than the least busy one, before another is taken


class ItemRouter(RequestRouter):  # type: ignore[misc]
    """Calls with the same `handle.options(session_id=...)`, the item, go to one replica while it lives and is not much
    busier than others. First calls, and calls without it, go to the shorter of two queues drawn at random."""

    def initialize_state(self) -> None:
        """Called by Serve."""
        self._homes: OrderedDict[str, ReplicaID] = OrderedDict()  # the one used last is the last

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, the best first; of a group Serve takes the one with the shortest queue."""
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
