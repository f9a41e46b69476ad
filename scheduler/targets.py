"""From targets to a pace: what one replica can promise, and what binds it.

Source: the fluid equilibrium of arXiv 2504.11320 with the longest iteration fixed by a target instead of by the load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from scheduler.fluid import FluidEquilibrium, solve_fluid
from scheduler.law import ServiceTimeLaw, require_number
from scheduler.margin import EXACT, Fluctuation, tpot_margin
from scheduler.mix import Lengths, WorkloadMix
from scheduler.pace import Pace
from scheduler.queue_length import fixed_share, useful_queue
from scheduler.thresholds import EngineLimits

_SURVIVAL_POINTS = 48
_PIPELINE_ITERATIONS = 3
"""A prompt's own iteration, the one under way and the one composed already."""
_QUEUE_SHARE = 0.1
"""Of the miss probability, what a queue that runs dry may cost; the rest is for iterations that stray from the law."""
Floats = NDArray[np.float64]


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
    """A pace with the rate it can serve, and which of memory, TPOT target, TTFT target or nothing binds.

    in_time: share of requests whose lengths allow them to meet every target. tpot_margin: how far, relative to them,
    iterations stay below `tpot_s`, the TPOT target. A latency target counts as the TPOT and TTFT targets that follow
    from it.
    """

    pace: Pace
    capacity_rps: float
    load: float
    binding: str
    goodput_rps: float
    in_time: float
    tpot_margin: float
    tpot_s: float | None


def solve_pace(
    mix: WorkloadMix, law: ServiceTimeLaw, limits: EngineLimits, targets: Targets, *,
    fluctuation: Fluctuation = EXACT, miss_probability: float = 0.01, dispersion: float = 1.0,
) -> Promise:
    """The pace for `mix` on one replica.

    fluctuation: of iterations under the law; the longest iteration stays so far below the TPOT target that all but
    `miss_probability` of requests meet it. dispersion: of the arrivals, the variance of their counts over its mean.
    """
    lengths = mix.merged().lengths
    margin = tpot_margin(lengths, fluctuation, (1 - _QUEUE_SHARE) * miss_probability)
    kv_limit = limits.kv_capacity_tokens - limits.block_tokens
    fluid = solve_fluid(mix, law, kv_limit)
    by_memory = fluid.critical_rate_scale * mix.rate_rps
    work_s = fluid.load / mix.rate_rps
    within = _within_latency(lengths, fluid, law, targets, mix.rate_rps, by_memory, margin)
    iteration_s = None if within.tpot_s is None else within.tpot_s / (1 + margin)
    by_pace = math.inf if iteration_s is None else _by_pace(law, iteration_s, work_s)
    capacity = min(by_memory, by_pace)
    load = mix.rate_rps / capacity if capacity > 0 else math.inf
    pace = Pace(
        law=law, survival=survival_of(lengths), kv_limit_tokens=kv_limit, block_tokens=limits.block_tokens,
        overflow_z=-float(ndtri(miss_probability)), iteration_s=iteration_s, ttft_s=within.ttft_s,
        prompt_flow_tokens=capacity * lengths.mean_prompt_tokens * (iteration_s or 0.0),
        capacity_rps=capacity if math.isfinite(capacity) else 0.0,
    )
    soon = 1.0
    if within.ttft_s is not None:
        spare_s = within.ttft_s - _first_token_s(pace, lengths, fluid, load)
        soon = float(lengths.weights @ (spare_s >= 0))
        queue = _queue_requests(pace, mix.rate_rps, capacity, lengths, spare_s, miss_probability, dispersion)
        pace = replace(pace, queue_requests=queue)
    # Whose first token cannot be in time is refused, and takes no capacity.
    if load * soon >= 1:
        binding = "memory" if by_memory <= by_pace else "TPOT target"
    else:
        binding = "TTFT target" if 1 - soon > miss_probability else "nothing"
    goodput = min(mix.rate_rps * soon, capacity) * within.share
    return Promise(pace, capacity, load, binding, goodput, soon * within.share, margin, within.tpot_s)


