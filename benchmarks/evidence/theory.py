"""The theory's claims beside simulations of its own model: docs/evidence/theory.md, its figures and its numbers.

    python benchmarks/evidence/theory.py --out docs/evidence [--quick] [--only SECTIONS]

Writes theory.md, theory.json and figures/theory-*.{png,svg} under --out; the same code gives the same numbers. Source
of every claim: arXiv 2504.11320. Thresholds, buffers and equilibria come from `scheduler`, the runs from
`simulator.paper_model`. Two to four minutes on one core; --quick takes seconds and is too small to conclude anything.
With
--only, numbers of the other sections are those of the theory.json that is there; a section that it lacks is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from theory_fit import loglog_slope
from theory_limits import EntryLimit, measure_limits
from theory_page import page, write_figures
from theory_segments import measure_segments
from theory_varying import measure_varying

from scheduler.model.fluid import solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import load_profile
from scheduler.model.wait_thresholds import NestedWaitSolution, WaitSolution, nested_wait_thresholds, wait_thresholds
from scheduler.model.workload import Lengths, RequestType, WorkloadMix
from simulator.paper_model import (
    PaperFcfs,
    PaperModel,
    PaperNestedWait,
    PaperPolicy,
    PaperRun,
    PaperWait,
    PerIteration,
)

COMMAND = "python benchmarks/evidence/theory.py --out docs/evidence"

# Binary fractions, so that the equilibrium is met exactly: ΔT* = 1 s, M* = 12 and 40 tokens, n* = 4 and (4, 2).
ONE_TYPE = WorkloadMix.from_lengths(Lengths.point(1, 1), 4.0)
ONE_TYPE_LAW = IterationTimeModel(1 / 4, 1 / 16)
TWO_TYPES = WorkloadMix((RequestType("a", 4.0, Lengths.point(1, 1)), RequestType("b", 2.0, Lengths.point(2, 3))))
TWO_TYPES_LAW = IterationTimeModel(3 / 8, 1 / 64)
BASE_HORIZON_S = 100.0

NESTED_LAW = IterationTimeModel(1 / 4, 1 / 4800)
NESTED_HORIZON_S = 200.0
TWO_LENGTHS = Lengths(np.array([4, 4]), np.array([2, 8]), np.array([0.3, 0.7]))
THREE_LENGTHS = Lengths(np.array([4, 4, 4]), np.array([2, 4, 8]), np.array([0.3, 0.3, 0.4]))
NESTED_CASES = {
    "two lengths": (WorkloadMix.from_lengths(TWO_LENGTHS, 20.0), (2, 8)),
    "three lengths": (WorkloadMix.from_lengths(THREE_LENGTHS, 20.0), (2, 4, 8)),
}
PROBABILITIES = (0.1, 0.01)

PUBLISHED_MEMORY = {50: 34_377, 60: 55_758, 70: 100_327, 80: 250_509}
PUBLISHED_CROSSING_RPS = 74.1
PUBLISHED_MEAN_W = 29159.356583593526
"""KV-token-iterations of a request, from the authors' repository."""


@dataclass(frozen=True)
class GapCase:
    """One curve of the heavy-traffic figure, with the slope that the theory gives it (None: no claim)."""

    label: str
    mix: WorkloadMix
    time_model: IterationTimeModel
    policy: PaperPolicy
    capacity_tokens: float
    theory: float | None
    delay_theory: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", type=re.compile, help="measure only these sections anew (a regular expression)")
    args = parser.parse_args()
    quick = args.quick
    sections: dict[str, Callable[[], Any]] = {
        "gap": lambda: measure_gaps(2, 2, 16) if quick else measure_gaps(4, 5, 200),
        "limits": lambda: measure_limits(2, 4) if quick else measure_limits(3, 60),
        "varying": lambda: measure_varying(2, 8) if quick else measure_varying(3, 60),
        "overflow": lambda: measure_overflow(100 if quick else 20_000),
        "segments": measure_segments,
        "memory": compare_memory,
        "worked_case": lambda: follow_worked_case(24),
    }
    kept = json.loads((args.out / "theory.json").read_text(encoding="utf-8")) if args.only else {}
    numbers = {
        name: measure() if not args.only or args.only.search(name) else kept[name]
        for name, measure in sections.items() if name in kept or not args.only or args.only.search(name)
    }  # fmt: skip
    write_figures(numbers, args.out / "figures")
    (args.out / "theory.json").write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (args.out / "theory.md").write_text(page(numbers, COMMAND + " --quick" * args.quick), encoding="utf-8")


