"""WAIT and Nested WAIT beside first come, first served, beyond capacity and without targets: past-capacity.md.

    python benchmarks/evidence/past_capacity.py [--traces FOLDER] [--out docs/evidence] [--runs runs/past] [--quick]

Azure conversation is left out without `--traces`. Runs that are in --runs already are kept. --quick is for tests of
this script and too small to conclude anything.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from conclusions import past_capacity
from grids import PROFILE, Choice, Grid, arguments, by, fluid_of, mean_of, run_grids, slug
from page_tables import with_conclusion

COMMAND = "python benchmarks/evidence/past_capacity.py --traces FOLDER"
LOADS = (1.05, 1.3, 2.0)
POLICIES = ("fcfs", "wait", "nested-wait")
LENGTHS = {
    "p64d32": "p64d32", "p512d20": "p512d20", "two types": "0.7:p512d20+0.3:p512d50", "lmsys": "lmsys",
}
AZURE = "azure_conv_2023.csv"


def main() -> None:
    parser = arguments(__doc__, "runs/past")
    Choice.options(parser)
    parser.add_argument("--traces", type=Path, help="folder with azure_conv_2023.csv")
    args = parser.parse_args()
    sources = LENGTHS | ({"Azure conversation": f"@{args.traces / AZURE}"} if args.traces else {})
    capacities = {name: fluid_of(lengths, PROFILE).critical_rate_scale for name, lengths in sources.items()}
    requests = 40 if args.quick else 3500
    grids = {
        f"{slug(name)}-{load:g}": grid(name, lengths, load * capacities[name], requests, args.traces)
        for name, lengths in sources.items() for load in LOADS
    }
    results = run_grids(args.runs, grids, Choice.of(args))
    rows = [
        row(name, load, by(results[f"{slug(name)}-{load:g}"], "policy"), load * capacities[name])
        for name in sources for load in LOADS
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    text = PAGE.format(command=COMMAND, requests=requests, profile=PROFILE, rows="\n".join(rows))
    (args.out / "past-capacity.md").write_text(with_conclusion(text, past_capacity))


def grid(name: str, lengths: str, rate_rps: float, requests: int, traces: Path | None) -> Grid:
    source: dict[str, Any] = {"trace": str(traces / AZURE)} if traces and name not in LENGTHS else {"lengths": lengths}
    base = source | {"rate_rps": round(rate_rps, 3), "requests": requests, "profile": PROFILE}
    return Grid(base, {"policy": list(POLICIES)}, seeds=(1,))


def row(name: str, load: float, cells: Any, rate_rps: float) -> str:
    """Throughput, its ratio to fcfs, and preemptions, by policy."""
    runs = {policy: cells[policy,] for policy in POLICIES}
    served = {policy: mean_of(runs[policy], "throughput_rps") for policy in POLICIES}
    values = [name, f"{load:g}", f"{rate_rps:.2f}", *(f"{served[policy]:.2f}" for policy in POLICIES)]
    values += [f"{served[policy] / (served['fcfs'] or math.nan):.3f}" for policy in POLICIES[1:]]
    values += [f"{mean_of(runs[policy], 'preemptions'):.0f}" for policy in POLICIES]
    return "| " + " | ".join(values) + " |"


PAGE = """# WAIT and Nested WAIT beyond capacity

<!-- conclusion: begin -->
<!-- conclusion: end -->

Made by `{command}`. {requests} Poisson
arrivals at a multiple of the fluid model's capacity, no targets, profile `{profile}`, one seed, controller on.
Throughput in requests/s of the central window. Beyond capacity no thresholds are feasible, so that WAIT's and Nested
WAIT's queues stand open and only a cap from memory limits admission.

| workload | load | offered /s | fcfs /s | wait /s | nested-wait /s | wait / fcfs | nested-wait / fcfs \
| fcfs: preemptions | wait: preemptions | nested-wait: preemptions |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
