"""From latency targets to the parameters of `fluid`, the capacity of one replica, and its bottleneck.

Source: the fluid equilibrium of arXiv 2504.11320, with the longest iteration set by a target instead of the load, and
with the engine's slots and its token budget as constraints beside memory and time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from scheduler.estimation.iteration_time_error import EXACT, IterationTimeError
from scheduler.fluid_params import ITERATIONS_UNDER_WAY, FluidParams
from scheduler.model.fluid import NO_REUSE, FluidEquilibrium, PrefixReuse, Regimes, solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.littles_law import requests_running
from scheduler.model.probability import ACCEPTED_MISSES
from scheduler.model.queue_limit import FullReplica, queue_limit, waits_in_line, waits_longer
from scheduler.model.steps import ONE_TOKEN_A_STEP, Steps
from scheduler.model.workload import WorkloadMix
from scheduler.survival import Survival
from scheduler.thresholds import EngineLimits
from scheduler.tuning.slo import Slo
from scheduler.tuning.tpot_margin import tpot_margin

_QUEUE_SHARE = 0.1
"""Share of the miss probability spent on an empty queue; the rest covers iteration-time error."""
_LEAST_MARGIN = 0.002
"""Least margin: even an exact model counts requests with their last token under way once more."""
_STAGE_MARGIN = 0.004
"""Added margin per further pipeline stage, which waits when successive batches differ in length."""
_LARGEST_MARGIN = 0.5
"""Largest margin: with larger errors the model no longer describes the hardware."""
_ITERATION_TIMES = 32
_WAIT_SHARE = 0.9
"""Share of the requests in time without a wait that must still be in time with the longest wait."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FluidPlan:
    """The parameters for `fluid`, the capacity they give, and the bottleneck.

    bottleneck: memory, slots, token budget, TPOT target, TTFT target, latency target or nothing.
    limit: what sets the capacity, reached or not: memory, slots, token budget or TPOT target.
    in_time: share of requests of lengths that can meet every target.
    tpot_s, tpot_margin: the TPOT target, and the relative margin of the iterations below it.
    alone_s: seconds per token of one mean request alone, if that is above the TPOT target.
    late: share of the requests that a burst makes wait too long for their first token, below capacity; 1 beyond it.
    """

    fluid: FluidParams
    capacity_rps: float
    load: float
    bottleneck: str
    goodput_rps: float
    in_time: float
    tpot_margin: float
    tpot_s: float | None
    equilibrium: FluidEquilibrium
    alone_s: float | None = None
    limit: str = ""
    late: float = 0.0


