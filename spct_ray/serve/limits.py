"""Rate limits: a token bucket of judgements for each client. Leaves out who a client is, and HTTP (routes.py)."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from spct_ray.errors import SpctError

MAX_CLIENTS = 10_000  # buckets kept; beyond, those that were not used for longest are forgotten, which fills them


class RateLimited(SpctError):
    """A client asks too fast. After `retry_after_s` whole seconds it may ask again."""

    def __init__(self, judgements_per_minute: int, retry_after_s: int) -> None:
        super().__init__(
            f"you ask for more than {judgements_per_minute} judgements a minute (k for each prompt); "
            f"wait {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Bucket:
    judgements: float
    filled_at: float


class RateLimiter:
    """`judgements_per_minute` for each client, a minute's worth of them at once; 0 is no limit.

    Judgements are what costs: a request may ask for one, a batch for thousands. A request is let through when there is
    one judgement in its client's bucket, and then takes all it asks for: the bucket may owe, so that a large request
    waits no longer than a small one, and what follows it waits the longer.
    """

    def __init__(self, judgements_per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = judgements_per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()  # the one used last is the last

    def take(self, client: str, judgements: int) -> None:
        """Take them from the client's bucket. Raises RateLimited, and takes none, when the bucket is empty."""
        if not self._per_minute:
            return
        now = self._clock()
        bucket = self._buckets.setdefault(client, _Bucket(self._per_minute, now))
        self._buckets.move_to_end(client)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        gained = (now - bucket.filled_at) * self._per_minute / 60
        bucket.judgements, bucket.filled_at = min(bucket.judgements + gained, self._per_minute), now
        if bucket.judgements < 1 - 1e-6:  # who waits as told must not fail by rounding
            raise RateLimited(self._per_minute, math.ceil((1 - bucket.judgements) * 60 / self._per_minute))
        bucket.judgements -= judgements
