"""`nested_wait`: Nested WAIT, for requests whose output length is unknown (arXiv 2504.11320, Algorithm 2).

Decides: requests enter in groups of n_1, and those whose answer goes on past an output-length boundary gather there
until n_k of them do. In `strict` mode a segment runs only when its queue is full and all earlier segments run. In
`serving` mode only admission and the step over a boundary wait, each at most `max_hold_s`; requests inside a segment
always run, and an idle engine takes whatever is there.
Parameters: `segments` (boundary and n_k each), `max_in_service`, `max_hold_s`.
When not to use it: away from memory pressure, where holding a long answer at a boundary only makes it later.
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
        """Open the entry when n_1 wait (or, in serving mode, one has waited long enough), and hold at boundaries."""
        if self.strict:
            admitted, sit_out = self._segments.decide_strictly(snapshot)
            admitted = min(admitted, self.seats(snapshot))
            return Decision(
                {UNKNOWN_TYPE: admitted} if admitted else {}, sit_out,
                evict_first=self._segments.at_boundary(snapshot, sit_out),
            )
        admit: dict[str, int] = {}
        view, seats = snapshot.waiting.get(UNKNOWN_TYPE), self.seats(snapshot)
        if view and seats:
            n = self._segments.entry_n
            full = n is None or min(view.length, seats) >= n
            if full or snapshot.idle or self.hold_is_over(view, snapshot):
                admit[UNKNOWN_TYPE] = min(n or view.length, view.length, seats)
        return Decision(admit, self._segments.sit_out(snapshot, entering=bool(admit)))
