"""From targets to a pace: what one replica can promise, and what binds it.

Source: the fluid equilibrium of arXiv 2504.11320 with the longest iteration fixed by a target instead of by the load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from scheduler.fluid import solve_fluid
from scheduler.law import ServiceTimeLaw, require_number
from scheduler.mix import Lengths, WorkloadMix
from scheduler.pace import Pace
from scheduler.thresholds import EngineLimits

_SURVIVAL_POINTS = 48


@dataclass(frozen=True, slots=True)
class Targets:
    """What an operator promises: seconds to the first token, per further token (mean), end to end; None: no promise."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    latency_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "latency_s"):
            value = getattr(self, name)
            if value is not None:
                require_number(name, value, allow_zero=False)


NO_TARGETS = Targets()


@dataclass(frozen=True, slots=True)
class Promise:
    """A pace with the rate it can serve, and which of memory, the TPOT target, the TTFT target or nothing binds."""

    pace: Pace
    capacity_rps: float
    load: float
    binding: str
    goodput_rps: float


def solve_pace(
    mix: WorkloadMix, law: ServiceTimeLaw, limits: EngineLimits, targets: Targets, *, law_error: float = 0.02,
    miss_probability: float = 0.01,
) -> Promise:
    """The pace for `mix` on one replica.

    law_error: relative standard error of a request's mean iteration under the law; the iteration's target keeps
    its quantile of `miss_probability` below the TPOT target.
    """
    z = float(norm.isf(miss_probability))
    lengths = mix.merged().lengths
    iteration_s = None if targets.tpot_s is None else targets.tpot_s / (1 + z * law_error)
    kv_limit = limits.kv_capacity_tokens - limits.block_tokens
    fluid = solve_fluid(mix, law, kv_limit)
    by_memory = fluid.critical_rate_scale * mix.rate_rps
    # With every iteration filled, the time beyond the fixed part is what the work of the arrivals can have.
    filled = 1.0 if iteration_s is None else max(0.0, iteration_s - law.d0_s) / iteration_s
    by_pace = math.inf if iteration_s is None else filled * mix.rate_rps / fluid.load
    capacity = min(by_memory, by_pace)
    load = mix.rate_rps / capacity if capacity > 0 else math.inf
    wait_s = None if targets.ttft_s is None else _useful_wait_s(targets.ttft_s, load)
    pace = Pace(
        law=law, survival=survival_of(lengths), kv_limit_tokens=kv_limit, block_tokens=limits.block_tokens,
        overflow_z=z, iteration_s=iteration_s, ttft_s=targets.ttft_s,
        prompt_flow_tokens=capacity * lengths.mean_prompt_tokens * (iteration_s or 0.0),
        capacity_rps=capacity if math.isfinite(capacity) else 0.0,
        queue_requests=None if wait_s is None else max(1, round(capacity * wait_s)),
    )
    binding = "nothing" if load < 1 else "memory" if by_memory <= by_pace else "TPOT target"
    return Promise(pace, capacity, load, binding, min(mix.rate_rps, capacity))


def survival_of(lengths: Lengths) -> tuple[tuple[int, float], ...]:
    """Output tokens x and P(output > x), just before and at quantiles of the output length, where it falls most."""
    marks = {lengths.output_quantile(q) for q in np.linspace(0, 1, _SURVIVAL_POINTS)}
    at = sorted({0} | marks | {mark - 1 for mark in marks})
    return tuple((x, lengths.survival(x)) for x in at)


def _useful_wait_s(ttft_s: float, load: float) -> float:
    """How long a wait may be that still helps to keep the replica full.

    Up to capacity a queue carries bursts over, as long as the target allows. Beyond it the queue is never empty for
    long, and every second in it is only delay.
    """
    return 0.85 * ttft_s * min(1.0, 1.0 / load**2) if load > 0 else ttft_s
