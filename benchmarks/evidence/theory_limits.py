"""What no policy can do at C = M*, on the paper's model: lower bounds beside simulations. Part of theory.py's page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from theory_fit import loglog_slope, table

from scheduler.model.fluid import solve_fluid
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.workload import Lengths, RequestType, WorkloadMix
from simulator.paper_model import PaperFcfs, PaperModel, PaperPolicy, PaperRun

IntArray = NDArray[np.int64]
BASE_HORIZON_S = 100.0

# ΔT* = 1 s and C = M* in both: 9 tokens for two known types (the paper's instance), 18 for outputs of 1 or 2 tokens.
TWO_TYPES = WorkloadMix(
    (RequestType("short", 1.0, Lengths.point(1, 1)), RequestType("long", 1.0, Lengths.point(1, 2)))
)
TWO_TYPES_LAW = IterationTimeModel(7 / 16, 1 / 16)
UNKNOWN = WorkloadMix.from_lengths(Lengths(np.array([1, 1]), np.array([1, 2]), np.array([0.5, 0.5])), 4.0)
UNKNOWN_LAW = IterationTimeModel(14 / 32, 1 / 32)
ENTRIES = (3, 4, 5, 6)
BLOCK_OVERFLOW = 1 - 9 / (2 * math.e**2)
"""Of a two-iteration block of the two-type instance, as the paper's proof enumerates it."""


class EntryLimit:
    """All admitted prompts run, and at most `limit` prompts enter an iteration; none is held."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def batch(self, counts: IntArray) -> IntArray:
        batch = counts.copy()
        np.minimum(batch[:, :, 0], self._limit, out=batch[:, :, 0])
        return batch


class Reserved:
    """One type of unknown length: a prompt enters only if memory suffices however long every answer turns out."""

    def __init__(self, model: PaperModel, capacity_tokens: int) -> None:
        self._tokens, self._capacity_tokens = model.tokens[0], capacity_tokens

    def batch(self, counts: IntArray) -> IntArray:
        batch, stages = counts.copy(), len(self._tokens)
        for ahead in range(stages):
            grown = counts[:, 0, 1 : stages - ahead] @ self._tokens[1 + ahead :]
            np.minimum(batch[:, 0, 0], (self._capacity_tokens - grown) // self._tokens[ahead], out=batch[:, 0, 0])
        np.maximum(batch[:, 0, 0], 0, out=batch[:, 0, 0])
        return batch


@dataclass(frozen=True)
class LimitCase:
    """A policy at C = M*."""

    label: str
    mix: WorkloadMix
    time_model: IterationTimeModel
    policy: PaperPolicy


def limit_cases() -> list[LimitCase]:
    unknown = PaperModel(UNKNOWN, UNKNOWN_LAW)
    capacity = capacity_tokens(UNKNOWN, UNKNOWN_LAW)
    return [
        LimitCase("two known types, FCFS", TWO_TYPES, TWO_TYPES_LAW, PaperFcfs()),
        LimitCase("unknown lengths, FCFS", UNKNOWN, UNKNOWN_LAW, PaperFcfs()),
        *(LimitCase(f"unknown lengths, {n} enter at most", UNKNOWN, UNKNOWN_LAW, EntryLimit(n)) for n in ENTRIES),
        LimitCase("unknown lengths, room for the longest", UNKNOWN, UNKNOWN_LAW, Reserved(unknown, capacity)),
    ]


def capacity_tokens(mix: WorkloadMix, time_model: IterationTimeModel) -> int:
    """M*, a whole number here."""
    return round(solve_fluid(mix, time_model, 10**9).memory_tokens)


def measure_limits(powers: int, rows: int) -> list[dict[str, Any]]:
    """Relative throughput gap at ζ = 1, 4, 16, … of policies at C = M*; slope from the second ζ on."""
    results = []
    for case in limit_cases():
        capacity = capacity_tokens(case.mix, case.time_model)
        scales = [4**power for power in range(powers)]
        means, errors, restarts = [], [], 0.0
        owed_at = np.array([t.lengths.mean_output_tokens for t in case.mix.types])
        for scale in scales:
            mix = case.mix.scaled(scale)
            time_model = case.time_model.faster(scale)
            run = PaperRun(PaperModel(mix, time_model), case.policy, seed=scale, rows=rows, capacity_tokens=capacity)
            run.run(BASE_HORIZON_S)
            fluid = solve_fluid(mix, time_model, capacity).throughput_tokens_per_s * BASE_HORIZON_S
            gaps = run.counts.sum(axis=2) @ owed_at / fluid
            means.append(float(gaps.mean()))
            errors.append(float(gaps.std(ddof=1)) / math.sqrt(rows))
            restarts = float(run.evicted.sum() / run.completed.sum())
        slope, error = loglog_slope(*(np.array(a[1:] if powers > 2 else a) for a in (scales, means, errors)))
        results.append({"label": case.label, "capacity_tokens": capacity, "scales": scales, "gaps": means,
                        "gap_errors": errors, "slope": slope, "slope_error": error, "rows": rows,
                        "restarts_per_completion": restarts})  # fmt: skip
    return results


def limits_text(rows: list[dict[str, Any]]) -> str:
    """The section of the page."""
    scales = rows[0]["scales"]
    cells = [
        (r["label"], f"{r['capacity_tokens']}", *(f"{gap:.3f}" for gap in r["gaps"]),
         f"{r['slope']:.3f} ± {r['slope_error']:.3f}", f"{r['restarts_per_completion']:.2f}")
        for r in rows
    ]  # fmt: skip
    unknown = [r for r in rows if r["label"].startswith("unknown")]
    least = min(unknown, key=lambda r: float(r["gaps"][-1]))
    return LIMITS.format(
        table=table(("policy", "C = M*", *(f"ζ = {s}" for s in scales), "slope", "restarts per completion"), cells),
        rows=rows[0]["rows"], least=f"{least['gaps'][-1]:.1%}", least_label=least["label"].split(", ", 1)[1],
        block=f"{BLOCK_OVERFLOW:.3f}", two=f"{rows[0]['gaps'][-1]:.1%}",
        steepest=f"{min(r['slope'] for r in rows):.2f}",
    )


LIMITS = """\
## What no policy can do at C = M*

Two propositions of the paper: FCFS has an Ω(1) gap on an instance of two known types, and when lengths are unknown
every policy has one. The first instance is the paper's: (l, l') = (1, 1) and (1, 2) at 1 /s each, d0 = 7/16 s, d1 =
1/16 s, M* = 9 tokens. The second follows its proof: l = 1, outputs of 1 or 2 tokens with equal chance, 4 /s, d0 =
14/32 s, d1 = 1/32 s, M* = 18. Gaps relative to the fluid throughput, T = 100 s, {rows} runs each.

COMMAND

{table}

- With two known types FCFS loses {two} at the largest ζ. The paper's proof bounds the loss by a block of two iterations
  that overflows with probability 1 − 9/(2e²) = {block}.
- With unknown lengths every row keeps a gap. A few that enter leave capacity idle, many overflow when more survive the
  first token than on average, and room for the longest answer of all is idle most of the time. The least of these
  losses is {least} ({least_label}). The steepest slope of the table is {steepest}; a vanishing gap would show −0.5 or
  −1. Simulations of some policies are an illustration, and the paper's proof is for all.
- FCFS here admits what fits and evicts when it grows. In the paper's worked example it evicts running requests to
  admit new ones. Both keep the cycle going at 3 to 3.5 completions an iteration instead of 4.
"""
