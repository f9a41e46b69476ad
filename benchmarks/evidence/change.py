"""Goodput while load, lengths or the hardware change: `fluid` beside the best single static setting, change.md.

    python benchmarks/evidence/change.py [--out docs/evidence] [--runs runs/change] [--traces FOLDER] [--quick]
                                         [--workers N] [--only REGEX] [--again REGEX]

Runs that are in --runs already are kept; --again fluid makes those of `fluid` anew, --workers 0 only writes the page.
--traces is a folder with azure_conv_2023.csv and lmsys_lengths.csv, which most scenarios need. --quick is for tests of
this script and too small to conclude anything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from change_page import page
from grids import Choice, Grid, arguments, run_grids
from slo_workloads import (
    CAP_SHARES,
    PERIOD_S,
    Runs,
    SloWorkload,
    bound_rps,
    running_at_capacity,
    static_grid,
    static_neighbours,
)

SEEDS = (1, 2, 3)
CAPS_BETWEEN = 6
BUDGETS = (512, 1024)
BASELINES: dict[str, dict[str, Any]] = {
    "vllm": {"policy": "vllm", "until_decided": True},
    "dynamo": {"policy": "dynamo", "until_decided": True},
    "llm-d": {"policy": "llm-d", "until_decided": True},
    "fluid": {"policy": "fluid", "period_s": PERIOD_S},
}
AZURE, LMSYS = "@{traces}/azure_conv_2023.csv", "@{traces}/lmsys_lengths.csv"
AZURE_BOUND = {"trace": "azure_conv_2023.csv"}


@dataclass(frozen=True)
class Scenario:
    """A run in which something changes.

    workload: its fluid bound is capacity, with the target; load: the rate over that capacity; options:
    what changes. others: workloads after a shift; the oracle's caps are tried around their running requests as
    well, as around `shares` of them. changes_s: virtual seconds of lasting changes, for the time to settle.
    """

    name: str
    about: str
    workload: SloWorkload
    load: float
    seconds: float
    options: dict[str, Any]
    others: tuple[SloWorkload, ...] = ()
    shares: tuple[float, ...] = CAP_SHARES
    changes_s: tuple[float, ...] = field(default=())


CONVERSATION = SloWorkload("Azure conversation", AZURE_BOUND, 0.08)
ANSWERS, PROMPTS = (SloWorkload(text, {"lengths": text}, 0.08) for text in ("p200d300", "p1800d40"))
SCENARIOS = (
    Scenario(
        "step", "Azure conversation, 0.5 of capacity, three times that from 120 to 240 s", CONVERSATION, 0.5, 360,
        {"arrivals": "step:at=120,until=240,factor=3", "lengths": AZURE}, changes_s=(120, 240),
    ),
    Scenario(
        "traces", "lmsys lengths, the Azure conversation's from 120 to 240 s, at 1.3 of the latter's capacity",
        CONVERSATION, 1.3, 360, {"lengths": f"{LMSYS}; 120s: {AZURE}; 240s: {LMSYS}"},
        others=(SloWorkload("lmsys", {"trace": "lmsys_lengths.csv"}, 0.08),), changes_s=(120, 240),
    ),
    Scenario(
        "mix", "p200d300, then p1800d40 from 120 to 240 s, at 1.3 of the capacity for the former", ANSWERS, 1.3, 360,
        {"lengths": "p200d300; 120s: p1800d40; 240s: p200d300"}, others=(PROMPTS,), changes_s=(120, 240),
    ),
    Scenario(
        "diurnal", "Azure conversation, a sine of amplitude 0.8 and period 180 s around capacity", CONVERSATION, 1.0,
        360, {"arrivals": "diurnal:period=180,amplitude=0.8", "lengths": AZURE},
    ),
    Scenario(
        "bursts", "Azure conversation at capacity, gaps between requests with a coefficient of variation of 3",
        CONVERSATION, 1.0, 360, {"arrivals": "gamma:cv=3", "lengths": AZURE},
    ),
    Scenario(
        "on-off", "Azure conversation, 20 s at 1.8 of capacity and 20 s of silence, in turns", CONVERSATION, 0.9, 360,
        {"arrivals": "onoff:on=20,off=20", "lengths": AZURE},
    ),
    Scenario(
        "slow", "Azure conversation at 0.9 of capacity, the replica half as fast from 120 to 240 s", CONVERSATION, 0.9,
        360, {"slowdown": "at=120,until=240,factor=2", "lengths": AZURE}, shares=(0.35, 0.45, 0.55, *CAP_SHARES),
        changes_s=(120, 240),
    ),
)


def main() -> None:
    parser = arguments(__doc__, "runs/change")
    parser.add_argument("--traces", type=Path)
    Choice.options(parser)
    args = parser.parse_args()
    scenarios = [one for one in SCENARIOS if args.traces or "traces" not in str(one.options)]
    grids: dict[str, Grid] = {}
    options: dict[str, dict[str, Any]] = {}
    rates = {}
    for one in scenarios:
        bound = bound_rps(one.workload.mix(args.traces), one.workload.tpot_s)
        rates[one.name] = round(one.load * bound, 2)
        options[one.name] = at = options_of(one, rates[one.name], args.traces, 0.05 if args.quick else 1.0)
        for name, own in BASELINES.items():
            grids[f"{one.name}-{name}"] = Grid(at | own, {}, SEEDS if name == "fluid" else SEEDS[:1])
        grids[f"{one.name}-static"] = static_for(one, at, args.traces)
    choice = Choice.of(args)
    runs: Runs = run_grids(args.runs, grids, choice)
    around: dict[str, Grid] = {}
    for name, at in options.items():
        around |= static_neighbours(at, f"{name}-static", runs[f"{name}-static"])
    runs = {**runs, **run_grids(args.runs, around, choice)}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "change.md").write_text(page(scenarios, list(BASELINES), rates, runs))


def options_of(one: Scenario, rate: float, traces: Path | None, share: float) -> dict[str, Any]:
    """Options of every run of a scenario; the requests are those of its mean rate, a step's included."""
    more = 1.0
    if one.options.get("arrivals", "").startswith("step"):
        begin, end = one.changes_s
        more = 1 + (end - begin) / one.seconds * 2  # thrice the rate meanwhile
    changed = dict(one.options)
    if "lengths" in changed:
        changed["lengths"] = changed["lengths"].format(traces=traces)
    requests = max(30, round(rate * one.seconds * more * share))
    targets = {key: value for key, value in one.workload.options(traces).items() if key not in ("trace", "lengths")}
    return targets | changed | {"rate_rps": rate, "requests": requests, "window": [0.1, 0.95]}


def static_for(one: Scenario, at: dict[str, Any], traces: Path | None) -> Grid:
    """The oracle's grid: caps around the running requests, from the fewest of a workload to the most of another."""
    running = []
    for workload in (one.workload, *one.others):
        mix = workload.mix(traces)
        running.append(running_at_capacity(mix, bound_rps(mix, workload.tpot_s), workload.tpot_s))
    grid = static_grid(at, running[0], BUDGETS, one.shares)
    if not one.others:
        return grid
    between = np.geomspace(CAP_SHARES[1] * min(running), CAP_SHARES[1] * max(running), CAPS_BETWEEN)
    return Grid(grid.base, grid.axes | {"cap": [round(cap) for cap in between.tolist()]}, grid.seeds)


if __name__ == "__main__":
    main()
