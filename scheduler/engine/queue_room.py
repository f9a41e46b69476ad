"""How many more requests an engine's admission queue takes before it rejects one, and what the next one has to expect,
as `Stats` publish them.

The engine's thread keeps the latest decision, which costs nothing; the channel's thread computes both when asked.
"""

from __future__ import annotations

from scheduler.messages import Outlook, Room
from scheduler.policies import Decision
from scheduler.thresholds import EngineLimits, Thresholds


class QueueRoom:
    """The room after the latest decision, less the requests that have arrived since."""

    def __init__(self) -> None:
        self._latest: tuple[Decision, int] = (Decision(), 0)

    def decided(self, decision: Decision, arrivals: int) -> None:
        """A decision was made over all requests that had arrived by then, `arrivals` in total."""
        self._latest = (decision, arrivals)

    def now(self, thresholds: Thresholds, limits: EngineLimits, arrivals: int, *, is_idle: bool) -> Room:
        """The room; safe from another thread. `arrivals`: in total by now.

        An engine without requests makes no decisions, so its latest one is of a busier time: it has room in every slot.
        """
        decision, decided_over = self._latest
        drain_rps = thresholds.fluid.capacity_rps if thresholds.fluid else 0.0
        if decision.room is None:
            return Room(None, drain_rps)
        room = decision.room() - (arrivals - decided_over)
        if is_idle:
            return Room(max(room, thresholds.max_running or limits.slots), drain_rps)
        return Room(max(0, room), drain_rps, decision.drain_s)

    def outlook(self, arrivals: int, *, is_idle: bool) -> Outlook | None:
        """What the next request has to expect; safe from another thread. An engine without requests lets none wait."""
        decision, decided_over = self._latest
        if decision.outlook is None:
            return None
        return decision.outlook(max(0, arrivals - decided_over), is_idle)
