"""`FluidRouter`: which replica takes the next request.

The rule is that of `router.ranking`: where the request is predicted to end first. Reports of the replicas are up to a
second old, so the router's own count of what it sent and what ended corrects them. What a replica was sent before, by
whichever ingress, it probably holds in its prefix cache, and need not compute again: replicas tell all ingresses.
Replicas out of rotation (`router.rotation`) get nothing.
Composes with Serve's mixins: first in, first out; LoRA; locality.
When not to use it: where KV caches outlive what an engine holds, in other memory or other machines, since it knows only
what was sent to each replica (a router that reads vLLM's KV events, such as Ray's `KVAwareRouter`, knows all).
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from replicas.routing_stats import ReadReports
from router import rotation  # as a module: Serve pickles what this one holds by value, and a copy would know nothing
from router.asked import asked_of
from router.ranking import Asked, Sent, best_first

_UNKNOWN = Asked()


class FluidRouter(FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter):
    """Ranks replicas by when a request is predicted to end there."""

    def initialize_state(self, **_: Any) -> None:
        """Called by Serve when it makes the router."""
        self._sent: Sent[str] = Sent(time.monotonic, time.time)
        self._reports = ReadReports()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank per replica, so that a request skips a full replica and tries the next one."""
        if pending_request is not None and pending_request.metadata.multiplexed_model_id:
            ids = self.apply_multiplex_routing(pending_request=pending_request)
        else:
            ids = self.apply_locality_routing(pending_request=pending_request)
        candidates = [self.curr_replicas[replica_id] for replica_id in ids if replica_id in self.curr_replicas]
        request_id = pending_request.metadata.internal_request_id if pending_request is not None else ""
        offered = rotation.ROTATION.offered(candidates, _name, request_id)
        asked = _asked(pending_request)
        ranked = best_first(
            offered, lambda replica: self._reports.of(_name(replica), replica.routing_stats), _name, self._sent,
            asked, ongoing=self._ongoing, ingresses=rotation.ROTATION.ingresses,
        )
        if ranked and request_id:  # counted before it is sent: others of the same burst choose in between
            self._sent.sent(request_id, _name(ranked[0]), asked)
        return [[replica] for replica in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a replica has accepted a request."""
        request_id, replica = pending_request.metadata.internal_request_id, str(replica_id.unique_id)
        self._sent.accepted(request_id, replica)
        rotation.ROTATION.routed(request_id, replica, result.cancel)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request is over at a replica."""
        self._sent.ended(internal_request_id, str(replica_id.unique_id))

    def _ongoing(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when there are other replicas."""
        super().update_replicas(replicas)
        names = [_name(replica) for replica in replicas]
        self._sent.keep(names)
        self._reports.keep(names)

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """First in, first out, which may give the replica chosen for one request to another; while a request is tried
        elsewhere, each gets the replica that was chosen for it."""
        order = RequestRouter if rotation.ROTATION.tries_again else FIFOMixin
        order._fulfill_next_pending_request(self, replica, request_metadata)


def _name(replica: RunningReplica) -> str:
    return str(replica.replica_id.unique_id)


def _asked(pending_request: PendingRequest | None) -> Asked:
    body = pending_request.args[0] if pending_request is not None and pending_request.args else None
    return _UNKNOWN if body is None else asked_of(body)
