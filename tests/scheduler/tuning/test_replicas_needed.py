"""The number of replicas: a search over the solver's own plans, checked against what it must satisfy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from scheduler.estimation.iteration_time_error import PUBLISHED_MAPE, IterationTimeError
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import load_profile
from scheduler.model.workload import Lengths, WorkloadMix
from scheduler.thresholds import EngineLimits
from scheduler.tuning.fluid_plan import FluidPlan, solve_fluid_params
from scheduler.tuning.replicas_needed import replicas_needed
from scheduler.tuning.slo import NO_SLO, Slo

A100 = load_profile("a100-llama2-7b").time_model
H100 = IterationTimeModel(0.002, 5e-8, 3.3e-5, 3.3e-5, 0.0065)
"""About that of a model of 8 billion parameters."""
LIMITS = EngineLimits(
    kv_capacity_tokens=137_000, block_tokens=16, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=4096
)
CHAT, SHORT, LONG = Lengths.point(900, 230), Lengths.point(512, 20), Lengths.point(100, 400)
MIXED = Lengths.from_pairs([(900, 230)] * 9 + [(3500, 400)])


def planner(
    lengths: Lengths, targets: Slo, limits: EngineLimits = LIMITS, law: IterationTimeModel = A100, **more: float
) -> Callable[[float], FluidPlan]:
    return lambda rate_rps: solve_fluid_params(
        WorkloadMix.from_lengths(lengths, rate_rps), law, limits, targets,
        error=IterationTimeError.from_mape(PUBLISHED_MAPE), **more,
    )


@pytest.mark.parametrize("lengths", [CHAT, SHORT, LONG, MIXED])
@pytest.mark.parametrize("targets", [NO_SLO, Slo(3, 0.08), Slo(1, 0.05), Slo(None, None, 20.0), Slo(2, 0.06, 25.0)])
@pytest.mark.parametrize("rate_rps", [1.0, 10.0, 333.0])
def test_the_number_suffices_and_one_less_does_not(lengths: Lengths, targets: Slo, rate_rps: float) -> None:
    plan_at = planner(lengths, targets)
    need = replicas_needed(plan_at, rate_rps)
    assert need.replicas is not None

    def enough(replicas: int) -> bool:
        plan = plan_at(rate_rps / replicas)
        return plan.load < 1 and need.in_time - plan.in_time <= 0.01 and plan.late <= 0.01

    assert enough(need.replicas)
    assert need.replicas == 1 or not enough(need.replicas - 1)
    assert need.replicas == pytest.approx(math.ceil(rate_rps / need.most_rps), abs=1)
    assert need.goodput_rps <= need.most_rps <= plan_at(1.0).capacity_rps * 1.01


def test_without_targets_the_fluid_capacity_decides() -> None:
    need = replicas_needed(planner(CHAT, NO_SLO), 10.0)
    assert need.most_rps == pytest.approx(5.4218, rel=2e-3)  # docs/operate/sizing.md: 1.355 times 4 /s
    assert (need.replicas, need.binds, need.limit, need.reason) == (2, "time", "time", None)


@pytest.mark.parametrize(("lengths", "limits", "binds"), [
    (LONG, {"max_num_seqs": 16}, "slots"), (CHAT, {"kv_capacity_tokens": 8000}, "memory"),
    (SHORT, {"max_num_batched_tokens": 256}, "token budget"), (CHAT, {}, "time"),
])
def test_what_binds(lengths: Lengths, limits: dict[str, int], binds: str) -> None:
    need = replicas_needed(planner(lengths, NO_SLO, replace(LIMITS, **limits)), 50.0)
    assert need.binds == need.limit == binds


def test_a_short_first_token_target_leaves_capacity_unused() -> None:
    wide, narrow = (replicas_needed(planner(CHAT, Slo(ttft_s, 0.08)), 20.0) for ttft_s in (30.0, 0.5))
    assert wide.most_rps > 0.97 * 5.36 and narrow.most_rps < 0.95 * wide.most_rps
    assert (narrow.binds, narrow.limit) == ("first token", "time")


def test_burstier_arrivals_need_more() -> None:
    calm, bursty = (replicas_needed(planner(CHAT, Slo(2, 0.08), dispersion=d), 40.0) for d in (1.0, 10.0))
    assert calm.replicas is not None and bursty.replicas is not None and bursty.replicas > calm.replicas


def test_one_long_answer_among_hundreds_costs_what_it_takes_of_the_capacity() -> None:
    rng = np.random.default_rng(1)
    prompts, outputs = (rng.lognormal(np.log(mean), spread, 500) for mean, spread in ((800, 0.8), (300, 1.2)))
    usual = [(max(1, round(p)), max(1, round(o))) for p, o in zip(prompts, outputs, strict=True)]
    limits = replace(LIMITS, kv_capacity_tokens=420_000)
    alike, mixed = (
        planner(Lengths.from_pairs(pairs), Slo(5, 0.05), limits, law=H100)
        for pairs in (usual, [*usual, (2000, 20_000)])
    )
    shares = [replicas_needed(plan_at, 10.0).most_rps / plan_at(1.0).capacity_rps for plan_at in (alike, mixed)]
    assert min(shares) > 0.85, shares


@pytest.mark.parametrize(("lengths", "targets", "limits", "said"), [
    (CHAT, Slo(3, 0.0113), {}, "one request alone takes 1.* ms a token, more than the TPOT target of 11.3 ms"),
    (CHAT, Slo(0.02, 0.08), {}, "no request can be in time, even on an idle replica"),
    (CHAT, NO_SLO, {"kv_capacity_tokens": 1000}, "one request of 1130 tokens exceeds the KV capacity"),
])
def test_no_number_suffices(lengths: Lengths, targets: Slo, limits: dict[str, int], said: str) -> None:
    need = replicas_needed(planner(lengths, targets, replace(LIMITS, **limits)), 10.0)
    assert need.replicas is None and need.reason is not None
    assert re.search(said, need.reason), need.reason


def test_requests_that_are_late_on_an_idle_replica_need_no_more_replicas() -> None:
    """A tenth have prompts whose computing alone takes longer than the target."""
    targets = Slo(ttft_s=0.3, tpot_s=0.05)
    need = replicas_needed(planner(MIXED, targets), 10.0)
    assert need.reason is not None and "10.0% of the requests are late even on an idle replica" in need.reason
    assert need.in_time == pytest.approx(0.9)
    assert need.replicas is not None and need.goodput_rps == pytest.approx(0.9 * need.most_rps)