def gap_cases() -> list[GapCase]:
    cases = [GapCase(f"FCFS, C = {c}", ONE_TYPE, ONE_TYPE_LAW, PaperFcfs(), c, 0.0, "–") for c in (12, 15)]
    for mix, time_model, capacity_tokens, slack in (
        (ONE_TYPE, ONE_TYPE_LAW, 12, 0.0),
        (ONE_TYPE, ONE_TYPE_LAW, 15, 0.05),
        (TWO_TYPES, TWO_TYPES_LAW, 40, 0.0),
        (TWO_TYPES, TWO_TYPES_LAW, 60, 0.05),
    ):
        solution = wait_thresholds(mix, time_model, capacity_tokens, slack=slack)
        assert isinstance(solution, WaitSolution), solution
        where, n = "with slack" if slack else "at the boundary", ", ".join(map(str, solution.n))
        label = f"WAIT {where}, n = {n}, C = {capacity_tokens}"
        theory, delay = (-1.0, "O(1)") if slack else (-0.5, "O((ζT)^1/2)")
        cases.append(GapCase(label, mix, time_model, PaperWait(solution.n), capacity_tokens, theory, delay))
    limit = "Entry limit 4, no waiting, C = 12"
    cases.append(GapCase(limit, ONE_TYPE, ONE_TYPE_LAW, EntryLimit(4), 12, None, "–"))
    for name, (mix, boundaries) in NESTED_CASES.items():
        nested = nested_wait_thresholds(mix, NESTED_LAW, 10**9, boundaries=boundaries, horizon_s=NESTED_HORIZON_S)
        assert isinstance(nested, NestedWaitSolution), nested
        label, policy = f"Nested WAIT, {name}", PaperNestedWait(nested.boundaries, tuple(map(round, nested.n)))
        cases.append(GapCase(label, mix, NESTED_LAW, policy, math.inf, -1.0, "O(1)"))
    return cases


def measure_gaps(powers: int, boundary_powers: int, rows: int) -> list[dict[str, Any]]:
    """Relative throughput gap and delays at ζ = 1, 4, 16, …, arrivals and speeds × ζ, each over `rows` runs.

    Delays are times ζ, by Little's law: latency, ttft (until the first token) and wait (before the prefill).
    There are `powers` values of ζ, and `boundary_powers` at the boundary, where start-up costs die out last. The slope
    is fitted without the first two, as far as two remain. E[arrivals] = λT exactly, so the gap's mean is that of
    the output tokens still owed at T, which vary far less than arrivals do.
    """
    results = []
    for case in gap_cases():
        scales = [4**power for power in range(boundary_powers if case.theory == -0.5 else powers)]
        owed_at = np.array([t.lengths.mean_output_tokens for t in case.mix.types])
        means, errors = [], []
        delays: dict[str, list[NDArray[np.float64]]] = {"latency": [], "ttft": [], "wait": []}
        for scale in scales:
            mix = case.mix.scaled(scale)
            time_model = case.time_model.faster(scale)
            model = PaperModel(mix, time_model)
            run = PaperRun(model, case.policy, seed=scale, rows=rows, capacity_tokens=case.capacity_tokens)
            run.run(BASE_HORIZON_S)
            fluid_tokens = sum(t.rate_rps * t.lengths.mean_output_tokens for t in mix.types) * BASE_HORIZON_S
            gaps = run.counts.sum(axis=2) @ owed_at / fluid_tokens
            means.append(float(gaps.mean()))
            errors.append(float(gaps.std(ddof=1)) / math.sqrt(rows))
            by_stage = run.prompt_s.sum(axis=1) * scale / (mix.rate_rps * BASE_HORIZON_S)
            for key, last in (("latency", None), ("ttft", 2), ("wait", 1)):
                delays[key].append(by_stage[:, :last].sum(axis=1))
        fit_from = min(2, len(scales) - 2)
        slope, error = loglog_slope(*(np.array(a[fit_from:]) for a in (scales, means, errors)))
        measured = {key: [float(x.mean()) for x in values] for key, values in delays.items()}
        delay_slopes = {
            f"{key}_slope": loglog_slope(
                np.array(scales[fit_from:]), np.array(measured[key][fit_from:]),
                np.array([float(x.std(ddof=1)) / math.sqrt(rows) for x in values[fit_from:]]),
            )
            for key, values in delays.items()
        }
        results.append(
            {**measured, **delay_slopes, "delay_theory": case.delay_theory,
             "panel": case.label.startswith("Nested"), "label": case.label, "types": len(case.mix.types),
             "theory": case.theory, "slope": slope, "rows": rows,
             "slope_error": error, "fit_from_scale": scales[fit_from], "scales": scales, "gaps": means,
             "gap_errors": errors, "restarts_per_completion": float(run.evicted.sum() / run.completed.sum())}
        )  # fmt: skip
    return results


