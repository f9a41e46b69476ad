"""Integer thresholds from the fluid equilibrium: WAIT's n_j, Nested WAIT's n_k, and a cap on running requests.

Source: arXiv 2504.11320, the feasibility conditions of WAIT (known output lengths) and Nested WAIT (unknown ones).
WAIT's thresholds are whole prompts per stage: an equilibrium with less than one prompt per stage is `Infeasible`, while
`running_cap` always has a result. Nested WAIT's may be whole totals of a segment.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm

from scheduler.model.fluid import batch_memory_tokens, batch_time_s, solve_fluid
from scheduler.model.iteration_time import IterationTimeModel, require_number
from scheduler.model.probability import ACCEPTED_MISSES
from scheduler.model.rotation import stage_lengths
from scheduler.model.steps import ONE_TOKEN_A_STEP, Steps
from scheduler.model.varying_rates import Stretch, WorstWindows
from scheduler.model.workload import Lengths, WorkloadMix

_LARGEST_ADVANCE_RATIO = 0.99
_FEW_LENGTHS = 4
"""Most distinct output lengths for which every way to cut them is tried."""
_WIDTHS = (1.0, 0.25, 0.5, 2.0, 4.0, 8.0)
"""Factors on the margin tried for totals: a narrow margin saves M^π and needs a larger buffer."""
_MOST_REASONS = 4
_LENGTH_GRID = tuple(sorted(int(base * 2**power) for power in range(28) for base in (16, 24)))


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

    boundaries: r_1 < … < r_L, last output token of each segment. n: prompts per stage of each segment; totals: prompts
    in all stages of a segment on an engine (`SegmentThreshold.total`).
    survival, theta: p_k and θ_k at the L − 1 inner boundaries, p_k = P(reach segment k | reached k − 1), k = 2..L.
    memory_tokens: M^π. buffer_tokens: room for the boundary queues. iteration_s: ΔT(n).
    """

    boundaries: tuple[int, ...]
    n: tuple[float, ...]
    survival: tuple[float, ...]
    theta: tuple[float, ...]
    memory_tokens: float
    buffer_tokens: float
    iteration_s: float
    totals: tuple[int, ...]

    @property
    def needed_tokens(self) -> float:
        """M^π and the buffer."""
        return self.memory_tokens + self.buffer_tokens


def wait_thresholds(
    mix: WorkloadMix, time_model: IterationTimeModel, kv_capacity_tokens: int, *, slack: float = 0.05,
    over_time: Sequence[Stretch] = (), steps: Steps = ONE_TOKEN_A_STEP,
) -> WaitSolution | Infeasible:
    """The smallest WAIT thresholds n_j = ⌈λ_j T⌉, T >= ΔT*(1 + slack), that are feasible after rounding.

    Feasible means ΔT(n) <= n_j/λ_j for every type and M* <= M(n) <= C. `slack` (>= 0) keeps T away from the
    equilibrium, where queues have no drift. A type with rate 0 has threshold 1. `over_time` puts the arrivals of the
    worst window as long as T or ΔT(n) in place of λ_j T and λ_j ΔT(n).
    """
    require_number("slack", slack)
    fluid = solve_fluid(mix, time_model, kv_capacity_tokens, steps=steps)
    if not fluid.fits_memory:
        return Infeasible(fluid.reason or "the equilibrium does not fit")
    worst, names = WorstWindows(over_time or (Stretch(1.0, mix),)), [t.name for t in mix.types]
    period_s = fluid.iteration_time_s * (1 + slack)
    # ΔT(n) never falls when T grows, so raising T to ΔT(n) cannot step over the smallest feasible n.
    while True:
        n = tuple(max(1, math.ceil(worst.arrivals(period_s, name))) for name in names)
        memory_tokens = batch_memory_tokens(n, mix, steps)
        if memory_tokens > kv_capacity_tokens:
            return Infeasible(
                f"thresholds {n} (whole prompts per stage, slack {slack:g}) hold {memory_tokens:.0f} tokens, above the "
                f"KV capacity of {kv_capacity_tokens} tokens; the equilibrium itself holds {fluid.memory_tokens:.0f}"
            )
        iteration_s = batch_time_s(n, mix, time_model, steps)
        if all(worst.arrivals(iteration_s, name) <= count for count, name in zip(n, names, strict=True)):
            return WaitSolution(n, iteration_s, memory_tokens)
        period_s = max(period_s, iteration_s)


