"""From latency targets to fluid parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.estimation.iteration_time_error import IterationTimeError
from scheduler.model.fluid import PrefixReuse, solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.workload import Lengths, RequestType, WorkloadMix
from scheduler.policies import NO_REQUESTS, Snapshot, make_policy
from scheduler.thresholds import EngineLimits, Thresholds
from scheduler.tuning.fluid_plan import solve_fluid_params
from scheduler.tuning.slo import Slo, UnreachableTarget, require_reachable
from scheduler.tuning.solve import cold_thresholds, tune_fluid

TIME_MODEL = IterationTimeModel(0.0034, 4.5e-7, 6.47e-5, 6.47e-5, 0.0112)
LIMITS = EngineLimits(
    kv_capacity_tokens=137_000, block_tokens=16, max_num_seqs=512, max_num_batched_tokens=2048, max_model_len=4096
)
CONVERSATION = Lengths.from_pairs([(300, 100), (900, 200), (1500, 400)])


def plan(rate_rps: float, lengths: Lengths = CONVERSATION, **targets: float):
    mix = WorkloadMix.from_lengths(lengths, rate_rps)
    return solve_fluid_params(mix, TIME_MODEL, LIMITS, Slo(**targets))


@given(st.floats(0.03, 0.2))
def test_at_capacity_the_fluid_s_iteration_is_the_target(tpot_s):
    solved = plan(1.0, tpot_s=tpot_s)
    fluid = solve_fluid(WorkloadMix.from_lengths(CONVERSATION, solved.capacity_rps), TIME_MODEL, 10**9)
    if solved.bottleneck != "memory":
        assert solved.capacity_rps <= solve_fluid(
            WorkloadMix.from_lengths(CONVERSATION, 1.0), TIME_MODEL, LIMITS.kv_capacity_tokens - 16
        ).critical_rate_scale * (1 + 1e-9)
    assert fluid.iteration_time_s <= tpot_s * (1 + 1e-6)


@given(
    st.tuples(*(st.booleans() for _ in range(4))), st.booleans(), st.sampled_from([1e-3, 1.0, 50.0]),
    st.tuples(*(st.sampled_from([None, value]) for value in (2.0, 0.08, 15.0))),
)
def test_a_time_model_may_leave_any_term_out(present, floor_alone, rate_rps, targets):
    """A zero cost is no bottleneck: the solution is finite, and an engine starts with it."""
    per_token = [full if kept else 0.0 for full, kept in zip((4.5e-7, 6.47e-5, 6.47e-5), present, strict=False)]
    time_model = IterationTimeModel(
        0.0 if floor_alone else 0.0034, *per_token, 0.0112 if floor_alone or present[3] else 0.0
    )
    ttft_s, tpot_s, latency_s = targets
    mix = WorkloadMix.from_lengths(CONVERSATION, rate_rps)
    solved = solve_fluid_params(mix, time_model, LIMITS, Slo(ttft_s, tpot_s, latency_s))
    assert 0 < solved.capacity_rps < np.inf and 0 <= solved.goodput_rps <= rate_rps * (1 + 1e-9)
    full = solve_fluid_params(mix, TIME_MODEL, LIMITS, Slo(ttft_s, tpot_s))
    if latency_s is None:
        assert solved.capacity_rps >= full.capacity_rps * (1 - 1e-9), "cheaper work, no less of it"
    cold = cold_thresholds(
        Thresholds(policy="fluid"), time_model, LIMITS, Slo(ttft_s, tpot_s, latency_s), overflow_probability=0.01
    )
    make_policy(cold).decide(
        Snapshot(now_s=0.0, waiting={}, released=0, running=NO_REQUESTS, kv_used_tokens=0, kv_capacity_tokens=137_000)
    )


SHAPES = [(2000, 500), (512, 200), (512, 20), (1155, 211), (20, 30)]


@given(st.sampled_from(SHAPES), st.floats(0.5, 3.0))
def test_capacity_is_no_more_than_the_floor_leaves(shape, times_floor):
    prompt, output = shape
    lengths = Lengths.point(prompt, output)
    target_s = times_floor * TIME_MODEL.floor_s
    solved = plan(1.0, lengths, tpot_s=target_s)

    def bound(seconds):
        if seconds <= TIME_MODEL.floor_s:
            return 0.0
        reading = TIME_MODEL.d1_s_per_kv_token * lengths.kv_token_iterations
        work = TIME_MODEL.d2_s_per_prefill_token * prompt + TIME_MODEL.d3_s_per_decode_token * output + reading
        return min((seconds - TIME_MODEL.d0_s) / (seconds * work), (seconds - TIME_MODEL.floor_s) / (seconds * reading))

    assert solved.capacity_rps <= bound(target_s) * (1 + 1e-9)
    assert solved.goodput_rps <= solved.capacity_rps
    if solved.bottleneck == "TPOT target":
        assert solved.capacity_rps == pytest.approx(bound(target_s / (1 + solved.tpot_margin)))
    if solved.capacity_rps > 0 and solved.alone_s is None and solved.bottleneck == "TPOT target":
        mix = WorkloadMix.from_lengths(lengths, solved.capacity_rps)
        assert solve_fluid(mix, TIME_MODEL, 10**9).iteration_time_s == pytest.approx(solved.fluid.iteration_s), (
            "one inverse"
        )


def test_the_floor_limits_long_outputs():
    assert plan(1.0, Lengths.point(2000, 500), tpot_s=0.015).capacity_rps == pytest.approx(0.50, abs=0.005)
    assert plan(1.0, Lengths.point(512, 20), tpot_s=0.008).capacity_rps == 0


def test_a_target_that_one_request_alone_misses_plans_for_nothing_and_says_so():
    for policy_targets in (Slo(tpot_s=0.008), Slo(tpot_s=0.008, ttft_s=2.0)):
        mix = WorkloadMix((RequestType("unknown", 1.0, Lengths.point(512, 20)),))
        thresholds, plan = tune_fluid(
            Thresholds(policy="fluid"), mix, TIME_MODEL, LIMITS, policy_targets, miss_probability=0.01
        )
        assert plan.goodput_rps == 0 and plan.bottleneck == "TPOT target"
        assert "TPOT target of 8 ms cannot be met: one request alone takes 11.4 ms" in thresholds.reason
        assert thresholds.fluid.iteration_s >= TIME_MODEL.floor_s, "the engine still serves"


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (Slo(tpot_s=0.008), "tpot_s = 0.008"), (Slo(ttft_s=0.01), "ttft_s"),
        (Slo(latency_s=0.011), "latency_s"),
    ],
)
def test_what_no_request_can_meet_is_an_error_with_the_least_that_is_allowed(targets, named):
    with pytest.raises(UnreachableTarget, match=rf"targets\.{named}.*0\.0112.*allowed"):
        require_reachable(targets, TIME_MODEL)
    require_reachable(Slo(ttft_s=0.012, tpot_s=0.012, latency_s=0.012), TIME_MODEL)


def test_a_tighter_target_serves_less():
    capacities = [plan(1.0, tpot_s=tpot_s).capacity_rps for tpot_s in (0.02, 0.04, 0.08)]
    assert capacities == sorted(capacities)
    assert capacities[0] < capacities[-1]


def test_time_is_kept_free_for_the_model_s_error():
    mix = WorkloadMix.from_lengths(CONVERSATION, 1.0)
    sure, unsure = (
        solve_fluid_params(mix, TIME_MODEL, LIMITS, Slo(tpot_s=0.08), error=IterationTimeError(std=std))
        for std in (0.0, 0.5)
    )
    assert sure.fluid.iteration_s == pytest.approx(0.08, rel=0.003)
    assert sure.fluid.iteration_s < 0.08, "a token more or less must not cost the target"
    assert unsure.tpot_margin > 0.05
    assert unsure.fluid.iteration_s == pytest.approx(0.08 / (1 + unsure.tpot_margin))


def test_the_bottleneck_is_named():
    assert plan(1.0, tpot_s=0.08).bottleneck == "nothing"
    assert plan(30.0, tpot_s=0.08).bottleneck == "TPOT target"
    assert plan(30.0).bottleneck == "memory"
    assert plan(0.5, tpot_s=0.08, ttft_s=0.3).bottleneck == "TTFT target"
    assert plan(30.0, tpot_s=0.08, ttft_s=3.0).bottleneck == "TPOT target"


def test_requests_that_miss_their_targets_do_not_count_as_goodput():
    solved = plan(1.0, tpot_s=0.08, ttft_s=0.3)
    assert 0 < solved.in_time < 1
    assert solved.goodput_rps == pytest.approx(solved.in_time)
    assert plan(1.0, tpot_s=0.08, ttft_s=3.0).goodput_rps == pytest.approx(1.0)


@pytest.mark.parametrize("tpot_s", [None, 0.08])
@pytest.mark.parametrize("ttft_s", [None, 2.0])
@pytest.mark.parametrize("latency_s", [6.0, 15.0, 60.0])
def test_at_light_load_a_latency_target_holds_nothing_back(latency_s, ttft_s, tpot_s):
    """Iterations take what the load asks for; a tight plan would only keep requests waiting."""
    solved = plan(1.0, latency_s=latency_s, ttft_s=ttft_s, tpot_s=tpot_s)
    params, without = solved.fluid, plan(1.0, ttft_s=ttft_s, tpot_s=tpot_s).fluid
    assert params.iteration_s == without.iteration_s
    assert ttft_s is None or params.first_token_limit_s <= ttft_s
    assert 0 < params.first_token_limit_s <= latency_s
    lasts_s = params.first_token_limit_s + (CONVERSATION.output_tokens - 1) * params.steady_s
    in_time = float(CONVERSATION.weights @ (lasts_s <= latency_s))
    assert in_time >= 0.6 * solved.in_time > 0, "the longest wait allowed leaves most requests in time"


@pytest.mark.parametrize("latency_s", [5.0, 10.0, 20.0, 40.0, 80.0])
def test_beyond_capacity_the_iteration_serves_the_most_requests_in_time(latency_s):
    """No other iteration time that the solver could have planned has more of what it serves in time."""
    solved = plan(50.0, latency_s=latency_s)
    planned = [plan(50.0, tpot_s=tpot_s, latency_s=latency_s).goodput_rps for tpot_s in (0.015, 0.03, 0.06)]
    assert solved.goodput_rps >= 0.97 * max(planned)
    assert solved.in_time > 0


def test_the_latency_that_most_can_keep_is_chosen():
    """All requests at light load; at a high one, many short outputs at the expense of a few very long ones."""
    lengths = Lengths(np.array([100, 100]), np.array([50, 3000]), np.array([0.95, 0.05]))
    assert plan(0.1, lengths, latency_s=60.0).in_time == pytest.approx(1.0)
    assert plan(100.0, lengths, latency_s=60.0).in_time == pytest.approx(0.95)
    loose, tight = (plan(100.0, lengths, latency_s=s).goodput_rps for s in (60.0, 5.0))
    assert tight <= loose


def test_without_targets_nothing_limits_but_memory():
    solved = plan(3.0)
    assert solved.fluid.iteration_s is None
    assert solved.fluid.queue_limit is None
    assert solved.fluid.kv_limit_tokens <= LIMITS.kv_capacity_tokens


def test_the_queue_limit_falls_as_the_arrival_rate_grows():
    assert plan(2.0, ttft_s=3.0, tpot_s=0.08).fluid.queue_limit is None, "up to capacity it empties by itself"
    queues = [plan(rate, ttft_s=3.0, tpot_s=0.08).fluid.queue_limit for rate in (6.0, 10.0, 30.0)]
    assert queues == sorted(queues, reverse=True)
    assert queues[0] > queues[-1] >= 1


def test_slots_are_a_resource_like_time_and_memory():
    """By Little's law 8 slots serve what 8 requests at the floor's iteration time do, and the bottleneck says so."""
    mix = WorkloadMix.from_lengths(CONVERSATION, 30.0)
    solved = solve_fluid_params(mix, TIME_MODEL, replace(LIMITS, max_num_seqs=8), Slo(ttft_s=3.0, tpot_s=0.08))
    assert solved.bottleneck == "slots"
    iteration_s = solve_fluid(
        WorkloadMix.from_lengths(CONVERSATION, solved.capacity_rps), TIME_MODEL, 10**9
    ).iteration_time_s
    running = solved.capacity_rps * iteration_s * (CONVERSATION.mean_output_tokens + 1)
    assert running == pytest.approx(8, rel=0.02)


def test_cached_prompts_need_no_time_but_are_read():
    """With nine tenths of the prompts cached more is served, yet less than if the prompts were short."""
    mix, short = WorkloadMix.from_lengths(CONVERSATION, 30.0), Lengths.from_pairs([(30, 100), (90, 200), (150, 400)])
    targets = Slo(ttft_s=3.0, tpot_s=0.08)
    cached = solve_fluid_params(
        mix, TIME_MODEL, LIMITS, targets, reuse=PrefixReuse(computed=0.1, private=1.0)
    ).capacity_rps
    assert solve_fluid_params(mix, TIME_MODEL, LIMITS, targets).capacity_rps * 1.05 < cached
    assert cached < solve_fluid_params(WorkloadMix.from_lengths(short, 30.0), TIME_MODEL, LIMITS, targets).capacity_rps
    memory = [
        solve_fluid_params(
            mix, TIME_MODEL, LIMITS, Slo(), reuse=PrefixReuse(computed=0.1, private=private)
        ).capacity_rps
        for private in (1.0, 0.1)
    ]
    assert memory[0] < memory[1]


def test_a_target_below_one_request_s_own_iteration_plans_for_that_request():
    solved = plan(1.0, tpot_s=0.005)
    assert solved.fluid.iteration_s >= TIME_MODEL.floor_s


def test_what_requests_would_have_needed_widens_the_margin_within_bounds():
    mix = WorkloadMix.from_lengths(CONVERSATION, 1.0)
    margins = [
        solve_fluid_params(mix, TIME_MODEL, LIMITS, Slo(tpot_s=0.08), realised_margin=needed).tpot_margin
        for needed in (0.0, 0.1, 5.0)
    ]
    assert margins == [pytest.approx(0.002), pytest.approx(0.1), pytest.approx(0.5)]


@pytest.mark.parametrize("targets", [Slo(ttft_s=3.0, tpot_s=0.08), Slo(latency_s=30.0)])
def test_what_delivery_takes_is_taken_from_the_time_for_the_first_token_and_from_no_target(targets):
    """The engine has so much less time, while what it counts as a miss stays the operator's target.

    What a latency target leaves for the wait is found on a grid of 64.
    """
    mix = WorkloadMix.from_lengths(CONVERSATION, 1.0)
    plain, late = (
        solve_fluid_params(mix, TIME_MODEL, LIMITS, targets, delivery_s=delivery_s).fluid for delivery_s in (0.0, 0.5)
    )
    assert plain.first_token_within_s - 0.5 - 0.02 < late.first_token_within_s < plain.first_token_within_s
    if targets.ttft_s is not None:
        assert late.first_token_within_s == pytest.approx(plain.first_token_within_s - 0.5)
    assert (late.ttft_s, late.tpot_s, late.latency_s) == (targets.ttft_s, targets.tpot_s, targets.latency_s)
    assert late.iteration_s == plain.iteration_s