def survival_of(lengths: Lengths) -> tuple[tuple[int, float], ...]:
    """Output tokens x and P(output > x), just before and at quantiles of the output length, where it falls most."""
    marks = lengths.output_quantiles(np.linspace(0, 1, _SURVIVAL_POINTS))
    at = np.unique(np.concatenate([[0], marks, marks - 1]))
    return tuple(zip(at.tolist(), lengths.survivals(at).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class _Within:
    """Targets for the first token and per further token, and the share of requests that meet the latency with them."""

    ttft_s: float | None
    tpot_s: float | None
    share: float = 1.0


def _within_latency(
    lengths: Lengths, fluid: FluidEquilibrium, law: ServiceTimeLaw, targets: Targets, rate_rps: float,
    by_memory: float, margin: float,
) -> _Within:
    """The targets per token that a latency target leaves: a request of l' tokens takes ttft + (l' − 1)·tpot.

    Every quantile of l' could be the longest answer to be in time; the one with the most goodput is. Without a TTFT
    target the first token's part of the latency is what its prompt is of a request's work.
    """
    if targets.latency_s is None:
        return _Within(targets.ttft_s, targets.tpot_s)
    # Tokens after the first take time also where prompts alone have a price.
    prompt_share = min(fluid.prefill_load / fluid.load, 0.9) if fluid.load else 0.0
    latency_s = targets.latency_s
    longest = np.unique(lengths.output_quantiles(np.linspace(0, 1, _SURVIVAL_POINTS))).astype(np.float64)
    tpot_s = latency_s * (1 - prompt_share) / (longest - 1 + _PIPELINE_ITERATIONS)
    ttft_s = latency_s * prompt_share + _PIPELINE_ITERATIONS * tpot_s
    if targets.ttft_s is not None and targets.ttft_s < latency_s:
        late = ttft_s > targets.ttft_s
        ttft_s = np.where(late, targets.ttft_s, ttft_s)
        tpot_s = np.where(late, (latency_s - targets.ttft_s) / np.maximum(longest - 1, 1), tpot_s)
    if targets.tpot_s is not None:
        tpot_s = np.minimum(tpot_s, targets.tpot_s)
    share = 1.0 - lengths.survivals(1 + (latency_s - ttft_s) / tpot_s + 1e-9)
    by_pace = np.array([_by_pace(law, p / (1 + margin), fluid.load / rate_rps) for p in tpot_s])
    goodput = np.minimum(np.minimum(by_pace, by_memory), rate_rps) * share
    best = int(np.argmax(goodput))
    return _Within(float(ttft_s[best]), float(tpot_s[best]), float(share[best]))


def _by_pace(law: ServiceTimeLaw, iteration_s: float, work_s: float) -> float:
    """Requests/s with every iteration filled: the time beyond the fixed part is what their work can have."""
    share = max(0.0, iteration_s - law.d0_s) / iteration_s
    if work_s > 0:
        return share / work_s
    return math.inf if share else 0.0  # work that takes no time is done at any rate, in an iteration that can be


def _first_token_s(pace: Pace, lengths: Lengths, fluid: FluidEquilibrium, load: float) -> Floats:
    """Seconds to the first token of each of `lengths` without a wait, beside the decodes that are served at `load`."""
    decode_load = (fluid.load - fluid.prefill_load) * min(1.0, 1.0 / load)
    room = pace.room_tokens(pace.law.d0_s + decode_load * (pace.iteration_s or 0.0))
    return np.asarray(pace.first_token_s(lengths.prompt_tokens, room), dtype=np.float64)


def _queue_requests(
    pace: Pace, rate_rps: float, capacity_rps: float, lengths: Lengths, spare_s: Floats, miss_probability: float,
    dispersion: float,
) -> int:
    """How many waiting requests are of use, at the least one; those that cannot be in time do not count."""
    law, kv = pace.law, lengths.mean_resident_kv_tokens
    in_service = pace.kv_limit_tokens / kv
    iteration_s = pace.iteration_s
    if iteration_s is None:
        iteration_s = law.iteration_s(0.0, in_service, float(pace.kv_limit_tokens))
    in_service = min(in_service, capacity_rps * iteration_s * (lengths.mean_output_tokens + 1))
    work_s = (
        law.d1_s_per_kv_token * lengths.kv_token_iterations_each
        + law.d2_s_per_prefill_token * lengths.prompt_tokens + law.d3_s_per_decode_token * lengths.output_tokens
    )
    mean_s = float(lengths.weights @ work_s)
    work_variation = float(lengths.weights @ (work_s - mean_s) ** 2) / mean_s**2 if mean_s > 0 else 0.0
    in_time = spare_s >= 0
    spare = float(np.average(spare_s[in_time], weights=lengths.weights[in_time])) if in_time.any() else 0.0
    return useful_queue(
        rate_rps=rate_rps, capacity_rps=capacity_rps, in_service=in_service,
        slowdown=fixed_share(law, iteration_s), admitted_per_iteration=capacity_rps * iteration_s,
        variability=(rate_rps * dispersion + capacity_rps * work_variation) / (rate_rps + capacity_rps),
        miss_probability=_QUEUE_SHARE * miss_probability, most_requests=capacity_rps * spare,
    )
