"""Integer thresholds from the fluid equilibrium: WAIT's n_j, Nested WAIT's n_k, and a cap on resident requests.

Source: arXiv 2504.11320, the feasibility conditions of WAIT (known output lengths) and Nested WAIT (unknown ones).
Per-stage thresholds are whole prompts, so a replica whose equilibrium holds less than one prompt per stage has none:
such a demand is `Infeasible` here, while `resident_cap` always has an answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from scheduler.fluid import batch_memory_tokens, batch_time_s, solve_fluid
from scheduler.law import ServiceTimeLaw, require_number
from scheduler.mix import Lengths, WorkloadMix
from scheduler.steps import ONE_TOKEN_A_STEP, Steps

_LARGEST_ADVANCE_RATIO = 0.99


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No thresholds exist for this demand; `reason` says why, in words with numbers."""

    reason: str


@dataclass(frozen=True, slots=True)
class WaitSolution:
    """WAIT's thresholds: n_j prompts per stage (>= 1, in the mix's order), ΔT(n) in seconds, M(n) in KV tokens."""

    n: tuple[int, ...]
    iteration_s: float
    memory_tokens: float


@dataclass(frozen=True, slots=True)
class NestedWaitSolution:
    """Nested WAIT's thresholds for L segments of output length.

    boundaries: r_1 < … < r_L, last output token of each segment. n: prompts per stage of each segment.
    survival, theta: p_k and θ_k at the L − 1 inner boundaries, p_k = P(reach segment k | reached k − 1), k = 2..L.
    memory_tokens: M^π. buffer_tokens: room for the boundary queues. iteration_s: ΔT(n).
    """

    boundaries: tuple[int, ...]
    n: tuple[int, ...]
    survival: tuple[float, ...]
    theta: tuple[float, ...]
    memory_tokens: float
    buffer_tokens: float
    iteration_s: float


def wait_thresholds(
    mix: WorkloadMix, law: ServiceTimeLaw, kv_capacity_tokens: int, *, slack: float = 0.05,
    steps: Steps = ONE_TOKEN_A_STEP,
) -> WaitSolution | Infeasible:
    """The smallest WAIT thresholds n_j = ⌈λ_j T⌉, T >= ΔT*(1 + slack), that are feasible after rounding.

    Feasible means ΔT(n) <= n_j/λ_j for every type and M* <= M(n) <= C. `slack` (>= 0) keeps T away from the
    equilibrium, where queues have no drift. A type with rate 0 has threshold 1.
    """
    require_number("slack", slack)
    fluid = solve_fluid(mix, law, kv_capacity_tokens, steps=steps)
    if not fluid.fits_memory:
        return Infeasible(fluid.reason or "the equilibrium does not fit")
    rates_rps = [t.rate_rps for t in mix.types]
    period_s = fluid.iteration_time_s * (1 + slack)
    # ΔT(n) never falls when T grows, so raising T to ΔT(n) cannot step over the smallest feasible n.
    while True:
        n = tuple(max(1, math.ceil(rate * period_s)) for rate in rates_rps)
        memory_tokens = batch_memory_tokens(n, mix, steps)
        if memory_tokens > kv_capacity_tokens:
            return Infeasible(
                f"thresholds {n} (whole prompts per stage, slack {slack:g}) hold {memory_tokens:.0f} tokens, above the "
                f"KV capacity of {kv_capacity_tokens} tokens; the equilibrium itself holds {fluid.memory_tokens:.0f}"
            )
        iteration_s = batch_time_s(n, mix, law, steps)
        if all(iteration_s * rate <= count for count, rate in zip(n, rates_rps, strict=True)):
            return WaitSolution(n, iteration_s, memory_tokens)
        period_s = max(period_s, iteration_s)


