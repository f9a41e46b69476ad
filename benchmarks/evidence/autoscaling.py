"""How many replicas: our decision beside the rules of others and an oracle, docs/evidence/autoscaling.md.

    python benchmarks/evidence/autoscaling.py [--traces FOLDER] [--out docs/evidence] [--runs runs/autoscaling]
                                              [--workers N] [--only REGEX] [--seeds N] [--again REGEX] [--quick]

Runs that are in --runs already are kept; --workers 0 only writes the page. FOLDER holds azure_conv_week.csv, without
which its rows are left out. --quick is for tests of this script.
"""

from __future__ import annotations

import os
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from conclusions import autoscaling
from grids import Choice, Grid, arguments, mean_of, run_grids, slug, with_spread
from page_tables import with_conclusion

from simulator.sweep import PointResult

PROFILE, LENGTHS, TTFT_S, TPOT_S = "cpu-smollm2", "p64~0.5d32~0.5", 3.0, 0.25
START_UPS_S, SEEDS, SECONDS, MOST = (60, 180), (1, 2, 3), 1200, 16
SCENARIOS: dict[str, dict[str, Any]] = {
    "diurnal": {"arrivals": f"diurnal:period={SECONDS},amplitude=0.7", "rate_rps": 4.0, "requests": 4 * SECONDS},
    "steps": {"arrivals": "step:at=300,until=700,factor=3", "rate_rps": 2.0, "requests": 2 * 300 + 6 * 400 + 2 * 500},
    "bursts": {"arrivals": "gamma:cv=3", "rate_rps": 4.0, "requests": 4 * SECONDS},
}
BEHIND_OUR_GATE = {"policy": "fluid", "router": "fluid"}
AS_IT_COMES = {"policy": "vllm", "router": "power-of-two"}
RULES: dict[str, dict[str, Any]] = {
    **{f"fluid:late_costs={cost}": BEHIND_OUR_GATE for cost in (2, 10, 100)},
    "ongoing-requests:target=3": AS_IT_COMES, "ongoing-requests:target=6": AS_IT_COMES, "slo-keda": AS_IT_COMES,
    "oracle": BEHIND_OUR_GATE,
}
HEAD = ["| rule | n | replica-hours | late or rejected | rejected |", "|---|---|---|---|---|"]


def grids_of(traces: Path | None, quick: bool) -> dict[str, Grid]:
    """Every run, by group."""
    scenarios = dict(SCENARIOS)
    if traces is not None and (week := traces / "azure_conv_week.csv").is_file():
        scenarios["Azure week"] = {"trace": str(week), "arrivals": "replay", "rate_rps": 4.0, "requests": 4 * SECONDS}
    base = {
        "profile": PROFILE, "slo_ttft_s": TTFT_S, "slo_tpot_s": TPOT_S, "window": [0.0, 1.0], "replicas": 4,
        "min_replicas": 1, "max_replicas": MOST,
    }
    grids = {}
    for name, options in scenarios.items():
        for start_up_s in START_UPS_S:
            for rule, stack in RULES.items():
                lengths = {} if "trace" in options else {"lengths": LENGTHS}
                small = {"requests": 60} if quick else {}
                grids[group(name, start_up_s, rule)] = Grid(
                    base | lengths | options | stack | {"start_up_s": start_up_s, "autoscale": rule} | small, {}, SEEDS
                )
    return grids


def group(scenario: str, start_up_s: int, rule: str) -> str:
    return f"{slug(scenario)}-{start_up_s}-{slug(rule)}"


def main() -> None:
    """Run what is missing, then write the page."""
    parser = arguments(__doc__, "runs/autoscaling")
    parser.add_argument("--traces", type=Path)
    Choice.options(parser)
    args = parser.parse_args()
    results = run_grids(args.runs, grids_of(args.traces, args.quick), Choice.of(args))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "autoscaling.md").write_text(with_conclusion(page(results), autoscaling))


def page(results: dict[str, list[PointResult]]) -> str:
    """The page; what was not run is left out."""
    sections = []
    for name in (*SCENARIOS, "Azure week"):
        for start_up_s in START_UPS_S:
            rows = [
                row(rule, runs) for rule in RULES
                if (runs := [one.summary for one in results.get(group(name, start_up_s, rule), []) if one.summary])
            ]
            if rows:
                sections.append("\n".join([f"## {name.capitalize()}, {start_up_s} s to come up", "", *HEAD, *rows]))
    return PAGE.format(
        profile=PROFILE, lengths=LENGTHS, ttft=TTFT_S, tpot=1000 * TPOT_S, most=MOST, seconds=SECONDS,
        sections="\n\n".join(sections),
    )


def row(rule: str, runs: list[dict[str, Any]]) -> str:
    """Means over the seeds, with the smallest and the largest."""
    late = [
        {"late": 100 * (1 - run["goodput_rps"] * (run["window_to_s"] - run["window_from_s"]) / run["window_requests"])}
        for run in runs
    ]
    rejected = mean(100 * run["rejected"] / run["requests"] for run in runs)
    cells = [
        f"`{rule}`", str(len(runs)), with_spread(runs, "replica_hours"), f"{with_spread(late, 'late')} %",
        f"{rejected:.2f} %",
    ]
    assert mean_of(runs, "window_requests") > 0
    return "| " + " | ".join(cells) + " |"


PAGE = """# How many replicas

<!-- conclusion: begin -->
<!-- conclusion: end -->

Made by `python benchmarks/evidence/autoscaling.py`: vLLM's real scheduler in virtual time, profile `{profile}`, lengths
`{lengths}`, targets of {ttft:g} s to the first token and {tpot:g} ms for each further one, four replicas at first, 1 to
{most} allowed; {seconds} virtual seconds. Replica-hours count from when a replica is started until it has finished its
last request. Late or rejected are all requests that did not end within both targets. `fluid` and `oracle` decide for
replicas of the policy `fluid`, which rejects, behind our router; the other rules for vLLM as it comes behind Ray
Serve's default router, as neither could work behind a gate that rejects. `oracle` knows the arrivals to come and what a
replica takes on average, without headroom. n is the number of seeds; values are means, with the smallest and the
largest. Ray waits 600 s before it removes a replica, half of such a run, which favours ours. Scenarios and start-up
times of the script that were not run are left out.

{sections}
"""


if __name__ == "__main__":
    main()
