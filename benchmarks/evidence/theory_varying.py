"""Nested WAIT while arrival rates move: thresholds for the mean rate and for the worst windows. Part of theory.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from theory_fit import loglog_slope, table

from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.varying_rates import Stretch
from scheduler.model.wait_thresholds import NestedWaitSolution, nested_wait_thresholds
from scheduler.model.workload import Lengths, WorkloadMix
from simulator.paper_model import PaperModel, PaperNestedWait, PaperRun

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
TIME_MODEL = IterationTimeModel(1 / 4, 1 / 4800)
LENGTHS = Lengths(np.array([4, 4]), np.array([2, 8]), np.array([0.3, 0.7]))
BOUNDARIES = (2, 8)
HORIZON_S = 100.0
STRETCH_S, RATES_RPS = 25.0, (12.0, 26.0, 12.0, 26.0)


class VaryingArrivals:
    """Poisson arrivals of one type with a rate that changes every `seconds`, the last one going on for ever.

    `run` must be set before it runs: rates depend on its clocks.
    """

    def __init__(self, seconds: float, rates_rps: tuple[float, ...], rng: np.random.Generator) -> None:
        self._edges_s: FloatArray = np.append(seconds * np.arange(len(rates_rps)), 1e9)
        widths = np.diff(self._edges_s)
        self._expected: FloatArray = np.concatenate([[0.0], np.cumsum(widths * np.array(rates_rps))])
        self._rng = rng
        self.run: PaperRun

    def during(self, seconds: FloatArray) -> IntArray:
        """Arrivals of the `seconds` before the clocks, which the run has moved by then."""
        ends_s = self.run.clock_s
        return self._rng.poisson(np.maximum(self._until(ends_s) - self._until(ends_s - seconds), 0.0))[:, None]

    def following(self) -> tuple[FloatArray, IntArray]:
        """The next arrival after each clock."""
        now_s = self.run.clock_s
        reached = self._until(now_s) + self._rng.exponential(1.0, now_s.size)
        next_s = np.interp(reached, self._expected, self._edges_s)
        return np.maximum(next_s - now_s, 1e-12), np.zeros(now_s.size, dtype=np.int64)

    def _until(self, at_s: FloatArray) -> FloatArray:
        return np.interp(at_s, self._edges_s, self._expected)


def measure_varying(powers: int, rows: int) -> list[dict[str, Any]]:
    """Gap and service-normalised delays at ζ = 1, 4, …: rates × ζ and speeds × ζ, while rates change at fixed times."""
    results = []
    mean_rps = float(np.mean(RATES_RPS))
    mix = WorkloadMix.from_lengths(LENGTHS, mean_rps)
    stretches = tuple(Stretch(STRETCH_S, WorkloadMix.from_lengths(LENGTHS, rate)) for rate in RATES_RPS)
    for label, over_time in (("mean rate", ()), ("worst windows", stretches)):
        solution = nested_wait_thresholds(
            mix, TIME_MODEL, 10**9, boundaries=BOUNDARIES, horizon_s=HORIZON_S, over_time=over_time
        )
        assert isinstance(solution, NestedWaitSolution), solution
        policy = PaperNestedWait(solution.boundaries, tuple(round(n) for n in solution.n))
        scales = [4**power for power in range(powers)]
        measured: dict[str, list[FloatArray]] = {"gap": [], "latency": [], "ttft": []}
        for scale in scales:
            time_model = TIME_MODEL.faster(scale)
            arrivals = VaryingArrivals(
                STRETCH_S, tuple(rate * scale for rate in RATES_RPS), np.random.default_rng(scale)
            )
            model = PaperModel(mix.scaled(scale), time_model)
            run = PaperRun(model, policy, seed=scale, rows=rows, arrivals=arrivals)
            arrivals.run = run
            run.run(HORIZON_S)
            offered = mean_rps * scale * HORIZON_S
            by_stage = run.prompt_s.sum(axis=1) * scale / offered
            measured["gap"].append(run.counts.sum(axis=(1, 2)) / offered)
            measured["latency"].append(by_stage.sum(axis=1))
            measured["ttft"].append(by_stage[:, :2].sum(axis=1))
        slopes = {
            key: loglog_slope(
                np.array(scales[1:] if powers > 2 else scales, dtype=float),
                *(np.array([f(x) for x in values[1 if powers > 2 else 0 :]]) for f in (np.mean, standard_error)),
            )
            for key, values in measured.items()
        }
        results.append({
            "label": label, "n": [round(n) for n in solution.n], "iteration_s": solution.iteration_s, "scales": scales,
            "slopes": slopes, "rows": rows,
            **{key: [float(x.mean()) for x in values] for key, values in measured.items()},
        })  # fmt: skip
    return results


def standard_error(values: FloatArray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(values.size)


def varying_text(rows: list[dict[str, Any]]) -> str:
    """The section of the page."""
    scales = rows[0]["scales"]
    cells = [
        (r["label"], ", ".join(map(str, r["n"])), *(f"{x:.3g}" for x in r["latency"]),
         *(f"{r['slopes'][key][0]:.2f}" for key in ("latency", "ttft", "gap")))
        for r in rows
    ]  # fmt: skip
    mean, worst = rows
    low, high = min(RATES_RPS), max(RATES_RPS)
    return VARYING.format(
        table=table(("thresholds for", "n", *(f"latency, s, at ζ = {s}" for s in scales), "latency: slope",
                     "TTFT: slope", "gap: slope"), cells),
        low=f"{low:g}", high=f"{high:g}", stretch=f"{STRETCH_S:g}", rows=mean["rows"],
        carries=f"{mean['n'][0] / mean['iteration_s']:.1f}", mean_slope=f"{mean['slopes']['latency'][0]:.2f}",
        worst_slope=f"{worst['slopes']['latency'][0]:.2f}", gap=f"{worst['slopes']['gap'][0]:.2f}",
        worst_carries=f"{worst['n'][0] / worst['iteration_s']:.1f}",
    )  # fmt: skip


VARYING = """\
## Rates that move

The paper's time-varying theorem asks for the threshold conditions in every window, Σ A_j(t, ΔT(n)) < n_1, in place of
the mean rate (`over_time` of `nested_wait_thresholds`), and promises a gap of O(1/(ζT)) and O(1) delays. Outputs of 2
or 8 tokens as below, {low} and {high} arrivals a second in turn for {stretch} s each, {rows} runs; the changes stay
where they are in time while arrivals and speeds × ζ.

COMMAND

{table}

- Thresholds for the mean rate carry {carries} /s: while {high} come, the entry queue grows with ζ, and
  service-normalised latency with a slope of {mean_slope}.
- Those of the worst windows carry {worst_carries} /s; latency has a slope of {worst_slope}, the gap one of {gap}.
- The delay bound also needs that groups keep forming (no lull). Here {low} /s always do.
"""
