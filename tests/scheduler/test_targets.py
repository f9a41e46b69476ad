"""From targets to a pace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.fluid import solve_fluid
from scheduler.law import ServiceTimeLaw
from scheduler.mix import Lengths, WorkloadMix
from scheduler.targets import Targets, solve_pace, survival_of
from scheduler.thresholds import EngineLimits

LAW = ServiceTimeLaw(0.0034, 4.5e-7, 6.47e-5, 6.47e-5, 0.0112)
LIMITS = EngineLimits(
    kv_capacity_tokens=137_000, block_tokens=16, max_num_seqs=512, max_num_batched_tokens=2048, max_model_len=4096
)
CONVERSATION = Lengths.from_pairs([(300, 100), (900, 200), (1500, 400)])


def promise(rate_rps: float, lengths: Lengths = CONVERSATION, **targets: float):
    mix = WorkloadMix.from_lengths(lengths, rate_rps)
    return solve_pace(mix, LAW, LIMITS, Targets(**targets), law_error=0.0)


@given(st.floats(0.03, 0.2))
def test_at_capacity_the_fluid_s_iteration_is_the_target(tpot_s):
    solved = promise(1.0, tpot_s=tpot_s)
    fluid = solve_fluid(WorkloadMix.from_lengths(CONVERSATION, solved.capacity_rps), LAW, 10**9)
    if solved.binding != "memory":
        assert solved.capacity_rps <= solve_fluid(
            WorkloadMix.from_lengths(CONVERSATION, 1.0), LAW, LIMITS.kv_capacity_tokens - 16
        ).critical_rate_scale * (1 + 1e-9)
    assert fluid.iteration_time_s <= tpot_s * (1 + 1e-6)


def test_a_tighter_target_serves_less():
    capacities = [promise(1.0, tpot_s=tpot_s).capacity_rps for tpot_s in (0.02, 0.04, 0.08)]
    assert capacities == sorted(capacities)
    assert capacities[0] < capacities[-1]


def test_the_law_s_own_error_is_kept_free():
    mix = WorkloadMix.from_lengths(CONVERSATION, 1.0)
    sure, unsure = (
        solve_pace(mix, LAW, LIMITS, Targets(tpot_s=0.08), law_error=error).pace.iteration_s for error in (0.0, 0.05)
    )
    assert sure == 0.08
    assert unsure == pytest.approx(0.08 / (1 + 2.326 * 0.05), rel=1e-3)


def test_what_binds_is_named():
    assert promise(1.0, tpot_s=0.08).binding == "nothing"
    assert promise(30.0, tpot_s=0.08).binding == "TPOT target"
    assert promise(30.0).binding == "memory"


def test_without_targets_nothing_limits_but_memory():
    solved = promise(3.0)
    assert solved.pace.iteration_s is None
    assert solved.pace.queue_requests is None
    assert solved.pace.kv_limit_tokens <= LIMITS.kv_capacity_tokens


def test_a_queue_is_of_less_use_the_more_arrives():
    queues = [promise(rate, ttft_s=3.0, tpot_s=0.08).pace.queue_requests for rate in (2.0, 6.0, 10.0, 30.0)]
    assert queues == sorted(queues, reverse=True)
    assert queues[0] > queues[-1] >= 1


def test_survival_holds_at_every_length_of_few():
    points = dict(survival_of(Lengths.from_pairs([(1, 5), (1, 5), (1, 9), (1, 20)])))
    assert points == {0: 1.0, 4: 1.0, 5: 0.5, 8: 0.5, 9: 0.25, 19: 0.25, 20: 0.0}
