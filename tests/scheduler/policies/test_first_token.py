"""When first tokens will come, as a pure object: which waiting requests are rejected, and how early."""

import math
from dataclasses import replace

import pytest

from scheduler.fluid_params import FluidParams
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.workload import Lengths
from scheduler.policies.base import NO_REQUESTS, QueueView, Snapshot, Waiting
from scheduler.policies.first_token import FirstToken
from scheduler.survival import Survival

TTFT_S = 2.0
ITERATION_S = 0.05
FLOW_TOKENS = 500
"""Prompt tokens of an iteration, which takes `ITERATION_S`: 10 000 a second."""
PARAMS = FluidParams(
    time_model=IterationTimeModel(0.01, 0.0, 8e-5, 1e-4),
    survival=Survival.of(Lengths.point(500, 100)),
    kv_limit_tokens=100_000,
    iteration_s=ITERATION_S,
    ttft_s=TTFT_S,
    prompt_flow_tokens=float(FLOW_TOKENS),
)
UNDER_WAY_S = 2 * ITERATION_S
"""What runs and what is queued when a request comes."""


def queue_of(*requests):
    """A queue in order of arrival; each request is its fields of `Waiting`, the prompt 500 tokens unless given."""
    waiting = [
        Waiting(**{"prompt_tokens": 500, "since_s": 0.0, "request_id": f"w{place}"} | fields)
        for place, fields in enumerate(requests)
    ]
    tokens = sum(request.tokens_to_compute for request in waiting)
    return QueueView(
        len(waiting), min(request.since_s for request in waiting), lambda: iter(waiting),
        lambda: iter(sorted(waiting, key=lambda request: request.since_s)), lambda: reversed(waiting), tokens,
    )


def first_token(fluid=PARAMS, *, backlog=0, room=FLOW_TOKENS):
    snapshot = Snapshot(  # a released request: not idle
        now_s=0.0, waiting={}, released=1, running=NO_REQUESTS, kv_used_tokens=0, kv_capacity_tokens=100_000,
        prompt_backlog_tokens=backlog,
    )
    return FirstToken.of(fluid, snapshot, room)


@pytest.mark.parametrize("most_tokens", [512, 2048, 16_384])
def test_a_prompt_alone_on_an_idle_replica_is_in_time_whatever_the_token_budget(most_tokens):
    params, view = replace(PARAMS, iteration_s=None, ttft_s=0.3), queue_of({"prompt_tokens": 2500})
    idle = Snapshot(
        now_s=0.0, waiting={}, released=0, running=NO_REQUESTS, kv_used_tokens=0, kv_capacity_tokens=100_000,
        most_tokens=most_tokens,
    )
    assert not FirstToken.of(params, idle, math.inf).too_late(view, 0.0), "2 500 tokens take 0.21 to 0.25 s"
    assert FirstToken.of(replace(params, ttft_s=0.2), idle, math.inf).too_late(view, 0.0)


def test_without_a_planned_time_the_prompts_under_way_count_as_what_they_are():
    params = replace(PARAMS, iteration_s=None, ttft_s=0.4)
    busy = Snapshot(
        now_s=0.0, waiting={}, released=1, running=NO_REQUESTS, kv_used_tokens=0,
        kv_capacity_tokens=100_000, most_tokens=16_384,
    )
    view = queue_of({"prompt_tokens": 2500})
    assert not FirstToken.of(params, busy, math.inf).too_late(view, 0.0)
    assert FirstToken.of(params, replace(busy, prompt_tokens_under_way=3000), math.inf).too_late(view, 0.0)


def test_slots_bound_how_many_of_the_queue_enter_before_a_request_leaves():
    """At capacity 10 requests run by Little's law; an engine of fewer slots is full before."""
    params = replace(PARAMS, capacity_rps=2.0)
    view = queue_of(*[{}] * 10)
    rejected = [
        first_token(params).beyond_limit(
            view, 0.0, waiting=10, tokens=view.tokens_to_compute, running=5, free_slots=free
        ) for free in (0, 3, 1000)
    ]
    assert rejected[0] > rejected[1] > rejected[2], rejected


def late(*requests, now_s, fluid=PARAMS, backlog=0):
    return first_token(fluid, backlog=backlog).too_late(queue_of(*requests), now_s).keys()


def at_tail(*requests, fluid=PARAMS, now_s=0.0, running=0, full=False, backlog=0, new=None):
    view = replace(queue_of(*requests), new=new)
    return first_token(fluid, backlog=backlog).beyond_limit(
        view, now_s, waiting=view.length, tokens=view.tokens_to_compute, running=running,
        free_slots=0 if full else 1000,
    )


def lasts_s(*, step_s=0.001, longest_s=4.0, fluid=PARAMS, backlog=0, **fields):
    """Seconds that a request may wait before it is too late."""
    waits = range(round(longest_s / step_s))
    return next(n * step_s for n in waits if late(fields, now_s=n * step_s, fluid=fluid, backlog=backlog))


# Too late to wait on.


