"""The controller's next message to a replica: new thresholds, a renewal, or nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scheduler.messages import Telemetry
from scheduler.thresholds import Thresholds
from scheduler.tuning.difference import materially_different
from scheduler.tuning.replica_model import Proposal


@dataclass(frozen=True, slots=True)
class NextPush:
    """The thresholds to send (None: nothing) and the reason in words. changed: a new rule, not a renewal."""

    thresholds: Thresholds | None
    reason: str
    changed: bool = False


def next_push(telemetry: Telemetry, proposal: Proposal, *, pushed_s_ago: float, validity_s: float) -> NextPush:
    """The next push, from a report and the proposal made of it; no clock, no side effects.

    Pinned thresholds are left alone. A proposal that differs by more than noise is sent under the next version. Else
    thresholds that would lapse are renewed unchanged, without the noise of the estimates, when half their validity is
    over since the latest push (`pushed_s_ago`, infinite: none yet).
    """
    active = telemetry.thresholds
    if active.pinned:
        return NextPush(None, f"pinned by an operator at version {active.version}")
    if materially_different(proposal.thresholds, active):
        wanted = replace(proposal.thresholds, reason=proposal.reason)
        return NextPush(wanted.with_version(active.version + 1), proposal.reason, changed=True)
    may_lapse = not telemetry.from_config and proposal.thresholds.valid_for_s is not None
    if may_lapse and pushed_s_ago > validity_s / 2:
        renewed = replace(active, valid_for_s=validity_s)
        return NextPush(renewed.with_version(active.version + 1), active.reason)
    return NextPush(None, "settled" if proposal.equilibrium else proposal.reason)
