"""Several tokens a step: what is measured, and what follows for decisions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.estimation.iteration_time_error import IterationTimeError
from scheduler.estimation.steps_seen import StepsSeen
from scheduler.messages import Counters
from scheduler.model.fluid import solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.steps import ONE_TOKEN_A_STEP, Steps
from scheduler.model.wait_thresholds import NestedWaitSolution, nested_wait_thresholds
from scheduler.model.workload import Lengths, WorkloadMix
from scheduler.policies import RunningBatch, RunningRequest, Snapshot, make_policy
from scheduler.policies.segments import Segments
from scheduler.thresholds import EngineLimits, SegmentThreshold, Thresholds
from scheduler.tuning.fluid_plan import solve_fluid_params
from scheduler.tuning.slo import Slo
from scheduler.tuning.tpot_margin import tpot_margin

TIME_MODEL = IterationTimeModel(0.0034, 4.5e-7, 6.47e-5, 6.47e-5, 0.0112)
LIMITS = EngineLimits(
    kv_capacity_tokens=137_000, block_tokens=16, max_num_seqs=512, max_num_batched_tokens=2048, max_model_len=4096
)
MIX = WorkloadMix.from_lengths(Lengths.from_pairs([(300, 100), (900, 200), (1500, 400)]), 30.0)


# The numbers.


@given(st.floats(0, 1), st.integers(1, 5))
def test_what_an_acceptance_rate_stands_for(rate, drafts):
    """Summed over every way in which the drafts can be accepted or rejected."""
    mean = square = 0.0
    for accepted in itertools.product((True, False), repeat=drafts):
        chance = np.prod([rate if one else 1 - rate for one in accepted])
        gained = 1 + next((place for place, one in enumerate(accepted) if not one), drafts)
        mean, square = mean + chance * gained, square + chance * gained**2
    steps = Steps.of_acceptance(rate, drafts)
    assert steps.tokens == pytest.approx(mean)
    assert steps.tokens_std == pytest.approx(np.sqrt(max(square - mean**2, 0.0)), abs=1e-6)
    assert steps.computed == 1 + drafts


def totals(steps: int, gained: int, squares: int, computed: int) -> Counters:
    return Counters(
        decode_steps=steps, decode_gained_tokens=gained, decode_gained_squares=squares, decode_computed_tokens=computed
    )


def test_a_few_steps_move_the_estimate_little_and_many_settle_it():
    seen = StepsSeen(window_s=60.0)
    assert seen.steps == ONE_TOKEN_A_STEP
    seen.observe(5.0, Counters())
    assert seen.steps == ONE_TOKEN_A_STEP, "an engine that does not speculate counts none"
    seen.observe(10.0, totals(10, 25, 75, 40))
    assert 1 < seen.steps.tokens < 1.2
    seen.observe(15.0, totals(100_000, 250_000, 750_000, 400_000))
    assert (seen.steps.tokens, seen.steps.computed) == (pytest.approx(2.5, rel=0.01), pytest.approx(4.0, rel=0.01))
    assert seen.steps.tokens_std == pytest.approx(np.sqrt(7.5 - 2.5**2), rel=0.02)


def test_what_is_older_than_the_window_is_forgotten():
    seen = StepsSeen(window_s=60.0)
    seen.observe(0.0, totals(50_000, 150_000, 450_000, 200_000))
    for passes in range(1, 20):
        seen.observe(5.0 * passes, totals(50_000 + 5000 * passes, 150_000 + 5000 * passes, 450_000 + 5000 * passes,
                                          200_000 + 20_000 * passes))
    assert seen.steps.tokens == pytest.approx(1.0, abs=0.01)


def test_a_late_report_changes_nothing_and_a_restarted_engine_counts_anew():
    seen = StepsSeen(window_s=60.0)
    seen.observe(5.0, totals(50_000, 150_000, 450_000, 200_000))
    before = seen.steps
    seen.observe(4.0, totals(40_000, 40_000, 40_000, 160_000))
    assert seen.steps == before
    seen.restart()
    seen.observe(1.0, totals(50_000, 50_000, 50_000, 200_000))
    assert seen.steps.tokens == 1.0


# Boundaries.


def held_at(stage: int, *, before: int, most_step_tokens: int) -> bool:
    """Whether a request is held at a boundary after 8 tokens that it reaches or jumps from `before` to `stage`."""
    segments = (SegmentThreshold(end_output_tokens=8, total=16), SegmentThreshold(end_output_tokens=64, total=112))
    policy = make_policy(Thresholds(policy="nested_wait", segments=segments, max_hold_s=10.0))
    held = False
    for now_s, reached in enumerate((before, stage)):
        running = RunningBatch([RunningRequest("jumps", stage=reached), RunningRequest("young", stage=1)])
        held = "jumps" in policy.decide(Snapshot(
            now_s=float(now_s), waiting={}, released=0, running=running, kv_used_tokens=0, kv_capacity_tokens=4096,
            most_step_tokens=most_step_tokens,
        )).sit_out
    return held


@pytest.mark.parametrize("stage", [8, 9, 10, 11])
def test_a_request_that_jumps_over_a_boundary_is_held_there(stage):
    assert held_at(stage, before=7, most_step_tokens=4)
    assert not held_at(7, before=4, most_step_tokens=4)
    assert held_at(stage, before=7, most_step_tokens=1) == (stage == 8)


# What is solved.


@pytest.mark.parametrize("targets", [Slo(), Slo(tpot_s=0.05), Slo(ttft_s=3.0, tpot_s=0.02)])
def test_free_drafts_that_are_all_accepted_make_the_engine_that_many_times_as_fast(targets):
    """Steps of two tokens at the price of one serve as much as an engine with decodes of half the cost."""
    twice = replace(
        TIME_MODEL,
        d0_s=TIME_MODEL.d0_s / 2,
        floor_s=TIME_MODEL.floor_s / 2,
        d1_s_per_kv_token=TIME_MODEL.d1_s_per_kv_token / 2,
        d3_s_per_decode_token=TIME_MODEL.d3_s_per_decode_token / 2,
    )
    drafting = solve_fluid_params(MIX, TIME_MODEL, LIMITS, targets, steps=Steps(tokens=2.0))
    fast = solve_fluid_params(MIX, twice, LIMITS, targets)
    assert drafting.capacity_rps == pytest.approx(fast.capacity_rps, rel=0.01)
    assert drafting.bottleneck == fast.bottleneck
    if targets.tpot_s:
        assert drafting.fluid.token_s == pytest.approx(fast.fluid.token_s)
        assert drafting.fluid.iteration_s == pytest.approx(2 * fast.fluid.iteration_s)


@pytest.mark.parametrize("steps", [ONE_TOKEN_A_STEP, Steps.of_acceptance(0.7, 3)])
def test_nested_wait_groups_count_per_iteration_whatever_a_step_gains(steps):
    """Iterations of fixed length, so that as many arrive in each: n_1 is the same, and the engine admits it."""
    time_model, lengths = IterationTimeModel(0.02, 0.0, 0.0, 0.0, 0.0), Lengths.from_pairs([(100, 40), (100, 160)])
    mix = WorkloadMix.from_lengths(lengths, 10.0)
    solution = nested_wait_thresholds(mix, time_model, 10**6, boundaries=(40, 160), whole=False, steps=steps)
    assert isinstance(solution, NestedWaitSolution)
    assert solution.n[0] == pytest.approx(9 / 40), "the first total whose share exceeds the 0.2 that arrive"
    segments = tuple(
        SegmentThreshold(end_output_tokens=end, total=total)
        for end, total in zip(solution.boundaries, solution.totals, strict=True)
    )
    queues = Segments(Thresholds(policy="nested_wait", segments=segments))
    assert sum(queues.entering(10**6, 10**6, at_once=False) for _ in range(400)) == 400 * 9 / 40
    # Little's law, in iterations of a life: prompt, first token, and so many tokens a step.
    in_stages = solution.n[0] * (40 / steps.tokens + 1) * (100 + 20) + solution.n[1] * 120 / steps.tokens * (100 + 100)
    assert solution.memory_tokens == pytest.approx(in_stages, rel=0.01)


def test_drafts_that_are_never_accepted_only_cost():
    plain, drafting = (
        solve_fluid_params(MIX, TIME_MODEL, LIMITS, Slo(tpot_s=0.05), steps=steps).capacity_rps
        for steps in (ONE_TOKEN_A_STEP, Steps.of_acceptance(0.0, 3))
    )
    assert drafting < plain


@pytest.mark.parametrize("steps", [ONE_TOKEN_A_STEP, Steps.of_acceptance(0.7, 3), Steps.of_acceptance(0.2, 2)])
def test_the_critical_rate_is_where_the_equilibrium_s_memory_is_full(steps):
    critical = solve_fluid(MIX, TIME_MODEL, LIMITS.kv_capacity_tokens, steps=steps).critical_rate_scale
    at_it = solve_fluid(MIX.scaled(critical * (1 - 1e-9)), TIME_MODEL, LIMITS.kv_capacity_tokens, steps=steps)
    assert at_it.fits_memory
    assert at_it.memory_tokens == pytest.approx(LIMITS.kv_capacity_tokens, rel=1e-5)
    # Little's law, in iterations of a life.
    life = MIX.merged().lengths.mean_output_tokens / steps.tokens + 1
    assert at_it.running == pytest.approx(30.0 * critical * at_it.iteration_time_s * life)


@pytest.mark.parametrize(("rate", "drafts"), [(0.7, 3), (0.3, 2), (0.9, 5)])
@pytest.mark.parametrize("std", [0.0, 0.05])
def test_few_accepted_drafts_miss_no_more_often_than_stated(rate, drafts, std):
    """Requests play their steps; each has as many iterations as the target leaves its answer."""
    generator, steps, miss = np.random.default_rng(4), Steps.of_acceptance(rate, drafts), 0.02
    lengths = Lengths(np.full(4, 100), np.array([1, 20, 100, 400]), np.full(4, 0.25))
    margin = tpot_margin(lengths, IterationTimeError(std=std), miss, steps)
    missed = 0.0
    for output in (20, 100, 400):
        rejected = generator.random((3000, output, drafts)) >= rate
        gained = np.cumsum(1 + np.where(rejected.any(axis=2), rejected.argmax(axis=2), drafts), axis=1)
        number = 1 + (gained < output - 1).sum(axis=1)
        errors = 1 + generator.standard_normal(number.size) * std / np.sqrt(number)
        missed += 0.25 * np.mean(number * errors * steps.tokens / (1 + margin) > output - 1)
    assert miss / 10 <= missed <= 1.5 * miss


@pytest.mark.parametrize("decoded", [0, 5000], ids=["no speculation", "idle after it"])
def test_an_engine_that_decodes_nothing_leaves_no_marks(decoded):
    """A controller gets a report of every engine each period."""
    seen = StepsSeen(60.0)
    counters = Counters(decode_steps=decoded, decode_computed_tokens=4 * decoded, decode_gained_tokens=2 * decoded)
    for period in range(2000):
        seen.observe(5.0 * period, counters)
    assert len(seen._marks) <= 3