def nested_wait_thresholds(
    mix: WorkloadMix,
    law: ServiceTimeLaw,
    kv_capacity_tokens: int,
    *,
    boundaries: Sequence[int] | None = None,
    segments: int = 4,
    margin: float = 0.05,
    overflow_probability: float = 0.01,
    horizon_s: float = 3600.0,
    steps: Steps = ONE_TOKEN_A_STEP,
) -> NestedWaitSolution | Infeasible:
    """The smallest Nested WAIT thresholds whose memory and safety buffer fit, output lengths being unknown.

    Feasible means p_k < n_k/n_{k−1} < 1 and ΔT(n) < n_1/Σ λ_j, with M^π + buffer <= C; memory then overflows within
    `horizon_s` with probability at most `overflow_probability` (δ). Ratios aim at min(p_k + margin, 0.99).
    `boundaries` are used as given: increasing, the last one >= the longest output, the one before it below that.
    Without them, quantiles of the output length cut it into `segments` equally likely parts, or fewer when that does
    not fit. Raises ValueError for other boundaries and for parameters out of range.
    """
    require_number("margin", margin)
    require_number("horizon_s", horizon_s)
    _require_probability(overflow_probability)
    if segments < 1:
        raise ValueError(f"segments is {segments!r}; it must be an integer >= 1")
    fluid = solve_fluid(mix, law, kv_capacity_tokens, steps=steps)
    if not fluid.fits_memory:
        return Infeasible(fluid.reason or "the equilibrium does not fit")
    merged = mix.merged()
    iterations = 1 + horizon_s / law.shortest_iteration_s
    if boundaries is not None:
        candidates = [_checked_boundaries(boundaries, merged.lengths)]
    else:
        candidates = [
            tuple(sorted({merged.lengths.output_quantile(k / parts) for k in range(1, parts + 1)}))
            for parts in range(segments, 0, -1)
        ]
    reasons = []
    for candidate in dict.fromkeys(candidates):
        chain = SegmentChain(candidate, merged.lengths, margin, steps)
        queue_log = math.log(len(candidate) * iterations / overflow_probability)
        solution = _smallest_fit(chain, merged.rate_rps, law, kv_capacity_tokens, queue_log)
        if isinstance(solution, NestedWaitSolution):
            return solution
        reasons.append(f"with boundaries {list(candidate)}: {solution.reason}")
    return Infeasible("; ".join(reasons))


def resident_cap(mix: WorkloadMix, kv_capacity_tokens: int, *, overflow_probability: float = 0.01) -> int:
    """Most requests that may be resident at once: the largest N >= 1 with N m + z √N s <= C.

    m and s are mean and standard deviation of a resident request's KV tokens, z the normal quantile of
    `overflow_probability`: the sum of N of them exceeds C about that often. Not in the paper; m is its E[w]/E[l'+1].
    """
    require_number("kv_capacity_tokens", kv_capacity_tokens, allow_zero=False)
    _require_probability(overflow_probability)
    lengths = mix.merged().lengths
    mean, spread = lengths.mean_resident_kv_tokens, float(norm.isf(overflow_probability)) * lengths.resident_kv_std
    root = (math.sqrt(spread**2 + 4 * mean * kv_capacity_tokens) - spread) / (2 * mean)
    # The relative tolerance keeps an N that meets the bound with equality.
    return max(1, math.floor(root**2 * (1 + 1e-12)))


class SegmentChain:
    """Segments of output length, and what n_k prompts in each of their stages amount to."""

    def __init__(
        self, boundaries: tuple[int, ...], lengths: Lengths, margin: float, steps: Steps = ONE_TOKEN_A_STEP
    ) -> None:
        starts = (0, *boundaries[:-1])
        reached = [lengths.survival(start) for start in starts]
        self.boundaries = boundaries
        self.survival = tuple(after / before for before, after in pairwise(reached))
        self.ratios = tuple(min(p + margin, _LARGEST_ADVANCE_RATIO) for p in self.survival)
        self.prompt_tokens = lengths.mean_prompt_tokens
        ends = np.array(boundaries)
        prompt_tokens = np.array([lengths.mean_prompt_tokens_beyond(start) for start in starts])
        self.queued_kv_tokens = prompt_tokens + starts
        # δ_k stages with a mean position of s̄_k; the first segment also has stage 0, the prefill.
        first_stages = np.array([0, *(start + 1 for start in starts[1:])])
        # A request is as many iterations in a segment as it takes steps through it.
        self.stages = (ends - starts) / steps.tokens + (first_stages == 0)
        self._computed = steps.computed
        self.stage_kv_tokens = self.stages * (prompt_tokens + (first_stages + ends) / 2)

    def thresholds(self, first: int) -> tuple[int, ...] | None:
        """n_1 = first, then whole n_k with p_k < n_k/n_{k−1} < 1, near the wanted ratio; None when there are none."""
        n = [first]
        for p, ratio in zip(self.survival, self.ratios, strict=True):
            lowest, highest = math.floor(p * n[-1]) + 1, n[-1] - 1
            if lowest > highest:
                return None
            n.append(min(max(math.ceil(ratio * n[-1]), lowest), highest))
        return tuple(n)

    def memory_tokens(self, n: tuple[int, ...]) -> float:
        """M^π = Σ n_k (l + s̄_k) δ_k over the segments given, with l the mean prompt of those that reach segment k."""
        return float(self.stage_kv_tokens[: len(n)] @ n)

    def iteration_s(self, n: tuple[int, ...], law: ServiceTimeLaw) -> float:
        """ΔT(n): n_1 prompts in prefill, n_k in every decode stage of segment k."""
        decode_tokens = (float(self.stages @ n) - n[0]) * self._computed
        return law.iteration_s(n[0] * self.prompt_tokens, decode_tokens, self.memory_tokens(n))

    def buffer_tokens(self, n: tuple[int, ...], theta: tuple[float, ...], queue_log: float) -> float:
        """Σ_{k>=2} (l + l'_{k−1}) (n_k + ln(m (1 + horizon/d0)/δ)/θ_k): the boundary queues' room."""
        queues = [count + queue_log / t for count, t in zip(n[1:], theta, strict=True)]
        return float(self.queued_kv_tokens[1:] @ queues)