def nested_wait_thresholds(
    mix: WorkloadMix,
    time_model: IterationTimeModel,
    kv_capacity_tokens: int,
    *,
    boundaries: Sequence[int] | None = None,
    segments: int = 4,
    margin: float = 0.05,
    overflow_probability: float = ACCEPTED_MISSES,
    horizon_s: float = 3600.0,
    whole: bool = True,
    steady: bool = False,
    over_time: Sequence[Stretch] = (),
    steps: Steps = ONE_TOKEN_A_STEP,
) -> NestedWaitSolution | Infeasible:
    """The smallest Nested WAIT thresholds whose memory and safety buffer fit, output lengths being unknown.

    Feasible means p_k < n_k/n_{k−1} < 1 and ΔT(n) < n_1/Σ λ_j, with M^π + buffer <= C; memory then overflows within
    `horizon_s` with probability at most `overflow_probability` (δ). Ratios aim at min(p_k + margin, 0.99).
    `boundaries` are used as given: increasing, the last one >= the longest output, the one before it below that.
    Without them the number of segments, at most `segments`, is the one that needs the least memory M^π + buffer, as in
    the paper's segment-design theorem. The cuts tried are every choice of the lengths themselves where these are few,
    else quantiles of the output length, with `steady` rounded up to a coarse grid so that they stay put while estimates
    move; the last one is always the longest output.

    whole: n_k are whole prompts per stage, as the theory's are. Else segment totals B_k are whole and n_k = B_k/δ_k
    with δ_k as in `scheduler.model.rotation`, so that n_k may be below one; the conditions are those of the means over
    a rotation, ΔT(n) averages the iterations with and without the odd prompt, and the buffer has room for what rotation
    adds: in m iterations at most one request more enters a boundary queue and one less leaves it than on average, and
    the requests in a segment's stages stand up to δ_k/2 tokens later than evenly spread. The paper proves nothing for
    totals; its proof carries over with these terms. Narrower and wider margins are then tried too.

    The buffer is the theory's for one prompt length per segment: with several, l is the mean of those that reach the
    segment, where the paper's sufficient condition takes the longest, so that δ holds for the mean and not for the
    worst case. With `steps` of several tokens n_k enter segment k in an iteration and are fewer iterations in it; B_k
    and δ_k count token positions all the same. `over_time` puts the worst windows in place of λ and p_k, see
    `scheduler.model.varying_rates`.

    Raises ValueError for other boundaries and for parameters out of range.
    """
    require_number("margin", margin)
    require_number("horizon_s", horizon_s)
    _require_probability(overflow_probability)
    if segments < 1:
        raise ValueError(f"segments is {segments!r}; it must be an integer >= 1")
    fluid = solve_fluid(mix, time_model, kv_capacity_tokens, steps=steps)
    if not fluid.fits_memory:
        return Infeasible(fluid.reason or "the equilibrium does not fit")
    merged = mix.merged()
    worst = WorstWindows(over_time or (Stretch(1.0, mix),))
    iterations = 1 + horizon_s / time_model.shortest_iteration_s
    if boundaries is not None:
        candidates = [_checked_boundaries(boundaries, merged.lengths)]
    else:
        candidates = _boundary_choices(merged.lengths, segments, steady=steady)
    reasons: list[str] = []
    best: NestedWaitSolution | None = None
    for candidate in candidates:
        queue_log = math.log(len(candidate) * iterations / overflow_probability)
        room = kv_capacity_tokens if best is None else best.needed_tokens
        for width in (1.0,) if whole or len(candidate) == 1 else _WIDTHS:
            chain = SegmentChain(
                candidate, merged.lengths, width * margin, worst=worst if over_time else None, whole=whole, steps=steps
            )
            solution = _smallest_fit(chain, worst, time_model, room, queue_log)
            if isinstance(solution, Infeasible):
                if best is None and width == 1:
                    reasons.append(f"with boundaries {list(candidate)}: {solution.reason}")
            elif best is None or solution.needed_tokens < best.needed_tokens:
                best, room = solution, math.floor(solution.needed_tokens)
    return best or Infeasible("; ".join(reasons[-_MOST_REASONS:]))