def measure_overflow(horizons: int) -> list[dict[str, Any]]:
    """How often Nested WAIT's memory exceeds M^π + buffer, and M^π alone, within the horizon, starting empty."""
    results = []
    for name, (mix, boundaries) in NESTED_CASES.items():
        for delta in PROBABILITIES:
            solution = nested_wait_thresholds(
                mix, NESTED_LAW, 10**9, boundaries=boundaries, overflow_probability=delta, horizon_s=NESTED_HORIZON_S
            )
            assert isinstance(solution, NestedWaitSolution), solution
            policy = PaperNestedWait(solution.boundaries, tuple(map(round, solution.n)))
            run = PaperRun(PaperModel(mix, NESTED_LAW), policy, seed=round(1 / delta), rows=horizons)
            run.run(NESTED_HORIZON_S)
            above_tokens = run.peak_tokens - solution.memory_tokens
            hits, hits_without = (int((above_tokens > room).sum()) for room in (solution.buffer_tokens, 0.0))
            interval = binomtest(hits, horizons).proportion_ci(0.95, "exact")
            values, counts = np.unique(above_tokens, return_counts=True)
            results.append(
                {"case": name, "delta": delta, "horizons": horizons, "n": solution.n, "theta": solution.theta,
                 "survival": solution.survival, "boundaries": boundaries, "memory_tokens": solution.memory_tokens,
                 "buffer_tokens": solution.buffer_tokens, "iterations": float(run.iterations.mean()),
                 "overflows": hits, "interval_95": [float(interval.low), float(interval.high)],
                 "overflows_without_buffer": hits_without,
                 "buffer_needed_tokens": float(np.quantile(above_tokens, 1 - delta, method="inverted_cdf")),
                 "peak_above_m_pi_tokens": values.tolist(), "peak_horizons": counts.tolist()}
            )  # fmt: skip
    return results


def compare_memory() -> dict[str, Any]:
    """M*(λ) with the d0, d1, C and E[w] of the authors' repository, all of it a prediction."""
    profile = load_profile("a100-llama2-7b-paper")
    time_model, capacity = profile.time_model, profile.kv_capacity_tokens
    # Any lengths with that mean weight do: M* depends on nothing else.
    short, long = (Lengths.point(58, output).kv_token_iterations for output in (147, 200))
    share = (PUBLISHED_MEAN_W - short) / (long - short)
    lengths = Lengths(np.array([58, 58]), np.array([147, 200]), np.array([1 - share, share]))

    def memory_tokens(rate_rps: float) -> float:
        return solve_fluid(WorkloadMix.from_lengths(lengths, rate_rps), time_model, capacity).memory_tokens

    rates = np.linspace(20, 84, 129)
    crossing = solve_fluid(WorkloadMix.from_lengths(lengths, 1.0), time_model, capacity).critical_rate_scale
    return {
        "d0_ms": time_model.d0_s * 1000, "d1_us": time_model.d1_s_per_kv_token * 1e6,
        "mean_w": lengths.kv_token_iterations,
        "capacity_tokens": capacity,
        "rows": [
            {"rate_rps": rate, "published": published, "computed": memory_tokens(rate)}
            for rate, published in PUBLISHED_MEMORY.items()
        ],
        "crossing_rps": crossing,
        "published_crossing_rps": PUBLISHED_CROSSING_RPS,
        "curve": {"rate_rps": rates.tolist(), "memory_tokens": [memory_tokens(rate) for rate in rates]},
    }  # fmt: skip


def follow_worked_case(iterations: int) -> list[dict[str, Any]]:
    """l = l' = 1, C = 12, exactly 4 arrivals during every iteration, from 6 waiting and 3 decoding."""
    results = []
    for label, policy in (("FCFS", PaperFcfs()), ("WAIT, n = 4", PaperWait((4,)))):
        model, start = PaperModel(ONE_TYPE, ONE_TYPE_LAW), np.array([[6, 3]])
        run = PaperRun(model, policy, seed=0, capacity_tokens=12, arrivals=PerIteration((4,)), start=start)
        completed, evicted, waiting = [0], [0], []
        for _ in range(iterations):
            run.step()
            completed.append(int(run.completed[0, 0]))
            evicted.append(int(run.evicted[0]))
            waiting.append(int(run.counts[0, 0, 0]))
        results.append({"label": label, "completions": np.diff(completed).tolist(),
                        "evictions": np.diff(evicted).tolist(), "waiting": waiting})  # fmt: skip
    return results


if __name__ == "__main__":
    main()
