"""What the controller sends after a look at a replica: new thresholds, a renewal, or nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from synthetic_engine import LIMITS

from scheduler.messages import Counters, Gauges, Telemetry
from scheduler.model.fluid import FluidEquilibrium, solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.workload import Lengths, WorkloadMix
from scheduler.thresholds import SegmentThreshold, Thresholds
from scheduler.tuning.next_push import NextPush, next_push
from scheduler.tuning.replica_model import Proposal

VALIDITY_S = 120.0
ACTIVE = Thresholds(
    version=7, policy="nested_wait", segments=(SegmentThreshold(end_output_tokens=100, total=200),),
    valid_for_s=VALIDITY_S, reason="as it was",
)
EQUILIBRIUM: FluidEquilibrium = solve_fluid(
    WorkloadMix.from_lengths(Lengths.point(100, 100), 1.0), IterationTimeModel(0.01, 1e-7), 100_000
)


def segments_of(total: int) -> tuple[SegmentThreshold, ...]:
    return (SegmentThreshold(end_output_tokens=100, total=total),)


def pushed(
    proposed: Thresholds, active: Thresholds = ACTIVE, *, pushed_s_ago: float = 1.0, from_config: bool = False,
    **proposal: Any,
) -> NextPush:
    telemetry = Telemetry(
        engine_id="engine", clock_s=0.0, cursor=0, limits=LIMITS, thresholds=active, from_config=from_config,
        gauges=Gauges(), counters=Counters(),
    )
    said = {"equilibrium": EQUILIBRIUM, "reason": "solved"} | proposal
    return next_push(
        telemetry, Proposal(proposed, **said), pushed_s_ago=pushed_s_ago, validity_s=VALIDITY_S
    )


def test_another_rule_is_sent_under_the_next_version_with_its_reason():
    proposed = replace(ACTIVE, version=0, segments=segments_of(300), reason="")
    push = pushed(proposed)
    assert push.changed and push.reason == "solved"
    assert push.thresholds == replace(proposed, version=8, reason="solved")


def test_noise_is_not_sent():
    assert pushed(replace(ACTIVE, segments=segments_of(210))) == NextPush(None, "settled")


@pytest.mark.parametrize(("pushed_s_ago", "renewed"), [(59.0, False), (61.0, True), (math.inf, True)])
def test_thresholds_are_renewed_unchanged_after_half_their_validity(pushed_s_ago, renewed):
    push = pushed(replace(ACTIVE, segments=segments_of(210)), pushed_s_ago=pushed_s_ago)
    assert not push.changed
    assert push.thresholds == (replace(ACTIVE, version=8) if renewed else None)


def test_a_change_counts_as_a_change_when_a_renewal_is_due_as_well():
    push = pushed(replace(ACTIVE, segments=segments_of(300)), pushed_s_ago=math.inf)
    assert push.changed and push.thresholds is not None and push.thresholds.segments == segments_of(300)


def test_configured_thresholds_are_not_renewed():
    assert pushed(ACTIVE, pushed_s_ago=math.inf, from_config=True).thresholds is None
    without_end = replace(ACTIVE, valid_for_s=None)
    assert pushed(without_end, without_end, pushed_s_ago=math.inf).thresholds is None, "they do not lapse"


def test_pinned_thresholds_are_left_alone_whatever_is_proposed():
    push = pushed(replace(ACTIVE, segments=segments_of(900)), replace(ACTIVE, pinned=True), pushed_s_ago=math.inf)
    assert push == NextPush(None, "pinned by an operator at version 7")


def test_while_too_little_is_known_the_reason_says_so():
    push = pushed(ACTIVE, equilibrium=None, reason="3 finished requests seen, 20 needed")
    assert push == NextPush(None, "3 finished requests seen, 20 needed")