def running_cap(mix: WorkloadMix, kv_capacity_tokens: int, *, overflow_probability: float = ACCEPTED_MISSES) -> int:
    """The cap on running requests: the largest N >= 1 with N m + z √N s <= C.

    m and s are mean and standard deviation of a running request's KV tokens, z the normal quantile of
    `overflow_probability`: the sum of N of them exceeds C about that often. Not in the paper; m is its E[w]/E[l'+1].
    """
    require_number("kv_capacity_tokens", kv_capacity_tokens, allow_zero=False)
    _require_probability(overflow_probability)
    lengths = mix.merged().lengths
    mean, spread = lengths.mean_running_kv_tokens, float(norm.isf(overflow_probability)) * lengths.running_kv_std
    root = (math.sqrt(spread**2 + 4 * mean * kv_capacity_tokens) - spread) / (2 * mean)
    # The relative tolerance keeps an N that meets the bound with equality.
    return max(1, math.floor(root**2 * (1 + 1e-12)))


class SegmentChain:
    """Segments of output length, with the memory and iteration time of n_k prompts in each of their stages.

    Counts are the whole numbers of `nested_wait_thresholds`: n_k, or with `whole` false the totals B_k.
    """

    def __init__(
        self, boundaries: tuple[int, ...], lengths: Lengths, margin: float, *, worst: WorstWindows | None = None,
        whole: bool = True, steps: Steps = ONE_TOKEN_A_STEP,
    ) -> None:
        starts = (0, *boundaries[:-1])
        self.boundaries, self.whole = boundaries, whole
        if worst is None:
            reached = [lengths.survival(start) for start in starts]
            self.survival = tuple(after / before for before, after in pairwise(reached))
        else:
            means = [lengths.survival(after) / lengths.survival(before) for before, after in pairwise(starts)]
            worsts = [worst.survival(before, after) for before, after in pairwise(starts)]
            self.survival = tuple(map(max, means, worsts))
        self.ratios = tuple(min(p + margin, _LARGEST_ADVANCE_RATIO) for p in self.survival)
        self.prompt_tokens = lengths.mean_prompt_tokens
        ends = np.array(boundaries)
        prompt_tokens = np.array([lengths.mean_prompt_tokens_beyond(start) for start in starts])
        self.queued_kv_tokens = prompt_tokens + starts
        # δ_k stages with a mean position of s̄_k; the first segment also has stage 0, the prefill.
        first_stages = np.array([0, *(start + 1 for start in starts[1:])])
        # A request stays in a segment for one iteration per step.
        self.stages = (ends - starts) / steps.tokens + (first_stages == 0)
        self._positions = ends - starts + (first_stages == 0)
        self._computed = steps.computed
        self.stage_kv_tokens = self.stages * (prompt_tokens + (first_stages + ends) / 2)
        self.parts: tuple[int, ...] = (1,) * len(boundaries) if whole else stage_lengths(boundaries)

    def thresholds(self, first: int) -> tuple[int, ...] | None:
        """The first count, then whole ones with p_k < n_k/n_{k−1} < 1 near the wanted ratio; None if impossible."""
        counts = [first]
        for p, ratio, before, parts in zip(self.survival, self.ratios, self.parts, self.parts[1:], strict=False):
            scale = counts[-1] * parts / before
            lowest, highest = math.floor(p * scale) + 1, math.ceil(scale) - 1
            if lowest > highest:
                return None
            counts.append(min(max(math.ceil(ratio * scale), lowest), highest))
        return tuple(counts)

    def per_stage(self, counts: tuple[int, ...]) -> tuple[float, ...]:
        """n_k of the counts given; whole numbers stay integers."""
        return tuple(count / parts if parts > 1 else count for count, parts in zip(counts, self.parts, strict=False))

    def memory_tokens(self, n: tuple[float, ...]) -> float:
        """M^π = Σ n_k (l + s̄_k) δ_k over the segments given, with l the mean prompt of those that reach segment k."""
        return float(self.stage_kv_tokens[: len(n)] @ n)

    def iteration_s(self, n: tuple[float, ...], time_model: IterationTimeModel) -> float:
        """ΔT(n): n_1 prompts in prefill, n_k in every decode stage of segment k; the mean over n_1's two neighbours."""
        decode_tokens, kv_tokens = (float(self.stages @ n) - n[0]) * self._computed, self.memory_tokens(n)
        fewer = math.floor(n[0])
        fewer_s, more_s = (
            time_model.iteration_s(count * self.prompt_tokens, decode_tokens, kv_tokens) for count in (fewer, fewer + 1)
        )
        return fewer_s + (n[0] - fewer) * (more_s - fewer_s)

    def buffer_tokens(self, n: tuple[float, ...], theta: tuple[float, ...], queue_log: float) -> float:
        """Σ_{k>=2} (l + l'_{k−1}) (n_k + ln(m (1 + horizon/d0)/δ)/θ_k): the boundary queues' room.

        Where n_k or n_{k−1} is no whole number, ⌈n_k⌉ + 2 requests in place of n_k, and δ_k/2 tokens for each such k.
        """
        odd = [count != math.floor(count) for count in n]
        queues = [
            math.ceil(count) + 2 * (before or own) + queue_log / t
            for count, t, (before, own) in zip(n[1:], theta, pairwise(odd), strict=True)
        ]
        return float(self.queued_kv_tokens[1:] @ queues) + float(self._positions[odd].sum()) / 2