def test_a_request_is_late_when_its_own_prompt_would_not_be_in_time_any_more():
    assert lasts_s() == pytest.approx(TTFT_S - UNDER_WAY_S - 500 / 10_000, abs=0.002)
    assert lasts_s(prompt_tokens=5000) == pytest.approx(TTFT_S - UNDER_WAY_S - 0.5, abs=0.002)


def test_prompts_in_progress_make_a_request_late_earlier():
    assert lasts_s() - lasts_s(backlog=8000) == pytest.approx(0.8, abs=0.002)
    assert late({}, now_s=0.0, backlog=20_000) == {"w0"}, "at arrival, if that many are in progress"


def test_what_the_prefix_cache_holds_of_a_prompt_takes_no_time():
    assert lasts_s(prompt_tokens=10_000, cached_tokens=9500) == pytest.approx(lasts_s(), abs=0.002)
    assert late({"prompt_tokens": 25_000}, now_s=0.0) == {"w0"}
    assert not late({"prompt_tokens": 25_000, "cached_tokens": 24_000}, now_s=0.0)


def test_only_late_requests_are_named():
    waits = [{"since_s": 0.0}, {"since_s": 1.9}, {"since_s": 0.1}]
    assert late(*waits, now_s=1.96) == {"w0", "w2"}


def test_without_a_target_for_the_first_token_no_request_is_late():
    free = replace(PARAMS, ttft_s=None)
    assert not late({}, now_s=1e6, fluid=free, backlog=10**6)
    assert at_tail(*[{"prompt_tokens": 50_000}] * 50, fluid=free, full=True) == 0


# A declared length under a latency target.

LATENCY = replace(PARAMS, ttft_s=None, latency_s=6.0, first_token_within_s=4.0)


def test_a_declared_length_leaves_less_time_for_the_first_token():
    own_s = UNDER_WAY_S + 500 / 10_000
    assert lasts_s(fluid=LATENCY) == pytest.approx(4.0 - own_s, abs=0.002), "undeclared: the plan's"
    assert lasts_s(fluid=LATENCY, expected_output_tokens=81.0) == pytest.approx(6.0 - 80 * 0.05 - own_s, abs=0.002)
    assert late({"expected_output_tokens": 131.0}, now_s=0.0, fluid=LATENCY), "131 tokens of 50 ms are too many"


def test_with_both_targets_the_nearer_one_holds():
    both = replace(LATENCY, ttft_s=1.0, first_token_within_s=1.0)
    own_s = UNDER_WAY_S + 500 / 10_000
    assert lasts_s(fluid=both, expected_output_tokens=11.0) == pytest.approx(1.0 - own_s, abs=0.002)
    assert lasts_s(fluid=both, expected_output_tokens=109.0) == pytest.approx(6.0 - 108 * 0.05 - own_s, abs=0.002)


def test_what_delivery_takes_is_taken_from_the_limit_of_a_declared_length_too():
    slow = replace(LATENCY, ttft_s=2.0, first_token_within_s=1.5, delivery_s=0.5)
    own_s = UNDER_WAY_S + 500 / 10_000
    assert lasts_s(fluid=slow, expected_output_tokens=11.0) == pytest.approx(1.5 - own_s, abs=0.002)
    assert lasts_s(fluid=slow, expected_output_tokens=91.0) == pytest.approx(5.5 - 90 * 0.05 - own_s, abs=0.002)


def test_the_tail_is_held_to_the_declared_length_too():
    assert at_tail({}, fluid=LATENCY) == 0
    assert at_tail({"expected_output_tokens": 121.0}, fluid=LATENCY) == 1


# The tail, at arrival.


def test_the_tail_of_a_long_queue_of_long_prompts_is_rejected_at_arrival_and_the_head_is_not():
    """At 10 000 tokens per second 2 s are time for 1.9 s of prompts, which nine prompts of 2 000 tokens are."""
    beyond = at_tail(*[{"prompt_tokens": 2000}] * 30)
    assert beyond == 30 - 9
    assert not late(*[{"prompt_tokens": 2000}] * 30, now_s=0.0), "the head is not too late"
    assert at_tail(*[{"prompt_tokens": 2000}] * 9) == 0


def test_prompts_in_progress_count_at_the_tail_as_well():
    assert at_tail(*[{"prompt_tokens": 2000}] * 9, backlog=6000) == 3


def test_cached_prompts_are_early_at_the_tail_too():
    assert at_tail(*[{"prompt_tokens": 2000, "cached_tokens": 1900}] * 30) == 0


def serving(capacity_rps):
    """A replica of that capacity with prompts of 500 tokens; nothing varies."""
    flow = capacity_rps * 500 * ITERATION_S
    return replace(PARAMS, capacity_rps=capacity_rps, prompt_flow_tokens=flow, variability=0.0)


def test_when_full_requests_enter_as_fast_as_others_end_and_otherwise_as_fast_as_prompts_are_computed():
    """At two a second the one behind three waits 1.5 s of the 1.85 s that it can; ten are running at capacity."""
    assert at_tail(*[{}] * 10, fluid=serving(2.0), full=True) == 10 - 4
    assert at_tail(*[{}] * 10, fluid=serving(2.0), full=False) == 0
    assert at_tail(*[{}] * 10, fluid=serving(20.0), full=True) == 0
    assert at_tail(*[{}] * 10, fluid=replace(PARAMS, capacity_rps=0.0), full=True) == 0, "a capacity that is not known"


