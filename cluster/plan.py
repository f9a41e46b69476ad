"""`headrace plan`: how many replicas, on what, and the fluid model with its thresholds; without a cluster."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.client import AdminClient
from cluster.plan_candidates import Candidate, Options, candidates
from cluster.plan_errors import PlanError
from cluster.plan_traffic import ONE_WORKLOAD, Traffic, parse_type, stated_traffic, traffic_of_cluster
from cluster.sizing import sized
from scheduler.model.fluid import finite_or_none, solve_fluid
from scheduler.model.wait_thresholds import Infeasible, nested_wait_thresholds, running_cap, wait_thresholds
from scheduler.tuning.slo import NO_SLO, Slo

__all__ = ["Options", "PlanError", "PlanInputs", "make_plan", "parse_type", "targets_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """The command line's options. targets: None in a field: the cluster's own with --from, else no target.
    overflow_probability: accepted share of misses."""

    types: tuple[str, ...] = ()
    trace: Path | None = None
    rate: float | None = None
    url: str | None = None
    model: str | None = None
    targets: Slo = NO_SLO
    options: Options
    segments: int
    overflow_probability: float


def make_plan(inputs: PlanInputs) -> dict[str, Any]:
    """The plan as a JSON-ready object; infinite times are null and explained by `reason`.

    `sizing` answers for every candidate; what stands beside it is the fluid equilibrium of the whole rate on one
    replica of the first candidate that can run.

    Raises:
        PlanError: naming the option and what is allowed.
    """
    try:
        traffic = _traffic(inputs)
        found = candidates(inputs.options, traffic)
        runs = next((one for one in found if one.error is None), None)
        if runs is None:
            raise PlanError("; ".join(f"{one.name}: {one.error}" for one in found))
        equilibrium = _equilibrium(inputs, runs, traffic)
        targets = _targets(inputs.targets, traffic.targets)
        sizing = [sized(one, traffic, targets, inputs.overflow_probability) for one in found]
    except (ValueError, OSError) as error:
        raise error if isinstance(error, PlanError) else PlanError(str(error)) from error
    return equilibrium | {
        "sizing": {
            "offered_rps": traffic.mix.rate_rps, "targets": asdict(targets),
            "accepted_misses": inputs.overflow_probability, "candidates": sizing,
        },
        "warnings": [*traffic.warnings, *_differs(traffic, sizing)],
    }


def targets_of(ttft: float | None, tpot: float | None, latency: float | None) -> Slo:
    """The targets of the command line, in seconds.

    Raises:
        PlanError: one is not above 0.
    """
    for name, value in (("ttft", ttft), ("tpot", tpot), ("latency", latency)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise PlanError(f"--{name} = {value} is not allowed; allowed: seconds > 0")
    return Slo(ttft, tpot, latency)


def _traffic(inputs: PlanInputs) -> Traffic:
    if inputs.url is None:
        if inputs.model is not None:
            raise PlanError("--model names a model of the cluster that --from asks; leave it out, or give --from URL")
        return stated_traffic(inputs.types, inputs.trace, inputs.rate)
    if inputs.types or inputs.trace:
        raise PlanError(ONE_WORKLOAD)
    rate = inputs.rate
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise PlanError(f"--rate = {rate} is not allowed; allowed: requests per second > 0")
    return traffic_of_cluster(AdminClient(inputs.url).state(), inputs.model, rate)


def _targets(given: Slo, of_cluster: Slo) -> Slo:
    stated = {name: value for name, value in asdict(given).items() if value is not None}
    return Slo(**asdict(of_cluster) | stated)


def _differs(traffic: Traffic, sizing: list[dict[str, Any]]) -> list[str]:
    """What the state does not say may matter: cached prefixes, accepted drafts."""
    if traffic.replica is None or traffic.replica.capacity_rps is None or not sizing[0]["name"].endswith("as it runs"):
        return []
    here = (sizing[0]["now"] or {}).get("capacity_rps")
    there, replicas = traffic.replica.capacity_rps, sizing[0]["replicas"]
    if here is None or abs(here / replicas / there - 1) <= 0.1:
        return []
    return [
        f"the cluster's own model says {there:.3g} requests/s a replica, this plan {here / replicas:.3g}: cached "
        "prefixes and accepted drafts are not in /admin/state; POST /admin/predict has them"
    ]


def _equilibrium(inputs: PlanInputs, runs: Candidate, traffic: Traffic) -> dict[str, Any]:
    mix, time_model, limits = traffic.mix, runs.time_model, runs.limits
    assert time_model is not None and limits is not None
    kv_tokens = limits.kv_capacity_tokens
    equilibrium = solve_fluid(mix, time_model, kv_tokens)
    if not math.isfinite(equilibrium.load + equilibrium.throughput_tokens_per_s):
        raise PlanError("the rates and coefficients are too large: the load is not a finite number")
    wait = wait_thresholds(mix, time_model, kv_tokens)
    nested = nested_wait_thresholds(
        mix, time_model, kv_tokens, segments=inputs.segments, overflow_probability=inputs.overflow_probability,
        whole=False,
    )
    cap = running_cap(mix, kv_tokens, overflow_probability=inputs.overflow_probability)
    return {
        "load": equilibrium.load,
        "iteration_time_s": finite_or_none(equilibrium.iteration_time_s),
        "memory_tokens": finite_or_none(equilibrium.memory_tokens),
        "kv_capacity_tokens": kv_tokens,
        "throughput_tokens_per_s": equilibrium.throughput_tokens_per_s,
        "stable": equilibrium.stable,
        "fits_memory": equilibrium.fits_memory,
        "reason": equilibrium.reason,
        "critical_rate_scale": equilibrium.critical_rate_scale,
        "limit": equilibrium.limit,
        "in_service": finite_or_none(equilibrium.running),
        "types": [
            {
                "name": t.name, "rate_rps": t.rate_rps, "prompt_tokens": t.lengths.mean_prompt_tokens,
                "output_tokens": t.lengths.mean_output_tokens, "inventory_per_stage": finite_or_none(inventory),
            }
            for t, inventory in zip(mix.types, equilibrium.inventories, strict=True)
        ],
        "thresholds": {
            "wait": {"infeasible": wait.reason} if isinstance(wait, Infeasible) else {
                "n": dict(zip([t.name for t in mix.types], wait.n, strict=True)),
                "iteration_s": wait.iteration_s, "memory_tokens": wait.memory_tokens,
            },
            "nested_wait": {"infeasible": nested.reason} if isinstance(nested, Infeasible) else {
                "boundaries": list(nested.boundaries), "n": list(nested.n), "totals": list(nested.totals),
                "survival": list(nested.survival),
                "iteration_s": nested.iteration_s, "memory_tokens": nested.memory_tokens,
                "buffer_tokens": nested.buffer_tokens,
            },
            "max_in_service": cap,
        },
        "law": asdict(time_model),
    }
