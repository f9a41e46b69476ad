"""`headrace plan`: the fluid model and its thresholds for a given workload, without a cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scheduler.config_errors import UsageError
from scheduler.model.fluid import finite_or_none, solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import load_profile
from scheduler.model.wait_thresholds import Infeasible, nested_wait_thresholds, running_cap, wait_thresholds
from scheduler.model.workload import Lengths, RequestType, WorkloadMix, token_count


class PlanError(UsageError):
    """The plan's inputs cannot be used; the message names the option, the value and what is allowed."""


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """The command line's options. `coefficients` has d0, d1, d2, d3 and floor; None means: from the profile, or 0."""

    types: tuple[str, ...]
    trace: Path | None
    rate: float | None
    profile: str | None
    kv_tokens: int | None
    coefficients: Mapping[str, float | None]
    segments: int
    overflow_probability: float


def make_plan(inputs: PlanInputs) -> dict[str, Any]:
    """The plan as a JSON-ready object; infinite times are null and explained by `reason`.

    Raises:
        PlanError: naming the option and what is allowed.
    """
    try:
        time_model, kv_tokens = _time_model_and_memory(inputs)
        mix, warnings = _mix(inputs)
        equilibrium = solve_fluid(mix, time_model, kv_tokens)
        if not math.isfinite(equilibrium.load + equilibrium.throughput_tokens_per_s):
            raise PlanError("the rates and coefficients are too large: the load is not a finite number")
        wait = wait_thresholds(mix, time_model, kv_tokens)
        nested = nested_wait_thresholds(
            mix, time_model, kv_tokens, segments=inputs.segments, overflow_probability=inputs.overflow_probability,
            whole=False,
        )
        cap = running_cap(mix, kv_tokens, overflow_probability=inputs.overflow_probability)
    except (ValueError, OSError) as error:
        raise PlanError(str(error)) from error
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
        "law": {name: getattr(time_model, name) for name in time_model.__dataclass_fields__},
        "warnings": warnings,
    }


def _time_model_and_memory(inputs: PlanInputs) -> tuple[IterationTimeModel, int]:
    given = {name: value for name, value in inputs.coefficients.items() if value is not None}
    for name, value in given.items():
        if not math.isfinite(value) or value < 0:
            raise PlanError(f"--{name} = {value} is not allowed; allowed: a finite number >= 0")
    base = load_profile(inputs.profile) if inputs.profile else None
    if base is None and not {"d0", "d1"} <= given.keys():
        raise PlanError("no iteration-time model is given; give --profile NAME, or at least --d0 and --d1")
    kv_tokens = inputs.kv_tokens if inputs.kv_tokens is not None else base.kv_capacity_tokens if base else None
    if kv_tokens is None:
        raise PlanError("--kv-tokens is missing; give the KV cache capacity in tokens (or --profile)")
    if kv_tokens < 1:
        raise PlanError(f"--kv-tokens = {kv_tokens} is not allowed; allowed: a whole number of tokens >= 1")

    def coefficient(name: str, of_profile: float) -> float:
        return given.get(name, of_profile)

    time_model = base.time_model if base else IterationTimeModel(d0_s=given["d0"], d1_s_per_kv_token=given["d1"])
    return IterationTimeModel(
        d0_s=coefficient("d0", time_model.d0_s),
        d1_s_per_kv_token=coefficient("d1", time_model.d1_s_per_kv_token),
        d2_s_per_prefill_token=coefficient("d2", time_model.d2_s_per_prefill_token),
        d3_s_per_decode_token=coefficient("d3", time_model.d3_s_per_decode_token),
        floor_s=coefficient("floor", time_model.floor_s),
    ), kv_tokens


def _mix(inputs: PlanInputs) -> tuple[WorkloadMix, list[str]]:
    if bool(inputs.types) == bool(inputs.trace):
        raise PlanError("give the workload either as --type (repeatable) or as --trace FILE with --rate R")
    if inputs.trace is None:
        return WorkloadMix(tuple(_type(text, number) for number, text in enumerate(inputs.types, 1))), []
    if inputs.rate is None or not math.isfinite(inputs.rate) or inputs.rate <= 0:
        raise PlanError(f"--rate = {inputs.rate} is not allowed; allowed: requests per second > 0, with --trace")
    # Here, because only traces need the extra `sim`.
    from simulator.workload.config import WorkloadConfig
    from simulator.workload.requests import open_workload

    workload = open_workload(WorkloadConfig(trace=inputs.trace, rate_rps=inputs.rate))
    return workload.mix(), list(workload.notes())


def _type(text: str, number: int) -> RequestType:
    try:
        parsed = parse_type(text)
    except ValueError as error:
        raise PlanError(f"--type {text!r}: {error}") from error
    return parsed if "name=" in text else replace(parsed, name=f"type-{number}")


def parse_type(text: str) -> RequestType:
    """The request type written as "rate=50,prompt=58,output=147", optionally with "name=chat".

    Without a name it is called p58d147. Raises ValueError naming the key at fault.
    """
    allowed = ("name", "rate", "prompt", "output")
    given: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (s.strip() for s in part.partition("="))
        if key not in allowed or not equals:
            raise ValueError(f"{part.strip()!r} in {text!r}: write key=value with one of the keys {', '.join(allowed)}")
        if key in given:
            raise ValueError(f"{key} is given twice in {text!r}")
        given[key] = value
    if missing := [key for key in allowed[1:] if key not in given]:
        raise ValueError(f"{', '.join(missing)} missing in {text!r}; rate, prompt and output are required")
    try:
        rate_rps = float(given["rate"])
    except ValueError:
        raise ValueError(f"rate is {given['rate']!r}; it must be a number of requests per second") from None
    prompt, output = (token_count(key, given[key]) for key in ("prompt", "output"))
    return RequestType(given.get("name", f"p{prompt}d{output}"), rate_rps, Lengths.point(prompt, output))
