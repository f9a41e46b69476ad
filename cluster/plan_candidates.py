"""What a plan may run on: a profile, stated coefficients, a model on accelerators, or the cluster as it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.estimated_profile import estimated_profile
from cluster.plan_errors import PlanError
from cluster.plan_traffic import Traffic
from scheduler.config_errors import UsageError
from scheduler.model.accelerators import accelerators
from scheduler.model.estimate import GPU_MEMORY_UTILIZATION, Setup
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import Interval, Profile, load_profile
from scheduler.thresholds import EngineLimits

_BLOCK_TOKENS = 16
_DEFAULTS = 2048, 256
"""max_num_batched_tokens and max_num_seqs of vLLM's server on devices that the table of accelerators does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line's options for candidates. coefficients: d0, d1, d2, d3 and floor; None: from the profile, or 0.
    accelerators: NAME or NAME:TP."""

    profile: str | None = None
    coefficients: Mapping[str, float | None]
    kv_tokens: int | None = None
    model_config: Path | None = None
    accelerators: tuple[str, ...] = ()
    tensor_parallel: int | None = None
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One kind of replica. accelerators: of a replica (0: not stated); interval: of an estimate; error: why it cannot
    run, in a sentence, and then there is no more of it."""

    name: str
    time_model: IterationTimeModel | None = None
    limits: EngineLimits | None = None
    accelerators: int = 0
    interval: Interval | None = None
    error: str | None = None


def candidates(options: Options, traffic: Traffic) -> list[Candidate]:
    """All that is asked for, in the order of the command line.

    Raises:
        PlanError: none is named, or an option cannot be used.
    """
    found = []
    stated = {name: value for name, value in options.coefficients.items() if value is not None}
    if options.profile or stated or (options.kv_tokens is not None and not options.accelerators):
        found.append(_of_profile(options, stated))
    if bool(options.model_config) != bool(options.accelerators):
        raise PlanError("--model-config and --accelerator go together: give a config.json and a device's name")
    if options.model_config is not None:
        found += [_of_accelerator(text, options.model_config, options, traffic) for text in options.accelerators]
    if traffic.replica is not None and not found:
        limits = traffic.replica.limits
        found.append(Candidate(
            name=f"{traffic.replica.model}, as it runs", time_model=traffic.replica.time_model, limits=limits
        ))
    if not found:
        raise PlanError(
            "no iteration-time model is given; give --profile NAME, --model-config FILE with --accelerator NAME, or at "
            "least --d0 and --d1"
        )
    return found


def _limits(options: Options, kv_tokens: int, defaults: tuple[int, int], traffic_tokens: int) -> EngineLimits:
    tokens, requests = defaults
    return EngineLimits(
        kv_capacity_tokens=kv_tokens, block_tokens=min(_BLOCK_TOKENS, kv_tokens - 1) or 1,
        max_num_seqs=options.max_num_seqs or requests,
        max_num_batched_tokens=options.max_num_batched_tokens or tokens, max_model_len=traffic_tokens,
    )


def _of_profile(options: Options, stated: Mapping[str, float]) -> Candidate:
    for name, value in stated.items():
        if not math.isfinite(value) or value < 0:
            raise PlanError(f"--{name} = {value} is not allowed; allowed: a finite number >= 0")
    base = load_profile(options.profile) if options.profile else None
    if base is None and not {"d0", "d1"} <= stated.keys():
        raise PlanError("no iteration-time model is given; give --profile NAME, or at least --d0 and --d1")
    kv_tokens = options.kv_tokens if options.kv_tokens is not None else base.kv_capacity_tokens if base else None
    if kv_tokens is None:
        raise PlanError("--kv-tokens is missing; give the KV cache capacity in tokens (or --profile)")
    if kv_tokens < 1:
        raise PlanError(f"--kv-tokens = {kv_tokens} is not allowed; allowed: a whole number of tokens >= 1")
    interval = base.interval if base and not stated and options.kv_tokens is None else None
    return Candidate(
        name=base.name if base else "as stated", time_model=_with(stated, base),
        limits=_limits(options, kv_tokens, _DEFAULTS, kv_tokens), interval=interval,
    )


def _with(stated: Mapping[str, float], base: Profile | None) -> IterationTimeModel:
    time_model = base.time_model if base else IterationTimeModel(stated["d0"], stated["d1"])
    return IterationTimeModel(
        d0_s=stated.get("d0", time_model.d0_s),
        d1_s_per_kv_token=stated.get("d1", time_model.d1_s_per_kv_token),
        d2_s_per_prefill_token=stated.get("d2", time_model.d2_s_per_prefill_token),
        d3_s_per_decode_token=stated.get("d3", time_model.d3_s_per_decode_token),
        floor_s=stated.get("floor", time_model.floor_s),
    )


def _of_accelerator(text: str, model_config: Path, options: Options, traffic: Traffic) -> Candidate:
    name, colon, degree = text.partition(":")
    if colon and not degree.isdigit():
        raise PlanError(f"--accelerator = {text!r} is not allowed; allowed: NAME or NAME:TP, such as h100:2")
    times = int(degree) if colon else options.tensor_parallel or 1
    lengths = traffic.mix.merged().lengths
    setup = Setup(
        tensor_parallel=times, kv_cache_dtype=options.kv_cache_dtype,
        gpu_memory_utilization=options.gpu_memory_utilization, max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs, context_tokens=max(1, round(lengths.mean_running_kv_tokens)),
    )
    called = f"{name.lower()}:{times}"
    try:
        profile: Profile = estimated_profile(model_config, name, setup)
    except UsageError as error:
        if len(options.accelerators) == 1:
            raise
        return Candidate(name=called, accelerators=times, error=str(error))
    device: Any = accelerators()[name.lower()]
    return Candidate(
        name=called, time_model=profile.time_model, accelerators=times, interval=profile.interval,
        limits=_limits(options, profile.kv_capacity_tokens, device.engine_defaults, profile.kv_capacity_tokens),
    )
