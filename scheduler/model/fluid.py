"""Fluid equilibrium of one replica: its load, and whether its speed and memory are sufficient.

Source: arXiv 2504.11320, the fluid benchmark, with the iteration-time model's terms for prefill and decode compute
added. Arrivals are a steady flow and every prompt is processed in every iteration, so that each stage s = 0..l' of type
j holds the same n_j prompts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scheduler.model.iteration_time import IterationTimeModel, require_number
from scheduler.model.littles_law import requests_running
from scheduler.model.steps import ONE_TOKEN_A_STEP, Steps
from scheduler.model.workload import WorkloadMix

COMPUTE_BOUND_GAIN = 0.05
"""Compute is called the limit when unlimited memory would raise the critical rate by less than this fraction."""


@dataclass(frozen=True, slots=True)
class FluidEquilibrium:
    """The equilibrium of `solve_fluid`.

    load: ρ, seconds of work that arrive per second; prefill_load and kv_load are its shares d2·Λ_l and d1·Λ_W.
    stable: ρ < 1. fits_memory: M* <= C and the largest single request fits. reason: why not, in words; None if both.
    iteration_time_s: ΔT*, and memory_tokens: M*; both infinite when unstable.
    throughput_tokens_per_s: Σ λ_j E[l'_j], the output tokens demanded; delivered only if stable and within memory.
    inventories: n_j* = λ_j ΔT*, prompts of type j in each stage. running: Σ n_j* E[l'_j + 1] prompts.
    critical_rate_scale: multiplier of all rates at which M* reaches C or ρ reaches 1; every smaller one is
        feasible. 0 when a single request exceeds the memory.
    limit: what keeps that multiplier from growing, see `COMPUTE_BOUND_GAIN`.
    """

    load: float
    prefill_load: float
    kv_load: float
    stable: bool
    fits_memory: bool
    reason: str | None
    iteration_time_s: float
    memory_tokens: float
    kv_capacity_tokens: int
    throughput_tokens_per_s: float
    inventories: tuple[float, ...]
    running: float
    critical_rate_scale: float
    limit: Literal["memory", "compute"]


@dataclass(frozen=True, slots=True)
class PrefixReuse:
    """The effect of the prefix cache, as shares of prompt tokens (0 to 1).

    computed: tokens that the engine computes; private: tokens in KV blocks that no other running request holds.
    """

    computed: float = 1.0
    private: float = 1.0


NO_REUSE = PrefixReuse()


@dataclass(frozen=True, slots=True)
class Regimes:
    """Iteration time under a steady flow: the longer of two regimes, above the model's floor and at it.

    At rate r an iteration takes τ = fixed + r·work·τ in each. branches: the pairs (fixed, seconds; work, seconds per
    unit of the rate).
    """

    branches: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, time_model: IterationTimeModel, work_s: float, kv_work_s: float) -> "Regimes":
        """work_s: seconds of work per unit of the rate; kv_work_s: its part for reading the KV cache."""
        return cls(((time_model.d0_s, work_s), (time_model.floor_s, kv_work_s)))

    def iteration_s(self, rate: float) -> float:
        """The equilibrium's iteration time; infinite if a second brings a second of work or more."""
        if not math.isfinite(rate) or any(rate * work_s >= 1 for _, work_s in self.branches):
            return math.inf
        return max(fixed_s / (1 - rate * work_s) for fixed_s, work_s in self.branches)

    def most_by_count(self, most: float, each: float) -> float:
        """The highest rate r with r·τ·each <= most: a resource of size `most`, used by `each` per unit of the rate.

        Infinite when nothing limits it.
        """
        return min(
            (most / (fixed_s * each + work_s * most) for fixed_s, work_s in self.branches if fixed_s > 0 or work_s > 0),
            default=math.inf,
        )

    def most_by_time(self, iteration_s: float) -> float:
        """The highest rate with iterations of at most `iteration_s`, filled with work beyond the fixed part."""
        return min(
            max(0.0, 1 - fixed_s / iteration_s) / work_s if work_s else math.inf if fixed_s < iteration_s else 0.0
            for fixed_s, work_s in self.branches
        )


def solve_fluid(
    mix: WorkloadMix, time_model: IterationTimeModel, kv_capacity_tokens: int, reuse: PrefixReuse = NO_REUSE,
    steps: Steps = ONE_TOKEN_A_STEP,
) -> FluidEquilibrium:
    """The fluid equilibrium of `mix` on one replica.

    With the work that arrives per second, Λ_W KV-token-iterations, Λ_l prefill and Λ_o decode tokens,

        ρ = d1 Λ_W + d2 Λ_l + d3 Λ_o          ΔT* = max(floor/(1 − d1 Λ_W), d0/(1 − ρ))          M* = Λ_W ΔT*

    ΔT* solves ΔT = max(floor, d0 + (d2 Λ_l + d3 Λ_o) ΔT) + d1 Λ_W ΔT. With floor = d2 = d3 = 0 this is the paper's
    equilibrium. An unstable demand, or one that does not fit, is a result with a reason.

    reuse: Λ_l counts computed prompt tokens, Λ_W in ΔT* all tokens that attention reads, Λ_W in M* private ones.
    steps: with several tokens per step a request lives fewer iterations, and Λ_o counts the tokens computed in them;
        inventories are prompts per iteration of a life. In a pipeline of depth D each iteration has one of D groups
        of prompts: M* = D Λ_W ΔT*, and inventories and running count all groups.
    Raises ValueError when every rate is zero and for a capacity below one token.
    """
    require_number("kv_capacity_tokens", kv_capacity_tokens, allow_zero=False)
    rates_rps = [t.rate_rps for t in mix.types]
    if mix.rate_rps == 0:
        raise ValueError("rate_rps is 0 for every type; at least one must be > 0")

    flow = _stage_tokens(rates_rps, mix, reuse, steps)
    kv_load = time_model.d1_s_per_kv_token * flow.kv_tokens
    prefill_load = time_model.d2_s_per_prefill_token * flow.prefill_tokens
    load = kv_load + prefill_load + time_model.d3_s_per_decode_token * flow.decode_tokens
    stable = load < 1
    regimes = Regimes.of(time_model, load, kv_load)
    iteration_time_s = regimes.iteration_s(1.0)
    memory_flow = steps.depth * flow.memory_tokens
    memory_tokens = memory_flow * iteration_time_s
    # The multiplier s of all rates at which M*(s) = C. It never exceeds 1/ρ, where unlimited memory would lead.
    critical = regimes.most_by_count(kv_capacity_tokens, memory_flow)
    limit: Literal["memory", "compute"] = (
        "compute" if critical * load * (1 + COMPUTE_BOUND_GAIN) > 1 else "memory"
    )

    reason = None
    if mix.max_total_tokens > kv_capacity_tokens:
        reason = f"one request of {mix.max_total_tokens} tokens exceeds the KV capacity of {kv_capacity_tokens} tokens"
        critical, limit = 0.0, "memory"
    elif not stable:
        reason = f"load is {load:.3f} s of work per second, not below 1 (at most {critical:.3f} of the rate fits)"
    elif memory_tokens > kv_capacity_tokens:
        reason = (
            f"equilibrium memory is {memory_tokens:.0f} tokens, above the KV capacity of {kv_capacity_tokens} tokens "
            f"(at most {critical:.3f} of the rate fits)"
        )
    inventories = tuple(steps.depth * rate * iteration_time_s if rate else 0.0 for rate in rates_rps)
    return FluidEquilibrium(
        load=load,
        prefill_load=prefill_load,
        kv_load=kv_load,
        stable=stable,
        fits_memory=stable and reason is None,
        reason=reason,
        iteration_time_s=iteration_time_s,
        memory_tokens=memory_tokens,
        kv_capacity_tokens=kv_capacity_tokens,
        throughput_tokens_per_s=sum(t.rate_rps * t.lengths.mean_output_tokens for t in mix.types),
        inventories=inventories,
        running=sum(
            requests_running(t.rate_rps, steps.life(t.lengths.mean_output_tokens), steps.depth * iteration_time_s)
            for t in mix.types if t.rate_rps
        ),
        critical_rate_scale=critical,
        limit=limit,
    )


def batch_memory_tokens(
    per_stage: Sequence[float], mix: WorkloadMix, steps: Steps = ONE_TOKEN_A_STEP
) -> float:
    """M(n) = Σ n_j E[w_j]: KV tokens with n_j prompts of type j in every stage of its life."""
    return _stage_tokens(per_stage, mix, steps=steps).kv_tokens


def batch_time_s(
    per_stage: Sequence[float], mix: WorkloadMix, time_model: IterationTimeModel, steps: Steps = ONE_TOKEN_A_STEP
) -> float:
    """ΔT(n): seconds of the iteration that processes n_j prompts of type j in every stage.

    It reads M(n) KV tokens and computes Σ n_j E[l_j] prefill and Σ n_j E[l'_j] decode tokens.
    """
    batch = _stage_tokens(per_stage, mix, steps=steps)
    return time_model.iteration_s(batch.prefill_tokens, batch.decode_tokens, batch.kv_tokens)


@dataclass(frozen=True, slots=True)
class _StageTokens:
    kv_tokens: float
    prefill_tokens: float
    decode_tokens: float
    memory_tokens: float


def _stage_tokens(
    per_stage: Sequence[float], mix: WorkloadMix, reuse: PrefixReuse = NO_REUSE, steps: Steps = ONE_TOKEN_A_STEP
) -> _StageTokens:
    """Tokens of a batch with n_j prompts per stage; with rates for n_j, the tokens that arrive per second.

    decode_tokens: computed ones. KV tokens count once for every step that reads them.
    """
    if len(per_stage) != len(mix.types):
        raise ValueError(f"per_stage has {len(per_stage)} entries; the mix has {len(mix.types)} types")
    kv = prefill = decode = memory = 0.0
    for count, request_type in zip(per_stage, mix.types, strict=True):
        lengths = request_type.lengths
        kv += count * lengths.kv_token_iterations / steps.tokens
        prefill += count * lengths.mean_prompt_tokens * reuse.computed
        private = lengths.kv_token_iterations - (1 - reuse.private) * lengths.prompt_token_iterations
        memory += count * private / steps.tokens
        decode += count * lengths.mean_output_tokens * steps.computed_per_token
    return _StageTokens(kv, prefill, decode, memory)


def finite_or_none(value: float) -> float | None:
    """A figure of an equilibrium for JSON, which has no infinity: None when it is infinite."""
    return value if math.isfinite(value) else None