def solve_fluid_params(
    mix: WorkloadMix, time_model: IterationTimeModel, limits: EngineLimits, targets: Slo, *,
    error: IterationTimeError = EXACT, miss_probability: float = ACCEPTED_MISSES, dispersion: float = 1.0,
    reuse: PrefixReuse = NO_REUSE, steps: Steps = ONE_TOKEN_A_STEP, realised_margin: float = 0.0,
    delivery_s: float = 0.0,
) -> FluidPlan:
    """The parameters for `mix` on one replica.

    error: of iterations under the model; it sets the margin with which all but `miss_probability` of requests meet the
        TPOT target. realised_margin: the margin that the latest requests would have needed, used if larger.
    dispersion: variance over mean of the arrival counts.
    delivery_s: seconds from a first token in the engine until its client has it, subtracted from the TTFT target.
    """
    lengths = mix.merged().lengths
    capacity = _Capacity(mix, time_model, limits, reuse, steps)
    modelled_margin = tpot_margin(lengths, error, (1 - _QUEUE_SHARE) * miss_probability, steps)
    margin = max(modelled_margin, realised_margin, _LEAST_MARGIN) + _STAGE_MARGIN * (steps.depth - 1)
    margin = min(margin, _LARGEST_MARGIN)
    token_s = None if targets.tpot_s is None else targets.tpot_s / (1 + margin)
    within = capacity.within_latency(token_s, targets.delivered_within(delivery_s), margin)
    iteration_s = within.iteration_s
    served_rps, limit = capacity.at(iteration_s)
    known_rps = served_rps if math.isfinite(served_rps) else 0.0
    planned_s = None if token_s is None else capacity.iteration_of(token_s)
    reachable = iteration_s is None or planned_s is None or planned_s >= capacity.alone_s
    if not reachable:  # plan for one request alone; the capacity still follows from the target
        served_rps, limit = capacity.at(planned_s)
    load = mix.rate_rps / served_rps if served_rps > 0 else math.inf
    steady_s = capacity.iteration_s(min(mix.rate_rps, served_rps), iteration_s)
    params = FluidParams(
        time_model=time_model, survival=Survival.of(lengths), kv_limit_tokens=capacity.kv_limit_tokens,
        block_tokens=limits.block_tokens, overflow_z=-float(ndtri(miss_probability)), iteration_s=iteration_s,
        tpot_s=targets.tpot_s, ttft_s=targets.ttft_s, latency_s=targets.latency_s,
        first_token_within_s=within.first_token_s, delivery_s=delivery_s, miss_probability=miss_probability,
        prompt_flow_tokens=known_rps * lengths.mean_prompt_tokens * reuse.computed * (iteration_s or 0.0),
        capacity_rps=known_rps, steady_s=steady_s, variability=capacity.decode_share,
        tokens_per_step=steps.tokens, computed_per_step=steps.computed, pipeline_depth=steps.depth,
    )
    soon, late = 1.0, float(load >= 1)
    if within.first_token_s is not None:
        spare_s = within.first_token_s - capacity.first_token_s(params, load)
        soon = float(lengths.weights @ (spare_s >= 0))
        if known_rps > mix.rate_rps:
            waits = capacity.late(params, load, spare_s, dispersion)
            late = float(lengths.weights @ np.where(spare_s >= 0, waits, 0.0))
        params = replace(params, queue_limit=capacity.queue_limit(params, spare_s, miss_probability, dispersion))
    # Requests that cannot meet their first-token limit are rejected and take no capacity.
    if load * soon >= 1:
        bottleneck = limit
    elif 1 - soon > miss_probability:
        bottleneck = "TTFT target" if targets.ttft_s is not None else "latency target"
    else:
        bottleneck = "nothing"
    return FluidPlan(
        fluid=params, capacity_rps=served_rps, load=load, bottleneck=bottleneck,
        goodput_rps=min(mix.rate_rps * soon, served_rps) * within.share, in_time=soon * within.share,
        tpot_margin=margin, tpot_s=targets.tpot_s, equilibrium=capacity.fluid,
        alone_s=None if reachable else capacity.alone_s, limit=limit, late=late,
    )


@dataclass(frozen=True, slots=True)
class _Within:
    """The longest iteration and first-token time within the targets, and the share of requests that can meet a latency
    target with these."""

    iteration_s: float | None
    first_token_s: float | None
    share: float = 1.0


