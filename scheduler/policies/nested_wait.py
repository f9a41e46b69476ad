"""`nested_wait`: Nested WAIT, for requests whose output length is unknown (arXiv 2504.11320, Algorithm 2).

Decides: requests enter in groups of n_1; requests whose output continues past a boundary wait there for a group of n_k.
In `strict` mode a segment runs only when its queue is full and all earlier segments run. In `serving` mode requests
wait only for admission and at boundaries, each time at most `max_hold_s`; requests inside a segment always run, and an
idle engine admits what is waiting.
n_k may be less than one request per stage: a segment's total is then spread over its iterations (`rotation.py`).
Parameters: `segments` (boundary and total each), `max_running`, `max_hold_s`.
When not to use it: without memory pressure, where holding a long output at a boundary only delays it.
"""

from __future__ import annotations

from scheduler.policies.base import Decision, Policy, Snapshot
from scheduler.policies.segments import Segments
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds


class NestedWait(Policy):
    """Admission in groups of n_1, and boundary queues of n_k."""

    name = "nested_wait"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._segments = Segments(thresholds)

    def decide(self, snapshot: Snapshot) -> Decision:
        """Admit when n_1 requests wait (or, in serving mode, when a hold is over), and hold at boundaries."""
        if self.strict:
            admitted, sit_out = self._segments.decide_strictly(snapshot)
            admitted = min(admitted, self.free_slots(snapshot))
            return Decision(
                {UNKNOWN_TYPE: admitted} if admitted else {}, sit_out,
                evict_first=self._segments.at_boundary(snapshot, sit_out),
            )
        view, slots = snapshot.waiting.get(UNKNOWN_TYPE), self.free_slots(snapshot)
        at_once = view is not None and (snapshot.idle or self.hold_is_over(view, snapshot))
        entering = self._segments.entering(view.length if view else 0, slots, at_once=at_once)
        admit = {UNKNOWN_TYPE: entering} if entering else {}
        return Decision(admit, self._segments.sit_out(snapshot, entering=bool(admit)))
