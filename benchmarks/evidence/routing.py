"""Which replica a request goes to: our rule beside those of other projects, docs/evidence/routing.md.

    python benchmarks/evidence/routing.py --traces FOLDER [--profile FILE] [--out docs/evidence] [--runs runs/routing]
                                          [--workers N] [--only REGEX] [--seeds N] [--again REGEX] [--quick]

Four replicas of policy `fluid`, each with its own controller. Runs that are in --runs already are kept; --workers 0
only writes the page. FOLDER holds azure_conv_2023.csv. --quick is for tests of this script.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from conclusions import routing
from grids import PROFILE, Choice, Grid, arguments, mean_of, run_grids, slug, with_spread
from page_tables import with_conclusion

from simulator.scenario.routers import ROUTERS
from simulator.sweep import PointResult

REPLICAS, CAPACITY_RPS, REQUESTS = 4, 5.2, 3500
"""CAPACITY_RPS: of one replica on Azure conversation with the targets below, as in real-traffic.md."""
SEEDS = (1, 2, 3)
SPEEDS = {"equal replicas": "1", "one of four at half speed": "1,1,1,0.5"}
LOADS = {"equal replicas": (0.5, 0.9, 1.2), "one of four at half speed": (0.9, 1.2)}
INGRESSES, AGES_S = (1, 4, 16), (0.1, 1.0, 2.0)
SESSIONS = "sessions:turns=5,system=800,first=200~1,turn=120~1,output=250~1,think=20"
SESSION_LOADS, SESSIONS_RPS = (0.7, 1.2), 11.0


def load_rps(speeds: str, load: float) -> float:
    """`load` times the sum of the capacities of the replicas."""
    given = [float(speed) for speed in speeds.split(",")]
    return load * CAPACITY_RPS * sum(given) / len(given) * REPLICAS


def grids_of(traces: Path, profile: str | None, quick: bool) -> dict[str, Grid]:
    """Every run, by group."""
    requests = 60 if quick else REQUESTS
    azure = {
        "trace": str(traces / "azure_conv_2023.csv"), "slo_ttft_s": 3.0, "slo_tpot_s": 0.08, "profile": PROFILE,
        "policy": "fluid", "replicas": REPLICAS, "requests": requests,
    }
    routers: dict[str, list[Any]] = {"router": list(ROUTERS)}
    grids = {
        group(name, load): Grid(
            azure | {"rate_rps": round(load_rps(speeds, load), 3), "speeds": speeds}, routers, SEEDS
        )
        for name, speeds in SPEEDS.items() for load in LOADS[name]
    }
    for count in INGRESSES:
        at = azure | {"rate_rps": round(load_rps("1", 0.9), 3), "ingresses": count}
        grids[f"ingresses-{count}"] = Grid(at, {"stats_age_s": list(AGES_S)}, SEEDS)
    if profile is not None and Path(profile).is_file():
        for load in SESSION_LOADS:
            grids[group("sessions", load)] = Grid(
                {"lengths": SESSIONS, "slo_ttft_s": 3.0, "slo_tpot_s": 0.05, "profile": profile, "policy": "fluid",
                 "max_model_len": 32768, "replicas": REPLICAS, "requests": requests,
                 "rate_rps": round(load * SESSIONS_RPS * REPLICAS, 3)}, routers, SEEDS,
            )
    return grids


def group(name: str, load: float) -> str:
    return f"{slug(name)}-{load:g}"


def main() -> None:
    """Run what is missing, then write the page."""
    parser = arguments(__doc__, "runs/routing")
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--profile")
    Choice.options(parser)
    args = parser.parse_args()
    grids = grids_of(args.traces, args.profile, args.quick)
    results = run_grids(args.runs, grids, Choice.of(args))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "routing.md").write_text(with_conclusion(page(results), routing))


def page(results: dict[str, list[PointResult]]) -> str:
    """The page; a dash stands where nothing was run."""
    sections = [
        "\n".join([f"## {name.capitalize()}, Azure conversation", "", *HEAD, *rows_of(results, name, LOADS[name])])
        for name in SPEEDS
    ]
    sections.append("\n".join(["## Several ingresses, old reports", "", *INGRESS_HEAD, *ingress_rows(results)]))
    if any(results.get(group("sessions", load)) for load in SESSION_LOADS):
        sections.append("\n".join(["## Sessions", "", *HEAD, *rows_of(results, "sessions", SESSION_LOADS)]))
    return PAGE.format(
        replicas=REPLICAS, requests=REQUESTS, capacity=CAPACITY_RPS, profile=PROFILE, sections="\n\n".join(sections)
    )


def rows_of(results: dict[str, list[PointResult]], name: str, loads: Sequence[float]) -> list[str]:
    """A row for each load and router."""
    rows = []
    for load in loads:
        for router in ROUTERS:
            runs = [
                one.summary for one in results.get(group(name, load), []) if one.summary
                and one.options["router"] == router
            ]
            rows.append(row([f"{load:g}", f"`{router}`"], runs))
    return rows


def ingress_rows(results: dict[str, list[PointResult]]) -> list[str]:
    """A row for each number of ingresses and age of the reports."""
    return [
        row([str(count), f"{age_s:g}"], [
            one.summary for one in results.get(f"ingresses-{count}", []) if one.summary
            and one.options["stats_age_s"] == age_s
        ])
        for count in INGRESSES for age_s in AGES_S
    ]


def row(first: list[str], runs: list[dict[str, Any]]) -> str:
    """Means over the seeds, with the smallest and the largest."""
    if not runs:
        return "| " + " | ".join([*first, *["–"] * 7]) + " |"
    missed = (f"{100 * mean_of(runs, f'served_{target}_miss_fraction'):.1f} %" for target in ("ttft", "tpot"))
    values = [
        str(len(runs)), with_spread(runs, "goodput_rps"), with_spread(runs, "ttft_p50_s"),
        with_spread(runs, "ttft_p99_s"), " / ".join(missed), f"{mean_of(runs, 'rejected'):.0f}",
        f"{mean_of(runs, 'prefix_hit_fraction'):.2f}",
    ]
    return "| " + " | ".join([*first, *values]) + " |"


_MEASURED = "n | goodput /s | TTFT p50 (s) | TTFT p99 (s) | miss TTFT / TPOT | rejected | prefix hits |"
HEAD = [f"| load | router | {_MEASURED}", "|---|---|---|---|---|---|---|---|---|"]
INGRESS_HEAD = [f"| ingresses | oldest report (s) | {_MEASURED}", "|---|---|---|---|---|---|---|---|---|"]
PAGE = """# Where a request goes

<!-- conclusion: begin -->
<!-- conclusion: end -->

Made by `python benchmarks/evidence/routing.py --traces FOLDER --profile FILE`: {replicas} replicas of policy `fluid`
with vLLM's real scheduler and prefix cache in virtual time, each with its own controller from a cold start;
{requests} requests, of which the central 60 % are measured; n is the number of seeds, values are means with the
smallest and the largest. Load 1 stands for {capacity} requests/s of a replica at full speed (profile `{profile}`; 11 in
the sessions, with the 8B model of `--profile`). Goodput in requests/s within a TTFT of 3 s and a TPOT of 80 ms (50 ms
in the sessions). Our router, `fluid`, sees reports that are up to a second old; the others see the present state of
every replica, which favours them. Ours knows the exact length of a prompt here; when serving it knows the characters,
which favours ours. The replicas admit and reject alike under every router.

{sections}
"""


if __name__ == "__main__":
    main()