def _smallest_fit(
    chain: SegmentChain, rate_rps: float, law: ServiceTimeLaw, kv_capacity_tokens: int, queue_log: float
) -> NestedWaitSolution | Infeasible:
    """The smallest n_1 whose thresholds keep up with the arrivals and fit with their buffer."""
    first, before = 1, ""
    while True:
        n = chain.thresholds(first)
        memory_tokens = chain.memory_tokens(n or (first,))
        if memory_tokens > kv_capacity_tokens:
            return Infeasible(
                f"n = {n or (first,)} holds {memory_tokens:.0f} tokens, above the KV capacity of {kv_capacity_tokens}"
                + before
            )
        if n is None:
            before = f", and n_1 = {first} leaves no whole n_k with p_k < n_k/n_(k-1) < 1"
            first += 1
            continue
        iteration_s = chain.iteration_s(n, law)
        if iteration_s * rate_rps >= first:
            # No n_1 up to λ ΔT(n) can keep up, since ΔT(n) never falls when n_1 grows.
            before = f", and in the {iteration_s:.4g} s that n_1 = {first} takes {iteration_s * rate_rps:.1f} arrive"
            first = max(first, math.floor(iteration_s * rate_rps)) + 1
            continue
        theta = tuple(_theta(p, n_before, n_k) for p, (n_before, n_k) in zip(chain.survival, pairwise(n), strict=True))
        buffer_tokens = chain.buffer_tokens(n, theta, queue_log)
        if memory_tokens + buffer_tokens <= kv_capacity_tokens:
            return NestedWaitSolution(
                chain.boundaries, n, chain.survival, theta, memory_tokens, buffer_tokens, iteration_s
            )
        before = f", and n_1 = {first} needs {memory_tokens:.0f} tokens and a buffer of {buffer_tokens:.0f}"
        first += 1


def _theta(p: float, before: int, after: int) -> float:
    """θ > 0 with e^{−θ n_k} (1 − p_k + p_k e^θ)^{n_{k−1}} = 1, given p_k, n_{k−1} = before and n_k = after.

    The logarithm of the left side is convex and zero at θ = 0. By Hoeffding's lemma it is <= 0 up to
    8 (n_k − n_{k−1} p_k)/n_{k−1}; since 1 − p + p e^θ >= p e^θ it is >= 0 from −n_{k−1} ln(p)/(n_{k−1} − n_k) on.
    """

    def log_left_side(theta: float) -> float:
        return before * float(np.logaddexp(math.log1p(-p), math.log(p) + theta)) - theta * after

    low, high = 8 * (after - before * p) / before, -before * math.log(p) / (before - after)
    # Close to a bound the equation holds to rounding already, and brentq would find no change of sign.
    if log_left_side(low) >= 0:
        return low
    return float(brentq(log_left_side, low, high)) if log_left_side(high) > 0 else high


def _checked_boundaries(boundaries: Sequence[int], lengths: Lengths) -> tuple[int, ...]:
    checked = tuple(int(b) for b in boundaries)
    longest = lengths.output_quantile(1)
    increasing = all(a < b for a, b in pairwise((0, *checked)))
    if not (checked and increasing and checked[-1] >= longest and (0, *checked)[-2] < longest):
        raise ValueError(
            f"boundaries are {list(boundaries)}; they must increase from at least 1, the last one must be >= the "
            f"longest output ({longest}) and the one before it below that"
        )
    return checked


def _require_probability(overflow_probability: float) -> None:
    if not 0 < overflow_probability < 1:
        raise ValueError(f"overflow_probability is {overflow_probability!r}; it must be between 0 and 1, exclusive")
