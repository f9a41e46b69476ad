"""Which replica a request goes to: our rule beside those of other projects, docs/evidence/routing.md.

    python benchmarks/evidence/routing.py --traces FOLDER [--profile FILE] [--out docs/evidence] [--runs runs/routing]
                                          [--workers N] [--only REGEX] [--seeds N] [--again REGEX] [--quick]

Replicas of policy `fluid`, each with its own controller. Runs that are in --runs already are kept, so that the command
goes on where it was ended; --workers 0 only writes the page. FOLDER holds azure_conv_2023.csv and
mooncake_conversation.jsonl. --quick is for tests of this script.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from conclusions import routing
from grids import PROFILE, Choice, Grid, arguments, mean_of, run_grids, slug, with_spread
from page_tables import with_conclusion

from simulator.scenario.routers import ROUTERS
from simulator.sweep import PointResult

SEEDS = (1, 2, 3)
INGRESSES, AGES_S, INGRESS_LOAD = (1, 4, 16), (0.1, 0.5, 1.0, 2.0), 0.9
SESSIONS = "sessions:turns=5,system=800,first=200~1,turn=120~1,output=250~1,think=20"
WITH_INGRESSES = ("Equal replicas, Azure conversation", "Sessions")
TTFT_S = 3.0


@dataclass(frozen=True)
class Case:
    """One workload on some replicas. capacity_rps: of a replica at full speed, as in real-traffic.md; requests: of a
    run."""

    name: str
    options: dict[str, Any]
    capacity_rps: float
    loads: tuple[float, ...]
    replicas: int = 4
    speeds: str = "1"
    requests: int = 3500

    def at(self, load: float, quick: bool = False) -> dict[str, Any]:
        """Options at `load` times the sum of the capacities of the replicas."""
        given = [float(speed) for speed in self.speeds.split(",")]
        rate_rps = load * self.capacity_rps * sum(given) / len(given) * self.replicas
        return self.options | {
            "policy": "fluid", "slo_ttft_s": TTFT_S, "replicas": self.replicas, "speeds": self.speeds,
            "requests": 60 if quick else self.requests, "rate_rps": round(rate_rps, 3),
        }

    def group(self, load: float) -> str:
        """The name of the runs at one load."""
        return f"{slug(self.name)}-{load:g}"


def cases(traces: Path, profile: str | None) -> list[Case]:
    """What is compared; without `profile`, only what needs none."""
    azure = {"trace": str(traces / "azure_conv_2023.csv"), "slo_tpot_s": 0.08, "profile": PROFILE}
    found = [
        Case("Equal replicas, Azure conversation", azure, 5.2, (0.5, 0.9, 1.2)),
        Case("One of four at half speed, Azure conversation", azure, 5.2, (0.9, 1.2), speeds="1,1,1,0.5"),
    ]
    if profile is not None and Path(profile).is_file():
        eight = {"profile": profile, "max_model_len": 32768, "slo_tpot_s": 0.05}
        mooncake = eight | {
            "trace": str(traces / "mooncake_conversation.jsonl"), "arrivals": "replay", "max_prompt_tokens": 16000,
        }
        found += [
            Case("Sessions", eight | {"lengths": SESSIONS}, 11.0, (0.7, 0.9, 1.2)),
            Case("Mooncake conversation", mooncake, 1.5, (0.5, 0.9, 1.2), requests=2500),
            Case("Sixteen replicas, sessions", eight | {"lengths": SESSIONS}, 11.0, (0.9,), replicas=16, requests=8000),
        ]
    found.append(Case("Sixteen replicas, Azure conversation", azure, 5.2, (0.5, 0.9), replicas=16, requests=8000))
    return found


def grids_of(several: Sequence[Case], quick: bool) -> dict[str, Grid]:
    """Every run, by group."""
    routers: dict[str, list[Any]] = {"router": list(ROUTERS)}
    grids = {case.group(load): Grid(case.at(load, quick), routers, SEEDS) for case in several for load in case.loads}
    for name, case in ingress_cases(several).items():
        for count in INGRESSES:
            at = case.at(INGRESS_LOAD, quick) | {"ingresses": count}
            grids[f"ingresses-{slug(name)}-{count}"] = Grid(at, {"stats_age_s": list(AGES_S)}, SEEDS)
    return grids


def ingress_cases(several: Sequence[Case]) -> dict[str, Case]:
    """Those that are also run with several ingresses, by name."""
    return {case.name: case for case in several if case.name in WITH_INGRESSES}


def main() -> None:
    """Run what is missing, then write the page."""
    parser = arguments(__doc__, "runs/routing")
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--profile")
    Choice.options(parser)
    args = parser.parse_args()
    several = cases(args.traces, args.profile)
    results = run_grids(args.runs, grids_of(several, args.quick), Choice.of(args))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "routing.md").write_text(with_conclusion(page(several, results), routing))


def page(several: Sequence[Case], results: dict[str, list[PointResult]]) -> str:
    """The page; a dash stands where nothing was run."""
    sections = [
        "\n".join([f"## {case.name}", "", described(case), "", *HEAD, *rows_of(results, case)]) for case in several
    ]
    sections += [
        "\n".join([
            f"## Several ingresses, old reports, {name[:1].lower()}{name[1:]}", "",
            f"Load {INGRESS_LOAD:g}, router `fluid`.", "", *INGRESS_HEAD, *ingress_rows(results, name),
        ])
        for name in ingress_cases(several)
    ]
    return PAGE.format(sections="\n\n".join(sections))


def described(case: Case) -> str:
    """Targets and capacity in a sentence."""
    return (
        f"{case.replicas} replicas, {case.requests} requests; load 1 is {case.capacity_rps:g} requests/s of a replica "
        f"at full speed; TPOT target {1000 * case.options['slo_tpot_s']:g} ms."
    )


def rows_of(results: dict[str, list[PointResult]], case: Case) -> list[str]:
    """A row for each load and router."""
    rows = []
    for load in case.loads:
        for router in ROUTERS:
            runs = [
                one.summary for one in results.get(case.group(load), []) if one.summary
                and one.options["router"] == router
            ]
            rows.append(row([f"{load:g}", f"`{router}`"], runs))
    return rows


def ingress_rows(results: dict[str, list[PointResult]], name: str) -> list[str]:
    """A row for each number of ingresses and age of the reports."""
    return [
        row([str(count), f"{age_s:g}"], [
            one.summary for one in results.get(f"ingresses-{slug(name)}-{count}", []) if one.summary
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
        str(len(runs)), with_spread(runs, "goodput_rps"), with_spread(runs, "ttft_p50_s", 3),
        with_spread(runs, "ttft_p99_s", 3), " / ".join(missed), f"{mean_of(runs, 'rejected'):.0f}",
        f"{mean_of(runs, 'prefix_hit_fraction'):.2f}",
    ]
    return "| " + " | ".join([*first, *values]) + " |"


_MEASURED = "n | goodput /s | TTFT p50 (s) | TTFT p99 (s) | miss TTFT / TPOT | rejected | prefix hits |"
HEAD = [f"| load | router | {_MEASURED}", "|---|---|---|---|---|---|---|---|---|"]
INGRESS_HEAD = [f"| ingresses | oldest report (s) | {_MEASURED}", "|---|---|---|---|---|---|---|---|---|"]
PAGE = """# Where a request goes

<!-- conclusion: begin -->
<!-- conclusion: end -->

Made by `python benchmarks/evidence/routing.py --traces FOLDER --profile FILE`: replicas of policy `fluid` with vLLM's
real scheduler and prefix cache in virtual time, each with its own controller from a cold start. The central 60 % of the
requests are measured; n is the number of seeds, values are means with the smallest and the largest; a dash was not run.
Goodput in requests/s within a TTFT of 3 s and the TPOT target. Sessions and Mooncake are on the 8B model of
`--profile`, the rest on `a100-llama2-7b`. Our router, `fluid`, sees reports that are up to a second old; the others see
the present state of every replica, which favours them. Ours knows the exact length of a prompt here; when serving it
knows the characters, which favours ours. The replicas admit and reject alike under every router.

{sections}
"""


if __name__ == "__main__":
    main()
