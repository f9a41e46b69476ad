"""Every combination of the three targets with engine settings that people use, through the solver."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise, product

import pytest

from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.workload import Lengths, WorkloadMix
from scheduler.policies import NO_REQUESTS, QueueView, Snapshot, Waiting, make_policy
from scheduler.thresholds import UNKNOWN_TYPE, EngineLimits, Thresholds, parse_thresholds, thresholds_as_dict
from scheduler.tuning.fluid_plan import FluidPlan
from scheduler.tuning.slo import Slo
from scheduler.tuning.solve import tune_fluid

TIME_MODEL = IterationTimeModel(0.0034, 4.5e-7, 6.47e-5, 6.47e-5, 0.0112)
LENGTHS = Lengths.from_pairs([(40, 30), (300, 100), (900, 200), (2500, 700)])
KV_TOKENS = 137_216
SLOTS, BUDGETS, BLOCKS = (32, 64, 128, 256, 512, 1024), (512, 2048, 8192, 16_384), (16, 32, 64, 128)
LOOSE = {"ttft_s": 4.0, "tpot_s": 0.1, "latency_s": 40.0}
TIGHT = {"ttft_s": 0.5, "tpot_s": 0.02, "latency_s": 8.0}
COMBINATIONS = tuple(
    tuple(name for name, kept in zip(LOOSE, present, strict=True) if kept)
    for present in product((False, True), repeat=3)
)
OVERLOAD_RPS = 100.0


@cache
def solved(names: tuple[str, ...], tight: bool, slots: int, budget: int, block: int, rate_rps: float) -> FluidPlan:
    return tuned(names, tight, slots, budget, block, rate_rps)[1]


def tuned(
    names: tuple[str, ...], tight: bool, slots: int, budget: int, block: int, rate_rps: float
) -> tuple[Thresholds, FluidPlan]:
    targets = Slo(**{name: (TIGHT if tight else LOOSE)[name] for name in names})
    return tune_fluid(
        Thresholds(policy="fluid"), WorkloadMix.from_lengths(LENGTHS, rate_rps), TIME_MODEL,
        limits(slots, budget, block), targets, miss_probability=0.01,
    )


def limits(slots: int, budget: int, block: int) -> EngineLimits:
    return EngineLimits(
        kv_capacity_tokens=KV_TOKENS, block_tokens=block, max_num_seqs=slots, max_num_batched_tokens=budget,
        max_model_len=4096,
    )


def named(names: tuple[str, ...]) -> str:
    return "+".join(name.removesuffix("_s") for name in names) or "none"


@pytest.mark.parametrize("tight", [False, True], ids=["loose", "tight"])
@pytest.mark.parametrize("names", COMBINATIONS, ids=named)
@pytest.mark.slow
def test_every_engine_setting_gets_parameters_that_hold(names: tuple[str, ...], tight: bool) -> None:
    for slots, budget, block in product(SLOTS, BUDGETS, BLOCKS):
        for rate_rps in (0.5, OVERLOAD_RPS):
            thresholds, plan = tuned(names, tight, slots, budget, block, rate_rps)
            assert plan is not None and thresholds.fluid is not None
            assert 0 < plan.capacity_rps < math.inf
            assert 0 <= plan.goodput_rps <= rate_rps * (1 + 1e-9)
            assert parse_thresholds(thresholds_as_dict(thresholds)) == thresholds
            thresholds.check_fits(limits(slots, budget, block))
            thresholds.check_serves()
            assert admits_one_alone(thresholds, slots, budget)
            if rate_rps == OVERLOAD_RPS:
                assert within_the_engine(plan, slots, budget), (slots, budget, block)


def admits_one_alone(thresholds: Thresholds, slots: int, budget: int) -> bool:
    """Whether an idle engine takes the longest request and gives it tokens."""
    longest = int(LENGTHS.prompt_tokens.max())
    waiting = [Waiting(longest, 0.0, "alone")]
    view = QueueView(1, 0.0, lambda: iter(waiting), lambda: iter(waiting), lambda: iter(waiting), longest)
    decision = make_policy(thresholds).decide(Snapshot(
        now_s=0.0, waiting={UNKNOWN_TYPE: view}, released=0, running=NO_REQUESTS, kv_used_tokens=0,
        kv_capacity_tokens=KV_TOKENS, kv_read_tokens=0, slots=slots, most_tokens=budget,
    ))
    budgeted = decision.token_budget is None or decision.token_budget >= 1
    return decision.admit == {UNKNOWN_TYPE: 1} and not decision.reject and not decision.reject_last and budgeted


def within_the_engine(plan: FluidPlan, slots: int, budget: int) -> bool:
    """Whether the engine has the slots and the tokens for the planned capacity, in the planned iterations."""
    served = plan.capacity_rps * plan.fluid.steady_s
    running, tokens = LENGTHS.mean_output_tokens + 1, LENGTHS.mean_prompt_tokens + LENGTHS.mean_output_tokens
    return served * running <= slots * 1.001 and served * tokens <= budget * 1.001


@pytest.mark.parametrize("names", COMBINATIONS, ids=named)
def test_tighter_targets_never_give_more_capacity(names: tuple[str, ...]) -> None:
    for slots, budget, block in product(SLOTS, BUDGETS, BLOCKS):
        settings = (slots, budget, block, OVERLOAD_RPS)
        loose, tight = solved(names, False, *settings), solved(names, True, *settings)
        assert tight.capacity_rps <= loose.capacity_rps * (1 + 1e-9), settings
        for fewer in (names[:place] + names[place + 1:] for place in range(len(names))):
            assert loose.capacity_rps <= solved(fewer, False, *settings).capacity_rps * (1 + 1e-9), (fewer, settings)
            assert loose.goodput_rps <= solved(fewer, False, *settings).goodput_rps * (1 + 1e-3), (fewer, settings)


@pytest.mark.parametrize("names", COMBINATIONS, ids=named)
def test_more_slots_and_larger_budgets_never_give_less_capacity(names: tuple[str, ...]) -> None:
    for budget, block in product(BUDGETS, BLOCKS):
        capacities = [solved(names, False, slots, budget, block, OVERLOAD_RPS).capacity_rps for slots in SLOTS]
        assert all(less <= more * (1 + 1e-9) for less, more in pairwise(capacities)), capacities
        assert capacities[0] < capacities[-1]
    for slots, block in product(SLOTS, BLOCKS):
        capacities = [solved(names, False, slots, budget, block, OVERLOAD_RPS).capacity_rps for budget in BUDGETS]
        assert all(less <= more * (1 + 1e-9) for less, more in pairwise(capacities)), capacities
