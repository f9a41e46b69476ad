"""The policies, one file each: which requests enter, pause or are rejected, decided from a snapshot; pure."""

from __future__ import annotations

from scheduler.policies.base import (
    NO_REQUESTS,
    Decision,
    Policy,
    QueueView,
    RunningBatch,
    RunningRequest,
    Snapshot,
    Waiting,
)
from scheduler.policies.fcfs import Fcfs
from scheduler.policies.fluid import Fluid
from scheduler.policies.nested_wait import NestedWait
from scheduler.policies.wait import Wait
from scheduler.policies.wait_cp import WaitCp
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds

_POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Fcfs, Wait, NestedWait, WaitCp, Fluid)}


def make_policy(thresholds: Thresholds) -> Policy:
    """The policy object for these thresholds."""
    return _POLICIES[thresholds.policy](thresholds)


__all__ = [
    "NO_REQUESTS",
    "UNKNOWN_TYPE",
    "Decision",
    "Policy",
    "QueueView",
    "RunningBatch",
    "RunningRequest",
    "Snapshot",
    "Waiting",
    "make_policy",
]
