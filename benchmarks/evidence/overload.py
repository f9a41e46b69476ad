"""Goodput below, at and beyond capacity: `fluid` beside vLLM and the rules others ship, docs/evidence/overload.md.

    python benchmarks/evidence/overload.py [--out docs/evidence] [--runs runs/overload] [--traces FOLDER] [--quick]
                                           [--workers N] [--only REGEX] [--again REGEX]

Runs that are in --runs already are kept; --again fluid makes those of `fluid` anew, --workers 0 only writes the page.
--traces is a folder with azure_conv_2023.csv and lmsys_lengths.csv; without it their rows are left out. --quick is for
tests of this script and too small to conclude anything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from grids import Choice, Grid, arguments, run_grids, slug
from overload_page import draw, page
from slo_workloads import (
    PERIOD_S,
    PROFILE,
    TOKEN_BUDGETS,
    Runs,
    SloWorkload,
    bound_rps,
    running_at_capacity,
    static_grid,
    static_neighbours,
    static_seeds,
    statics,
)

LOADS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0)
FREE_LOADS = (0.9, 1.0, 1.1)
REFINED_LOADS = (2.0,)
SEEDS = (1, 2, 3)
SEEDED_FROM = 0.9
"""Below this load every request is served in time whatever the seed, and one is run."""
SHIPPED_LOADS = (0.7, 1.0, 1.2, 1.5, 2.0, 3.0)
"""Below these the rules that others ship reject nothing, and are plain vLLM."""


@dataclass(frozen=True)
class ComparedPolicy:
    """A policy to compare with, and at which loads; `options` are its own. early: its runs end once the measured
    requests are decided, because its backlog would take too long."""

    name: str
    loads: tuple[float, ...]
    options: dict[str, Any]
    early: bool = False


STRICT = {"mode": "strict", "counts": "by_cap"}
BASELINES = (
    ComparedPolicy("vllm", LOADS, {"policy": "vllm"}),
    ComparedPolicy("vllm-queue", SHIPPED_LOADS, {"policy": "vllm-queue"}),
    ComparedPolicy("vllm-watermark", (1.0, 1.2, 2.0), {"policy": "vllm-watermark"}, early=True),
    ComparedPolicy("dynamo", SHIPPED_LOADS, {"policy": "dynamo"}),
    ComparedPolicy("llm-d", SHIPPED_LOADS, {"policy": "llm-d"}),
    ComparedPolicy("strict-wait", (0.7, 2.0), {"policy": "wait"} | STRICT, early=True),
    ComparedPolicy("strict-nested-wait", (0.7, 2.0), {"policy": "nested-wait"} | STRICT, early=True),
    ComparedPolicy("fluid", LOADS, {"policy": "fluid", "period_s": PERIOD_S}),
)


@dataclass(frozen=True)
class Case:
    """A workload with how many virtual seconds of arrivals a run has, and at which loads.

    static: where the oracle searches, among which `budgets`. early: beyond this load every run of others ends once the
    measured requests are decided. free: also run without targets. named: part of what the policy was made for. seeds:
    of `fluid` from load 0.9 on.
    """

    workload: SloWorkload
    arrivals_s: float
    loads: tuple[float, ...] = LOADS
    static: tuple[float, ...] = (1.2, 2.0, 3.0)
    budgets: tuple[int, ...] = TOKEN_BUDGETS
    early: float = 3.0
    free: bool = False
    named: bool = True
    seeds: tuple[int, ...] = SEEDS
    baselines: tuple[str, ...] = field(default=tuple(baseline.name for baseline in BASELINES))


AZURE, LMSYS = {"trace": "azure_conv_2023.csv"}, {"trace": "lmsys_lengths.csv"}
FEW = ("vllm", "dynamo", "llm-d", "fluid")
CASES = (
    Case(SloWorkload("p512d20, 80 ms", {"lengths": "p512d20"}, 0.08), 120, free=True),
    Case(SloWorkload("0.7 p512d20 + 0.3 p512d50, 80 ms", {"lengths": "0.7:p512d20+0.3:p512d50"}, 0.08), 120),
    Case(
        SloWorkload("p512d1000, 80 ms", {"lengths": "p512d1000"}, 0.08), 600, budgets=(1024,), early=1.2, free=True,
        seeds=(1,),
    ),
    Case(SloWorkload("Azure conversation, 80 ms", AZURE, 0.08), 300, free=True),
    Case(SloWorkload("Azure conversation, 50 ms", AZURE, 0.05), 300),
    Case(SloWorkload("lmsys lengths, 50 ms", LMSYS, 0.05), 120, budgets=(512, 1024), free=True),
    Case(
        SloWorkload("long prompts, heavy-tailed answers, 80 ms", {"lengths": "p2500~0.3d300~1.2"}, 0.08), 600,
        loads=(0.7, 1.0, 1.2, 2.0), static=(1.2, 2.0), early=1.2, named=False, baselines=FEW,
    ),
    Case(
        SloWorkload("long prompts, short answers, 80 ms", {"lengths": "p1400~0.5d28~0.8"}, 0.08), 200,
        loads=(0.7, 1.0, 1.2, 2.0), static=(1.2, 2.0), early=1.2, named=False, baselines=FEW,
    ),
)


def main() -> None:
    parser = arguments(__doc__, "runs/overload")
    parser.add_argument("--traces", type=Path)
    Choice.options(parser)
    args = parser.parse_args()
    cases = [case for case in CASES if "trace" not in case.workload.source or args.traces]
    bounds, grids, refinements = {}, {}, {}
    for case in cases:
        mix = case.workload.mix(args.traces)
        bound = bounds[case.workload.name] = bound_rps(mix, case.workload.tpot_s)
        running = running_at_capacity(mix, bound, case.workload.tpot_s)
        for load in case.loads:
            requests = max(30, round(round(load * bound, 2) * case.arrivals_s * (0.05 if args.quick else 1.0)))
            at = {"rate_rps": round(load * bound, 2), "requests": requests}
            group = f"{slug(case.workload.name)}-{load:g}"
            options = case.workload.options(args.traces) | at
            grids |= baselines_at(case, load, group, options, running)
            if load in case.static:
                grids[f"{group}-static"] = static_grid(options, running, case.budgets)
            if load in case.static and load in REFINED_LOADS:
                refinements[f"{group}-static"] = options
        if case.free:
            grids |= without_targets(case, bound, case.workload.lengths_of(args.traces), args.quick)
    runs: Runs = run_grids(args.runs, grids, choice := Choice.of(args))
    around = {k: v for name, at in refinements.items() for k, v in static_neighbours(at, name, runs[name]).items()}
    runs = {**runs, **run_grids(args.runs, around, choice)}
    oracles = [name for name in grids if name.endswith("-static")]
    again = {k: v for name in oracles for k, v in static_seeds(name, statics(runs, name), SEEDS).items()}
    runs = {**runs, **run_grids(args.runs, again, choice)}
    args.out.mkdir(parents=True, exist_ok=True)
    text = page(cases, BASELINES, bounds, runs)
    (args.out / "overload.md").write_text(text)
    draw(args.out / "figures" / "overload-azure", text, bounds)


def baselines_at(case: Case, load: float, group: str, options: dict[str, Any], running: float) -> dict[str, Grid]:
    """Every baseline that runs at this load."""
    grids = {}
    for baseline in BASELINES:
        if baseline.name not in case.baselines or load not in baseline.loads:
            continue
        own = dict(baseline.options)
        if "counts" in own:
            own["cap"] = max(1, round(running))
        if baseline.name != "fluid" and (baseline.early or load > case.early):
            own["until_decided"] = True
        seeds = case.seeds if baseline.name == "fluid" and load >= SEEDED_FROM else SEEDS[:1]
        grids[f"{group}-{baseline.name}"] = Grid(options | own, {}, seeds)
    return grids


def without_targets(case: Case, bound: float, lengths: dict[str, Any], quick: bool) -> dict[str, Grid]:
    """Plain vLLM, and `fluid` without targets, around capacity."""
    grids = {}
    for load in FREE_LOADS:
        rate = round(load * bound, 2)
        at = {"profile": PROFILE, "rate_rps": rate}
        at["requests"] = max(30, round(rate * case.arrivals_s * (0.05 if quick else 1.0)))
        for policy, own in (("vllm", {}), ("fluid", {"period_s": PERIOD_S})):
            name = f"{slug(case.workload.name)}-{load:g}-{policy}-without-targets"
            grids[name] = Grid(lengths | at | own | {"policy": policy}, {}, SEEDS[:1])
    return grids


if __name__ == "__main__":
    main()