class _Capacity:
    """The capacity of one replica for a mix, by memory, slots, token budget and time."""

    def __init__(
        self, mix: WorkloadMix, time_model: IterationTimeModel, limits: EngineLimits, reuse: PrefixReuse, steps: Steps
    ) -> None:
        self._time_model, self._reuse, self._steps, self._rate_rps = time_model, reuse, steps, mix.rate_rps
        self._lengths = mix.merged().lengths
        self.kv_limit_tokens = limits.kv_capacity_tokens - limits.block_tokens
        self._slots, self._budget = limits.most_running, limits.max_num_batched_tokens
        self.fluid = solve_fluid(mix, time_model, self.kv_limit_tokens, reuse, steps)
        # Seconds of work per request, in all, and the part on top of the floor.
        decode_s = time_model.added_s(decode_tokens=self._lengths.mean_output_tokens) * steps.computed_per_token
        kv_work_s = self.fluid.kv_load / mix.rate_rps
        self._prefill_work_s = self.fluid.prefill_load / mix.rate_rps
        self._work_s = kv_work_s + self._prefill_work_s + decode_s
        self._regimes = Regimes.of(time_model, self._work_s, kv_work_s)
        self._life = steps.life(self._lengths.mean_output_tokens)
        self._by_memory = self.fluid.critical_rate_scale * mix.rate_rps
        computed = self._lengths.mean_output_tokens * steps.computed_per_token
        self._tokens = self._lengths.mean_prompt_tokens * reuse.computed + computed

    @property
    def alone_s(self) -> float:
        """Seconds of an iteration with one request, the lower bound of every target."""
        steps = self._steps
        return self._time_model.iteration_s(0.0, steps.computed, float(self._lengths.mean_running_kv_tokens))

    def at(self, iteration_s: float | None) -> tuple[float, str]:
        """Requests/s with iterations of at most `iteration_s`, and the bottleneck."""
        limits = {
            "memory": self._by_memory,
            "slots": self._regimes.most_by_count(self._slots, self._life * self._steps.depth),
            "token budget": self._regimes.most_by_count(self._budget, self._tokens),
            "TPOT target": math.inf if iteration_s is None else self._regimes.most_by_time(iteration_s),
        }
        limit = min(limits, key=lambda name: limits[name])
        return limits[limit], limit

    def iteration_s(self, rate_rps: float, most_s: float | None) -> float:
        """The equilibrium's iteration time at `rate_rps`; 0 if there is no equilibrium."""
        seconds = self._regimes.iteration_s(rate_rps)
        if math.isinf(seconds):
            return most_s or 0.0
        return seconds if most_s is None else min(seconds, most_s)

    @property
    def decode_share(self) -> float:
        """Share of a request's work that its prompt does not determine."""
        return 1 - self._prefill_work_s / self._work_s if self._work_s else 1.0

    def within_latency(self, token_s: float | None, targets: Slo, margin: float) -> _Within:
        """The iteration time with the most requests in time: (first token) + (l' − 1)·(time per token) <= latency.

        Below capacity the load sets the iteration time; above it, shorter iterations serve fewer requests, but more of
        the long ones in time.
        """
        longest_s = None if token_s is None else max(self.iteration_of(token_s), self.alone_s)
        if targets.latency_s is None:
            return _Within(longest_s, targets.ttft_s)
        natural_s = self.iteration_s(min(self._rate_rps, 0.999 * self.at(longest_s)[0]), longest_s)
        candidates: list[float | None] = [longest_s]
        if natural_s > self.alone_s:
            just_in_time = np.clip(self._just_in_time_s(targets.latency_s, margin), self.alone_s, natural_s)
            candidates += np.unique(just_in_time).tolist()
        best, best_rps = _Within(longest_s, targets.ttft_s), -1.0
        for candidate in candidates:
            served_rps = min(self._rate_rps, self.at(candidate)[0])
            iteration_s = self.iteration_s(min(served_rps, 0.999 * self.at(candidate)[0]), candidate)
            share = self._share_in_time(targets.latency_s, iteration_s * (1 + margin), 0.0)
            if served_rps * share > best_rps * (1 + 1e-3):
                best_rps = served_rps * share
                wait_s = self._longest_wait_s(targets.latency_s, iteration_s * (1 + margin), share)
                if targets.ttft_s is not None:
                    wait_s = min(wait_s, targets.ttft_s)
                best = _Within(candidate, wait_s, share)
        return best

    def _just_in_time_s(self, latency_s: float, margin: float) -> Floats:
        """For each quantile of the output length, the iteration time that just meets a latency target."""
        longest = self._lengths.output_quantiles(np.linspace(0, 1, _ITERATION_TIMES)).astype(np.float64)
        steps = self._iterations_to_first_token + (longest - 1) * self._steps.depth / self._steps.tokens
        return np.asarray(max(latency_s - self._prefill_s, 0.0) / steps / (1 + margin) * (1 - 1e-9))

    @property
    def _prefill_s(self) -> float:
        return self._time_model.added_s(prefill_tokens=self._lengths.mean_prompt_tokens * self._reuse.computed)

    @property
    def _iterations_to_first_token(self) -> int:
        return ITERATIONS_UNDER_WAY + self._steps.depth

    def iteration_of(self, token_s: float) -> float:
        return token_s * self._steps.tokens / self._steps.depth

    def _share_in_time(self, latency_s: float, iteration_s: float, wait_s: float) -> float:
        """Share of requests in time, given their wait and the iteration time (seconds)."""
        token_s = iteration_s * self._steps.depth / self._steps.tokens
        left_s = latency_s - wait_s - self._iterations_to_first_token * iteration_s - self._prefill_s
        return 1.0 - self._lengths.survival(1 + left_s / token_s + 1e-9) if left_s >= 0 else 0.0

    def _longest_wait_s(self, latency_s: float, iteration_s: float, share: float) -> float:
        """The longest wait for a first token that leaves nearly as many requests in time as none."""
        waits = np.linspace(0.0, latency_s, 64)
        good = [self._share_in_time(latency_s, iteration_s, wait_s) >= _WAIT_SHARE * share for wait_s in waits]
        wait_s = float(waits[max(index for index, fine in enumerate(good) if fine)])
        return max(wait_s, latency_s / 20) + self._iterations_to_first_token * iteration_s

    def first_token_s(self, params: FluidParams, load: float) -> Floats:
        """Seconds to the first token, for each of the lengths, without a wait and beside the decodes of `load`."""
        iteration_s = params.iteration_s
        prompts = np.asarray(self._lengths.prompt_tokens * self._reuse.computed, dtype=np.float64)
        if iteration_s is None:
            own_s = params.time_model.iteration_s(prompts, 0.0, prompts)
            under_way_s = (self._iterations_to_first_token - 1) * params.time_model.shortest_iteration_s
            return np.asarray(under_way_s + own_s, dtype=np.float64)
        room = self._prompt_room(params, load, iteration_s)
        iterations = self._iterations_to_first_token - 1 + np.ceil(prompts / room)
        return np.asarray(iteration_s * iterations, dtype=np.float64)

    def _prompt_room(self, params: FluidParams, load: float, iteration_s: float) -> float:
        """Prompt tokens that an iteration computes beside the decodes of `load`."""
        decode_s = (self._work_s - self._prefill_work_s) * self._rate_rps * min(1.0, 1.0 / load) * iteration_s
        room = params.time_model.prompt_tokens_within(iteration_s, 0.0, 0.0, other_s=decode_s)
        return max(room, params.prompt_flow_tokens, 1.0)

    def late(self, params: FluidParams, load: float, spare_s: Floats, dispersion: float) -> Floats:
        """P(a request waits longer than `spare_s`) below capacity: for a place to run in, or behind other prompts."""
        prompts = np.asarray(self._lengths.prompt_tokens * self._reuse.computed, dtype=np.float64)
        if params.iteration_s is None:
            others = min((self._work_s - self._prefill_work_s) * self._rate_rps, 0.99)
            service_s = np.asarray(params.time_model.added_s(prefill_tokens=prompts, kv_tokens=prompts) / (1 - others))
        else:
            service_s = prompts * params.iteration_s / self._prompt_room(params, load, params.iteration_s)
        behind = waits_in_line(spare_s, self._rate_rps, service_s, self._lengths.weights, dispersion=dispersion)
        place = waits_longer(self.full_replica(params, dispersion), self._rate_rps, spare_s)
        return np.minimum(behind + place, 1.0)

    def queue_limit(
        self, params: FluidParams, spare_s: Floats, miss_probability: float, dispersion: float
    ) -> int | None:
        """Most waiting requests above capacity, >= 1; None (unlimited) below it.

        Below capacity a queue drains: only requests that would be late are rejected. Requests that cannot be in time do
        not count.
        """
        lengths, served_rps = self._lengths, params.capacity_rps
        if not served_rps or self._rate_rps <= served_rps:
            return None
        in_time = spare_s >= 0
        spare = float(np.average(spare_s[in_time], weights=lengths.weights[in_time])) if in_time.any() else 0.0
        return queue_limit(
            self.full_replica(params, dispersion), self._rate_rps, miss_probability=_QUEUE_SHARE * miss_probability,
            most_requests=served_rps * spare,
        )

    def full_replica(self, params: FluidParams, dispersion: float) -> FullReplica:
        """The replica at capacity, as the birth-death chain of its running and waiting requests needs it."""
        time_model, lengths, served_rps = self._time_model, self._lengths, params.capacity_rps
        most = params.kv_limit_tokens / lengths.mean_running_kv_tokens
        iteration_s = params.iteration_s
        if iteration_s is None:
            iteration_s = time_model.iteration_s(0.0, min(most, float(self._slots)), float(params.kv_limit_tokens))
        running = requests_running(served_rps, self._life * self._steps.depth, iteration_s)
        work_s = time_model.added_s(
            prefill_tokens=lengths.prompt_tokens * self._reuse.computed,
            decode_tokens=lengths.output_tokens * self._steps.computed_per_token,
            kv_tokens=lengths.kv_token_iterations_each / self._steps.tokens,
        )
        mean_s = float(lengths.weights @ work_s)
        work_variation = float(lengths.weights @ (work_s - mean_s) ** 2) / mean_s**2 if mean_s > 0 else 0.0
        rate_rps = self._rate_rps
        return FullReplica(
            capacity_rps=served_rps, running=min(most, float(self._slots), running),
            fixed_share=min(1.0, time_model.shortest_iteration_s / iteration_s),
            admitted_per_iteration=served_rps * iteration_s, dispersion=dispersion,
            variability=(rate_rps * dispersion + served_rps * work_variation) / (rate_rps + served_rps),
        )
