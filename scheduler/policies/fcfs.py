"""`fcfs`: first come, first served, as vLLM itself does.

Decides: every request enters at once, as long as the cap on running requests allows; none pauses.
Parameters: `max_running` (optional), `token_budget` (optional).
When not to use it: under memory pressure without a cap, where greedy admission ends in preemption and recompute.
"""

from __future__ import annotations

from scheduler.policies.base import Decision, Policy, Snapshot
from scheduler.thresholds import UNKNOWN_TYPE


class Fcfs(Policy):
    """vLLM's own order, with an optional cap on running requests."""

    name = "fcfs"

    def decide(self, snapshot: Snapshot) -> Decision:
        """Admit up to the cap."""
        slots = self.free_slots(snapshot)
        return Decision(admit={UNKNOWN_TYPE: slots}) if slots else Decision()
