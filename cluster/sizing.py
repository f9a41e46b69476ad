"""How many replicas of a candidate serve a traffic within targets, what binds, and what one more would buy.

Every figure is a plan of `scheduler.tuning.fluid_plan`, the one that tunes an engine; no other formula is in here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from cluster.plan_candidates import Candidate
from cluster.plan_traffic import Traffic
from cluster.prospects import plan_shown
from scheduler.model.fluid import finite_or_none
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.steps import ONE_TOKEN_A_STEP
from scheduler.thresholds import EngineLimits
from scheduler.tuning.fluid_plan import FluidPlan, solve_fluid_params
from scheduler.tuning.replicas_needed import Need, replicas_needed
from scheduler.tuning.slo import Slo, UnreachableTarget, require_reachable


def sized(candidate: Candidate, traffic: Traffic, targets: Slo, misses: float) -> dict[str, Any]:
    """JSON-ready, of one candidate.

    replicas: the smallest number with which all but `misses` of the requests are in time (None: none; `reason` says
    why, `error` why the candidate cannot run at all); replicas_low, replicas_high: at the ends of an estimate's
    interval (None: not an estimate, or none there). accelerators: of a replica, and in all. most_rps: requests per
    second that one replica takes with all in time; goodput_rps: of these, in time. binds: what it runs out of beyond
    that; limit: what sets its capacity, which first tokens in bursts may leave unreached. now, one_more, one_less: the
    plans with these many replicas.
    """
    nothing: dict[str, Any] = dict.fromkeys((
        "replicas", "replicas_low", "replicas_high", "accelerators_in_all", "most_rps", "goodput_rps", "in_time",
        "binds", "limit", "now", "one_more", "one_less", "kv_capacity_tokens", "law", "reason",
    ))
    found = nothing | {
        "name": candidate.name, "accelerators": candidate.accelerators or None,
        "estimated": candidate.interval is not None, "error": candidate.error,
    }
    if candidate.time_model is None or candidate.limits is None:
        return found
    plan_at = planner(candidate.time_model, candidate.limits, traffic, targets, misses)
    need = _need(candidate.time_model, plan_at, traffic, targets, misses)
    found |= {
        "law": asdict(candidate.time_model), "kv_capacity_tokens": candidate.limits.kv_capacity_tokens,
        "replicas": need.replicas, "most_rps": finite_or_none(need.most_rps),
        "goodput_rps": finite_or_none(need.goodput_rps), "in_time": need.in_time, "binds": need.binds,
        "limit": need.limit, "reason": need.reason,
    }
    if candidate.interval is not None:
        low, high = candidate.interval.fast, candidate.interval.slow
        ends = (low, candidate.interval.kv_high), (high, candidate.interval.kv_low)
        for key, (time_model, kv_tokens) in zip(("replicas_low", "replicas_high"), ends, strict=True):
            limits = replace(candidate.limits, kv_capacity_tokens=kv_tokens)
            at_end = planner(time_model, limits, traffic, targets, misses)
            found[key] = _need(time_model, at_end, traffic, targets, misses).replicas
    if need.replicas is not None:
        found["accelerators_in_all"] = need.replicas * candidate.accelerators or None
        for key, replicas in (("now", 0), ("one_more", 1), ("one_less", -1)):
            if count := need.replicas + replicas:
                found[key] = _shown(plan_at, traffic, count)
    return found


def planner(
    time_model: IterationTimeModel, limits: EngineLimits, traffic: Traffic, targets: Slo, misses: float
) -> Callable[[float], FluidPlan]:
    """The plan of one replica at a rate, with the margins of an engine's own controller."""
    steps = replace(ONE_TOKEN_A_STEP, depth=limits.pipeline_depth)

    def plan_at(rate_rps: float) -> FluidPlan:
        return solve_fluid_params(
            traffic.mix.scaled(rate_rps / traffic.mix.rate_rps), time_model, limits, targets, error=traffic.error,
            miss_probability=misses, dispersion=traffic.dispersion, steps=steps,
        )

    return plan_at


def _need(
    time_model: IterationTimeModel, plan_at: Callable[[float], FluidPlan], traffic: Traffic, targets: Slo, misses: float
) -> Need:
    try:
        require_reachable(targets, time_model)
    except UnreachableTarget as error:
        return Need(None, 0.0, 0.0, 0.0, "time", "time", str(error))
    return replicas_needed(plan_at, traffic.mix.rate_rps, miss_probability=misses)


def _shown(plan_at: Callable[[float], FluidPlan], traffic: Traffic, replicas: int) -> dict[str, Any]:
    plan = plan_at(traffic.mix.rate_rps / replicas)
    offered = {"replicas": replicas, "offered_rps": traffic.mix.rate_rps, "late": plan.late}
    return offered | plan_shown(plan, replicas)
