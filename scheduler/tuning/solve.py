"""From a workload to thresholds, for the controller and the simulator.

Inputs are a `WorkloadMix`, the iteration-time model and the engine's limits; no vLLM, no clock, no telemetry.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scheduler.estimation.iteration_time_error import EXACT, PUBLISHED_MAPE, IterationTimeError
from scheduler.estimation.output_lengths import cold_lengths
from scheduler.model.fluid import NO_REUSE, FluidEquilibrium, PrefixReuse, solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.rotation import stage_lengths
from scheduler.model.steps import ONE_TOKEN_A_STEP, Steps
from scheduler.model.varying_rates import Stretch, WorstWindows
from scheduler.model.wait_thresholds import (
    Infeasible,
    SegmentChain,
    nested_wait_thresholds,
    on_length_grid,
    running_cap,
    wait_thresholds,
)
from scheduler.model.workload import Lengths, RequestType, WorkloadMix
from scheduler.policies.wait_cp import token_gate
from scheduler.thresholds import UNKNOWN_TYPE, EngineLimits, SegmentThreshold, Thresholds, TypeThreshold
from scheduler.tuning.fluid_plan import FluidPlan, solve_fluid_params
from scheduler.tuning.slo import Slo

MOST_TYPES = 4
LEAST_RATE_RPS = 1e-3
"""The rate assumed while none is known."""
_MOST_SEGMENTS = 4
_PRACTICAL_MARGIN, _PRACTICAL_SLACK = 0.05, 0.05


def tune_fluid(
    configured: Thresholds, mix: WorkloadMix, time_model: IterationTimeModel, limits: EngineLimits, targets: Slo, *,
    miss_probability: float, error: IterationTimeError = EXACT, dispersion: float = 1.0, reuse: PrefixReuse = NO_REUSE,
    steps: Steps = ONE_TOKEN_A_STEP, realised_margin: float = 0.0, delivery_s: float = 0.0, cold: bool = False,
) -> tuple[Thresholds, FluidPlan]:
    """`configured` with the fluid parameters for `mix`, and the plan behind them; see `solve_fluid_params`.

    The thresholds' reason explains them in words. The depth of steps is the engine's; time_model is that of its
    iterations, in a pipeline that of one stage. cold: lengths are a prior, so no queue limit is applied; requests that
    would miss TTFT are still rejected.
    """
    plan = solve_fluid_params(
        mix, time_model, limits, targets, error=error, miss_probability=miss_probability, dispersion=dispersion,
        reuse=reuse, steps=replace(steps, depth=limits.pipeline_depth), realised_margin=realised_margin,
        delivery_s=delivery_s,
    )
    if cold:
        plan = replace(plan, fluid=replace(plan.fluid, queue_limit=None, cold=True))
    reason = _plan_in_words(plan, mix.rate_rps) + ("; lengths are guessed so far" if cold else "")
    return replace(configured, fluid=plan.fluid, reason=reason), plan


def tune_counts(
    configured: Thresholds, mix: WorkloadMix, time_model: IterationTimeModel, limits: EngineLimits, *,
    overflow_probability: float, steps: Steps = ONE_TOKEN_A_STEP, over_time: Sequence[Stretch] = (),
) -> tuple[Thresholds, FluidEquilibrium]:
    """`configured` with counts and cap of WAIT, Nested WAIT or WAIT-CP for `mix`, and its equilibrium.

    The thresholds' reason explains them in words. The type named `UNKNOWN_TYPE` holds the requests of undeclared
    length; they follow segments. over_time: varying rates, of which the counts of WAIT and Nested WAIT take the worst
    windows. The depth of steps is the engine's; time_model is that of its iterations, in a pipeline that of one stage.
    """
    steps = replace(steps, depth=limits.pipeline_depth)
    equilibrium = solve_fluid(mix, time_model, limits.kv_capacity_tokens, steps=steps)
    cap = running_cap(mix, limits.kv_capacity_tokens, overflow_probability=overflow_probability)
    cap = max(1, min(cap, limits.most_running))
    base = replace(configured, types=(), segments=(), max_running=cap)
    if configured.policy == "wait_cp":
        solved = _wait_cp(configured, mix, min(cap, configured.max_running or cap), limits)
    elif configured.policy == "fcfs":
        solved = replace(base, reason="fcfs needs no thresholds")
    else:
        solver = _Solver(mix, time_model, limits, overflow_probability, steps, tuple(over_time), equilibrium)
        solved = solver.solve(base, cap)
    moving = f"rates move, the worst of {len(over_time)} stretches counts; " if over_time else ""
    reason = f"{_in_words(equilibrium, mix.rate_rps)}; {moving}{solved.reason}; cap {cap} from memory"
    return replace(solved, reason=reason), equilibrium


def cold_thresholds(
    configured: Thresholds,
    time_model: IterationTimeModel,
    limits: EngineLimits,
    targets: Slo,
    *,
    overflow_probability: float,
    source: str = "the profile",
) -> Thresholds:
    """The thresholds of an engine under `fluid` before its first tuning; under other policies, as configured.

    Derived from the profile's model (of all pipeline stages), prior lengths (`cold_lengths`) and a published model
    error. Only requests that would miss TTFT are rejected. source: of the model, in words.
    """
    if configured.policy != "fluid" or configured.fluid is not None:
        return configured
    mix = WorkloadMix((RequestType(UNKNOWN_TYPE, LEAST_RATE_RPS, cold_lengths(limits.longest_request)),))
    thresholds, _ = tune_fluid(
        configured, mix, time_model.of_stage(limits.pipeline_depth), limits, targets,
        miss_probability=overflow_probability, error=IterationTimeError.from_mape(PUBLISHED_MAPE), cold=True,
    )
    return replace(thresholds, reason=f"nothing seen yet: parameters from {source} and the targets")


def tune_by_cap(configured: Thresholds, mix: WorkloadMix, cap: int, *, margin: float = _PRACTICAL_MARGIN) -> Thresholds:
    """The rule of the paper's experiments: counts from a cap on running requests, whatever the load.

    WAIT: n_j in proportion to λ_j with Σ (l'_j + 1) n_j = cap, rounded and at least 1. Nested WAIT: n_k/n_{k−1} =
    min(p_k + margin, 0.99) and Σ δ_k n_k = cap, where δ_1 = l'_1 has no stage for the prefill; the totals B_k = δ_k n_k
    are rounded, and spread over the stages of their segment (`scheduler.model.rotation`).
    """
    known = [t for t in mix.types if t.name != UNKNOWN_TYPE]
    per_rate = cap / sum(t.rate_rps * (t.lengths.mean_output_tokens + 1) for t in mix.types)
    types = tuple(
        TypeThreshold(
            name=t.name, n=max(1, round(per_rate * t.rate_rps)), max_output_tokens=_bound_of(t, last=t is known[-1])
        )
        for t in known
    )
    segments: tuple[SegmentThreshold, ...] = ()
    unknown = [t for t in mix.types if t.name == UNKNOWN_TYPE]
    if unknown:
        lengths = unknown[0].lengths
        ends = tuple(sorted({lengths.output_quantile(part / _MOST_SEGMENTS) for part in range(1, _MOST_SEGMENTS + 1)}))
        shares = _relative_totals(lengths, ends, margin)
        segments = _segments(ends, [max(1, round(total)) for total in cap * shares / shares.sum()], cap)
    reason = f"counts from a cap of {cap} running requests"
    budget = _token_gate(configured, mix, cap) if configured.policy == "wait_cp" else configured.token_budget
    return replace(
        configured, types=types, segments=segments, max_running=cap, token_budget=budget, reason=reason
    )


def _token_gate(configured: Thresholds, mix: WorkloadMix, cap: int) -> int | None:
    """The experiments' token budget of an iteration; None without chunked prefill."""
    chunk, lengths = configured.prefill_chunk_tokens, mix.merged().lengths
    if chunk is None:
        return configured.token_budget
    chunks = float(np.average(np.ceil(lengths.prompt_tokens / chunk), weights=lengths.weights))
    return token_gate(cap, prefill_chunks=chunks, output_tokens=lengths.mean_output_tokens, chunk_tokens=chunk)


def _wait_cp(configured: Thresholds, mix: WorkloadMix, cap: int, limits: EngineLimits) -> Thresholds:
    tuned = tune_by_cap(configured, mix, cap)
    budget = tuned.token_budget
    if budget is not None and budget > limits.max_num_batched_tokens:  # the engine's own limit is lower
        tuned = replace(tuned, token_budget=None)
    return tuned


def mix_by_length(
    declared: Sequence[tuple[int, int]], unknown: int, finished: Lengths | None, *, rate_rps: float, longest: int
) -> WorkloadMix:
    """One type per group of declared output lengths, and one for the `unknown` requests without a declaration.

    declared: (prompt, output) tokens of the others; their groups are the types "output<=B". finished: the lengths of
    finished requests, used for the unknown ones. longest: most tokens of prompt and output together. Raises
    ValueError when there is no request at all.
    """
    arrivals = len(declared) + unknown
    if not arrivals:
        raise ValueError("declared is empty and unknown is 0; at least one request is needed")
    outputs = [min(output, longest) for _, output in declared]
    bounds = _group_bounds(outputs)
    groups: dict[int, list[tuple[int, int]]] = {}
    for (prompt, _), output in zip(declared, outputs, strict=True):
        bound = bounds[min(bisect_left(bounds, output), len(bounds) - 1)]
        groups.setdefault(bound, []).append((prompt, output))
    types = [
        RequestType(f"output<={bound}", rate_rps * len(pairs) / arrivals, Lengths.from_pairs(pairs).within(longest))
        for bound, pairs in sorted(groups.items())
    ]
    if unknown:
        if finished is None:
            raise ValueError("finished is None; requests of unknown length need the lengths of finished ones")
        types.append(RequestType(UNKNOWN_TYPE, rate_rps * unknown / arrivals, finished.within(longest)))
    return WorkloadMix(tuple(types))


@dataclass(frozen=True)
class _Solver:
    """WAIT and Nested WAIT for one workload on one engine, given its equilibrium."""

    mix: WorkloadMix
    time_model: IterationTimeModel
    limits: EngineLimits
    overflow_probability: float
    steps: Steps
    over_time: tuple[Stretch, ...]
    equilibrium: FluidEquilibrium

    def solve(self, base: Thresholds, cap: int) -> Thresholds:
        """`base` with counts for the types of declared length, and segments for the others; at most `cap` each."""
        known = [t for t in self.mix.types if t.name != UNKNOWN_TYPE]
        types: tuple[TypeThreshold, ...] = ()
        reasons: list[str] = []
        if known:
            # The load of requests of unknown length counts in the rate conditions, though segments hold them.
            solution = wait_thresholds(
                self.mix, self.time_model, self.limits.kv_capacity_tokens, over_time=self.over_time, steps=self.steps
            )
            # Without feasible counts the types are not held: any whole count would throttle admission.
            counts: list[int | None] = [None] * len(self.mix.types)
            if not isinstance(solution, Infeasible):
                counts = [min(n, cap) for n in solution.n]
            types = tuple(
                TypeThreshold(name=t.name, n=n, max_output_tokens=_bound_of(t, last=t is known[-1]))
                for t, n in zip(self.mix.types, counts, strict=True)
                if t.name != UNKNOWN_TYPE
            )
            reasons.append(_solution_in_words("WAIT", solution, [t.n for t in types]))
        segments: tuple[SegmentThreshold, ...] = ()
        unknown = tuple(t for t in self.mix.types if t.name == UNKNOWN_TYPE)
        if unknown:
            segments, reason = self._solve_segments(WorkloadMix(unknown), cap)
            reasons.append(reason)
        return replace(base, types=types, segments=segments, reason="; ".join(reasons))

    def _solve_segments(
        self, mix: WorkloadMix, cap: int
    ) -> tuple[tuple[SegmentThreshold, ...], str]:
        solution = nested_wait_thresholds(
            mix, self.time_model, self.limits.kv_capacity_tokens, segments=_MOST_SEGMENTS, whole=False, steady=True,
            overflow_probability=self.overflow_probability, over_time=self._unknown_over_time, steps=self.steps,
        )
        if isinstance(solution, Infeasible):
            if not self.equilibrium.fits_memory:
                return (), _solution_in_words("Nested WAIT", solution, [])
            return self._practical_segments(mix, cap)
        segments = _segments(solution.boundaries, solution.totals, cap)
        said = ", ".join(f"{count:.3g} to {end}" for count, end in zip(solution.n, solution.boundaries, strict=True))
        return segments, f"Nested WAIT n = {said}"

    @property
    def _unknown_over_time(self) -> tuple[Stretch, ...]:
        return tuple(
            Stretch(one.seconds, WorkloadMix(tuple(t for t in one.mix.types if t.name == UNKNOWN_TYPE)))
            for one in self.over_time
        )

    def _practical_segments(self, mix: WorkloadMix, cap: int) -> tuple[tuple[SegmentThreshold, ...], str]:
        """The rule of the paper's experiments, for a load that fits but has no provable thresholds.

        Their cap on running requests is replaced by n_1 = λ ΔT* (1 + slack) over all segments.
        """
        lengths = mix.merged().lengths
        marks = {on_length_grid(lengths.output_quantile(part / _MOST_SEGMENTS)) for part in range(1, _MOST_SEGMENTS)}
        longest = lengths.output_quantile(1)
        ends = (*sorted(mark for mark in marks if mark < longest), longest)
        worst = WorstWindows(self._unknown_over_time or (Stretch(1.0, mix),))
        first = worst.arrivals(self.equilibrium.iteration_time_s) * (1 + _PRACTICAL_SLACK)
        totals = first * _relative_totals(lengths, ends, _PRACTICAL_MARGIN)
        segments = _segments(ends, [max(1, math.ceil(total)) for total in totals], cap)
        said = ", ".join(f"{segment.total} to {segment.end_output_tokens}" for segment in segments)
        return segments, f"Nested WAIT by the practical rule, totals {said}; no thresholds guarantee memory"


def _relative_totals(lengths: Lengths, ends: tuple[int, ...], margin: float) -> NDArray[np.float64]:
    """δ_k n_k/n_1 of each segment when n_k/n_{k−1} = min(p_k + margin, 0.99)."""
    chain = SegmentChain(ends, lengths, margin)
    return np.asarray(np.array(stage_lengths(ends)) * np.cumprod([1.0, *chain.ratios]))


def _segments(ends: tuple[int, ...], totals: Sequence[int], cap: int) -> tuple[SegmentThreshold, ...]:
    """Segments with totals capped so that each group can run at once."""
    return tuple(
        SegmentThreshold(end_output_tokens=end, total=min(total, cap * stages))
        for end, total, stages in zip(ends, totals, stage_lengths(ends), strict=True)
    )


def _group_bounds(outputs: list[int]) -> list[int]:
    distinct = sorted(set(outputs))
    if len(distinct) <= MOST_TYPES:
        return distinct
    ordered = sorted(outputs)
    marks = [ordered[(len(ordered) - 1) * part // MOST_TYPES] for part in range(1, MOST_TYPES + 1)]
    return sorted({on_length_grid(mark) for mark in marks})


def _bound_of(request_type: RequestType, *, last: bool) -> int | None:
    return None if last else int(request_type.name.removeprefix("output<="))


def _plan_in_words(plan: FluidPlan, rate_rps: float) -> str:
    if plan.alone_s is not None and plan.tpot_s is not None:
        return (
            f"the TPOT target of {1000 * plan.tpot_s:g} ms cannot be met: one request alone takes "
            f"{1000 * plan.alone_s:.1f} ms a token; capacity {plan.capacity_rps:.2f} requests/s"
        )
    params, said = plan.fluid, f"{rate_rps:.2f} requests/s of {plan.capacity_rps:.2f} possible"
    if params.iteration_s is not None:
        said += f", iterations up to {1000 * params.iteration_s:.1f} ms"
    if params.queue_limit is not None:
        said += f", queue up to {params.queue_limit}"
    return f"{said}; bottleneck: {plan.bottleneck}; {plan.goodput_rps:.2f}/s expected in time"


def _in_words(equilibrium: FluidEquilibrium, rate_rps: float) -> str:
    load = f"{rate_rps:.2f} requests/s, load {equilibrium.load:.2f}"
    return f"{load}, {equilibrium.reason}" if equilibrium.reason else load


def _solution_in_words(rule: str, solution: object, n: Sequence[int | None]) -> str:
    if isinstance(solution, Infeasible):
        return f"{rule} is infeasible ({solution.reason}): no type is held"
    return f"{rule} n = {', '.join(str(count) for count in n)}"
