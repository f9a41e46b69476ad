"""The traffic of a plan: stated types, a trace, or what a running cluster has estimated of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.plan_errors import PlanError
from scheduler.estimation.iteration_time_error import PUBLISHED_MAPE, IterationTimeError
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.workload import Lengths, RequestType, WorkloadMix, token_count
from scheduler.survival import Survival
from scheduler.thresholds import EngineLimits
from scheduler.tuning.slo import NO_SLO, Slo

ONE_WORKLOAD = (
    "give the workload either as --type (repeatable), as --trace FILE with --rate R, or as --from URL"
)
_ERROR = IterationTimeError.from_mape(PUBLISHED_MAPE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A replica as a running cluster reports it: its engine's limits, the law that it has measured, the targets."""

    model: str
    time_model: IterationTimeModel
    limits: EngineLimits
    capacity_rps: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What arrives. dispersion: variance over mean of the arrivals' counts. error: of iterations under the model.
    targets: the cluster's; replica: one of it, and how many there are; None: the traffic is stated."""

    mix: WorkloadMix
    warnings: tuple[str, ...] = ()
    dispersion: float = 1.0
    error: IterationTimeError = _ERROR
    targets: Slo = NO_SLO
    replica: Replica | None = None
    replicas: int = 0


def stated_traffic(types: tuple[str, ...], trace: Path | None, rate: float | None) -> Traffic:
    """The traffic of --type, or of --trace at --rate.

    Raises:
        PlanError: naming the option and what is allowed.
    """
    if bool(types) == bool(trace):
        raise PlanError(ONE_WORKLOAD)
    if trace is None:
        return Traffic(mix=WorkloadMix(tuple(_type(text, number) for number, text in enumerate(types, 1))))
    if rate is None or not math.isfinite(rate) or rate <= 0:
        raise PlanError(f"--rate = {rate} is not allowed; allowed: requests per second > 0, with --trace")
    # Here, because only traces need the extra `sim`.
    from simulator.workload.config import WorkloadConfig
    from simulator.workload.requests import open_workload

    workload = open_workload(WorkloadConfig(trace=trace, rate_rps=rate))
    return Traffic(mix=workload.mix(), warnings=tuple(workload.notes()))


def traffic_of_cluster(state: Mapping[str, Any], model: str | None, rate: float | None = None) -> Traffic:
    """The traffic that a cluster has estimated, from its `/admin/state`: the rates of all replicas of a model, admitted
    and rejected alike, and the lengths of the replica that has seen most. rate: in place of the estimated one.

    Output lengths are its survival function, prompts their mean: no more of them is in the state.

    Raises:
        PlanError: nothing is known yet, or several models are served and none is named.
    """
    tuned = {
        name: one for name, one in state.get("replicas", {}).items()
        if one.get("forecast") and (one.get("thresholds") or {}).get("fluid")
    }
    models = sorted({one["model"] for one in tuned.values()})
    if not tuned:
        raise PlanError("the cluster has no estimates yet: no replica is tuned by policy fluid; see headrace status")
    if model is None and len(models) > 1:
        raise PlanError(f"the cluster serves several models; give --model, one of {', '.join(models)}")
    if model is not None and model not in models:
        raise PlanError(f"--model = {model!r} is not served there; allowed: {', '.join(models)}")
    chosen = [one for one in tuned.values() if one["model"] == (model or models[0])]
    known = max(chosen, key=lambda one: (not one["forecast"]["cold"], one["forecast"]["survival_samples"]))
    forecast = known["forecast"]
    rate_rps = rate or sum(one["forecast"]["rate_rps"]["value"] for one in chosen)
    if rate_rps <= 0:
        raise PlanError("no request has arrived there lately; give --rate, the requests per second to plan for")
    lengths = lengths_of(Survival(tuple(map(tuple, known["thresholds"]["fluid"]["survival"]))), forecast)
    limits = _fields_of(EngineLimits, known["limits"])
    error = forecast["iteration_error_std"]
    warnings = ["prompt lengths are the cluster's mean: /admin/state has no more of them"]
    if forecast["cold"]:
        warnings.append("output lengths are still a prior there: too few requests have finished")
    return Traffic(
        mix=WorkloadMix.from_lengths(lengths.within(limits.longest_request), rate_rps), warnings=tuple(warnings),
        dispersion=forecast["dispersion"] or 1.0,
        error=IterationTimeError(std=error["value"] or 0.0, correlation=forecast["iteration_error_correlation"] or 0.0),
        targets=Slo(**(known.get("targets") or {})), replicas=len(chosen),
        replica=Replica(
            model=known["model"], time_model=_fields_of(IterationTimeModel, known["time_model"]),
            limits=limits, capacity_rps=forecast["capacity_rps"],
        ),
    )


def _fields_of(kind: type, found: Mapping[str, Any]) -> Any:
    return kind(**{field.name: found[field.name] for field in fields(kind) if field.name in found})


def lengths_of(survival: Survival, forecast: Mapping[str, Any]) -> Lengths:
    """Output lengths of that survival, in steps of equal probability, with the mean prompt."""
    tokens, left = survival.tokens, survival.at(survival.tokens.astype(np.int64))
    marks = (np.arange(200) + 0.5) / 200
    # The survival falls from left to right; np.interp wants rising x.
    outputs = np.interp(marks, 1 - left, tokens)
    prompt = max(1, round(forecast["prompt_tokens"]["value"] or 1))
    return Lengths.from_pairs((prompt, max(1, round(float(output)))) for output in outputs)


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