def test_places_that_are_free_are_filled_at_once():
    """Four of ten are free: the one behind seven waits for three departures, and for the prompts of four."""
    assert at_tail(*[{}] * 10, fluid=serving(2.0), running=0) == 0
    assert at_tail(*[{}] * 10, fluid=serving(2.0), running=6) == 10 - 8


def test_the_more_departures_vary_the_earlier_the_tail_is_rejected():
    params = serving(10.0)
    steady, bursty = (
        at_tail(*[{}] * 30, fluid=replace(params, variability=variability), full=True) for variability in (0.0, 4.0)
    )
    assert 0 < steady < bursty < 30


def test_what_has_come_in_is_not_rejected_by_a_small_delay():
    """At ten a second new requests need their mean wait and three standard deviations. A little later without a
    departure the last one would be late by that measure; it goes only when even a good second would not save it."""
    params = replace(serving(10.0), variability=1.0)
    taken = 30 - at_tail(*[{}] * 30, fluid=params, full=True)
    mean_s, deviation_s = (taken - 1) / 10, math.sqrt(taken - 1) / 10
    assert mean_s + 3 * deviation_s < TTFT_S < mean_s + 4 * deviation_s + 0.3
    hopeless_after_s = TTFT_S - mean_s + deviation_s
    for waited_s in (0.05, 0.5, hopeless_after_s - 0.3):
        assert at_tail(*[{}] * taken, fluid=params, full=True, now_s=waited_s, new=set()) == 0
    assert at_tail(*[{}] * taken, fluid=params, full=True, now_s=hopeless_after_s, new=set()) > 0


def test_a_request_is_new_however_long_its_way_to_the_queue_took():
    params = replace(serving(10.0), variability=1.0)
    fast, slow = (at_tail(*[{}] * 30, fluid=params, full=True, now_s=waited_s) for waited_s in (0.0, 0.3))
    assert fast < slow < 30
    seen = at_tail(*[{}] * 20, fluid=params, full=True, new={"w18", "w19"})
    assert seen == 2, "of those that no decision has seen yet"


def test_the_queue_limit_holds_whatever_the_time():
    assert at_tail(*[{"prompt_tokens": 10}] * 9, fluid=replace(PARAMS, queue_limit=5)) == 4


def test_a_choice_that_has_its_turn_later_delays_no_other_request():
    """Choices of a request that has begun may not be rejected; those of one tenant had another's requests rejected."""
    choices = [{"is_committed": True}] * 40
    alone = {"waiting": 1, "tokens": 500, "running": 10, "free_slots": 0}
    full = replace(PARAMS, capacity_rps=2.0, queue_limit=5)
    view = queue_of({}, *choices)
    behind = alone | {"waiting": 41, "tokens": 41 * 500}
    assert first_token(full).beyond_limit(queue_of({}), 0.0, **alone) == 0
    assert first_token(full).beyond_limit(view, 0.0, **behind) == 0
    assert first_token(full).beyond_limit(queue_of(*choices, {}), 0.0, **behind) == 1, "40 have their turn before it"
    assert first_token(full).beyond_limit(queue_of(*choices), 0.0, **(behind | {"waiting": 40})) == 0


# A cold engine.

COLD = replace(PARAMS, cold=True)


def test_a_cold_engine_rejects_no_request_before_half_of_its_ttft_target_and_then_does():
    hopeless = {"prompt_tokens": 50_000}
    assert lasts_s(fluid=COLD, backlog=10**6, **hopeless) == pytest.approx(TTFT_S / 2, abs=0.002)
    assert lasts_s(fluid=COLD, prompt_tokens=1) == pytest.approx(TTFT_S / 2, abs=0.002)


def test_a_cold_engine_rejects_no_request_at_its_tail():
    assert at_tail(*[{"prompt_tokens": 50_000}] * 30, fluid=replace(COLD, capacity_rps=1.0), full=True) == 0


# Rates.


def test_prompts_that_take_no_time_of_their_own_are_in_time():
    unlimited = first_token(replace(PARAMS, time_model=IterationTimeModel(0.01, 0.0, 1e-4, 1e-4)), room=math.inf)
    assert unlimited.own_s(Waiting(1000, 0.0)) == pytest.approx(2 * 0.01 + 1000 * 1e-4, rel=0.02)


def test_a_pipeline_s_steps_under_way_delay_the_first_token():
    deep = first_token(replace(PARAMS, pipeline_depth=4))
    assert deep.own_s(Waiting(500, 0.0)) - first_token().own_s(Waiting(500, 0.0)) == pytest.approx(3 * ITERATION_S)


def test_more_room_than_the_plan_s_makes_first_tokens_earlier():
    usual, roomy = first_token(), first_token(room=4 * FLOW_TOKENS)
    long = Waiting(20_000, 0.0)
    assert roomy.own_s(long) - roomy.iteration_s * 2 <= usual.own_s(long) - usual.iteration_s * 2
