"""`FluidSlackRouter`: which replica takes the next request.

Picks the replica with the most fluid slack, the largest share of free slots (`RoutingStats`). Reports are up to a
second old, so the router's own count of ongoing requests corrects them. Replicas without a report come last, in random
order.
Replicas out of rotation (`router.rotation`) get nothing.
Composes with Serve's mixins: first in, first out; LoRA; locality.
When not to use it: when shared prompt prefixes matter more than balance (use Ray's prefix-aware router then).
"""

from __future__ import annotations

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

from replicas.routing_stats import RoutingStats
from router import rotation  # as a module: Serve pickles what this one holds by value, and a copy would know nothing
from router.ranking import best_first


class FluidSlackRouter(FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter):
    """Ranks replicas by fluid slack, best first."""

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
        offered = rotation.ROTATION.offered(candidates, lambda replica: str(replica.replica_id.unique_id), request_id)
        return [[replica] for replica in best_first(offered, self._stats, self._ongoing)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve when a replica has accepted a request."""
        rotation.ROTATION.routed(pending_request.metadata.internal_request_id, replica_id.unique_id, result.cancel)

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """First in, first out, which may give the replica chosen for one request to another; while a request is tried
        elsewhere, each gets the replica that was chosen for it."""
        order = RequestRouter if rotation.ROTATION.tries_again else FIFOMixin
        order._fulfill_next_pending_request(self, replica, request_metadata)

    def _stats(self, replica: RunningReplica) -> RoutingStats | None:
        return RoutingStats.from_dict(replica.routing_stats)

    def _ongoing(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