def _boundary_choices(lengths: Lengths, most: int, *, steady: bool) -> list[tuple[int, ...]]:
    """Candidate boundaries between output lengths, the most segments first; the last is the longest output."""
    distinct = [int(length) for length in np.unique(lengths.output_tokens)]
    longest = distinct[-1]
    if len(distinct) <= _FEW_LENGTHS:
        sizes = range(min(most, len(distinct)) - 1, -1, -1)
        return [(*cut, longest) for size in sizes for cut in combinations(distinct[:-1], size)]
    choices = []
    for parts in range(most, 0, -1):
        marks = {lengths.output_quantile(part / parts) for part in range(1, parts)}
        cuts = {on_length_grid(mark) if steady else mark for mark in marks}
        choices.append((*sorted(cut for cut in cuts if cut < longest), longest))
    return list(dict.fromkeys(choices))


def on_length_grid(length: float) -> int:
    """The next length on a coarse grid, so that boundaries stay put while estimates move a little."""
    index = bisect_left(_LENGTH_GRID, length)
    return _LENGTH_GRID[min(index, len(_LENGTH_GRID) - 1)]


def _smallest_fit(
    chain: SegmentChain, worst: WorstWindows, time_model: IterationTimeModel, room_tokens: int | float, queue_log: float
) -> NestedWaitSolution | Infeasible:
    """The smallest n_1 whose thresholds keep up with the arrivals and fit with their buffer."""
    if max(chain.survival, default=0.0) >= 1:
        return Infeasible("every request passes a boundary in some window")
    first, before, parts = 1, "", chain.parts[0]
    named = "n" if chain.whole else "totals"
    while True:
        counts = chain.thresholds(first)
        n = chain.per_stage(counts or (first,))
        memory_tokens = chain.memory_tokens(n)
        if memory_tokens > room_tokens:
            return Infeasible(
                f"{named} = {counts or (first,)} holds {memory_tokens:.0f} tokens, above the KV capacity of "
                f"{room_tokens:.0f}" + before
            )
        if counts is None:
            before = f", and {named} from {first} on leave no whole numbers with p_k < n_k/n_(k-1) < 1"
            first += 1
            continue
        iteration_s = chain.iteration_s(n, time_model)
        arriving = worst.arrivals(iteration_s)
        if arriving >= n[0]:
            # No n_1 up to λ ΔT(n) can keep up, since ΔT(n) never falls when n_1 grows.
            before = f", and in the {iteration_s:.4g} s that n_1 = {n[0]:g} takes {arriving:.1f} arrive"
            first = max(first, math.floor(arriving * parts)) + 1
            continue
        theta = tuple(
            buffer_exponent(p, n_before, n_k) for p, (n_before, n_k) in zip(chain.survival, pairwise(n), strict=True)
        )
        buffer_tokens = chain.buffer_tokens(n, theta, queue_log)
        if memory_tokens + buffer_tokens <= room_tokens:
            return NestedWaitSolution(
                chain.boundaries, n, chain.survival, theta, memory_tokens, buffer_tokens, iteration_s,
                tuple(round(count * stages) for count, stages in zip(n, stage_lengths(chain.boundaries), strict=True)),
            )
        before = f", and n_1 = {n[0]:g} needs {memory_tokens:.0f} tokens and a buffer of {buffer_tokens:.0f}"
        if not chain.whole:  # the buffer follows the ratios, which finer counts hardly change, and M^π grows
            return Infeasible(f"{named} = {counts}" + before.removeprefix(", and"))
        first += 1


def buffer_exponent(p: float, before: float, after: float) -> float:
    """θ > 0 with e^{−θ n_k} (1 − p_k + p_k e^θ)^{n_{k−1}} = 1, given p_k, n_{k−1} = before and n_k = after.

    It depends on their ratio alone, so that it means the same below one prompt per stage.

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
