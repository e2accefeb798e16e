"""Which judge replica gets a call: the one that judged the same item last, whose cache holds the prompt.

A call carries all samples of one round. Rounds of an adaptive k, retries of a client and requests that repeat an item
are several calls; Serve's own choice (the shorter of two queues) would spread them over the replicas.
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
        home = self._replicas.get(self._homes.get(pending_request.metadata.session_id))
        if home is None or self._queue(home) > min(map(self._queue, candidate_replicas)) + MAX_LEAD:
            return [two]
        return [[home], two]

    def _queue(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Serve finds the waiting call by a number that all calls of one HTTP request share; here its item tells."""
        item = request_metadata.session_id
        waiting = (p for p in self._pending_requests_to_fulfill if p.metadata.session_id == item)
        pending = next((p for p in waiting if not p.future.done()), None)
        if pending is None:
            return
        if item:
            self._homes[item] = replica.replica_id
            self._homes.move_to_end(item)
            if len(self._homes) > MAX_ITEMS:
                self._homes.popitem(last=False)
        self._cancel_routing_task_for_pending_request(pending)
        self._record_queue_wait_time(pending)
        pending.future.set_result(replica)
        self._remove_pending_request_from_indices(pending)
