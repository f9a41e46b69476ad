"""Traffic as real engines see it, docs/evidence/real-traffic.md: cached prefixes, conversations, long answers.

    python benchmarks/evidence/real_traffic.py --traces FOLDER [--profile FILE] [--out docs/evidence]
                                               [--runs runs/real-traffic] [--workers N] [--only REGEX] [--seeds N]
                                               [--again REGEX] [--quick]

Prefix caching on, the controller live from a cold start. Runs that are in --runs or, as summaries, in
real-traffic.json beside the page are kept; --workers 0 only writes the page; every sentence with a number on it is
computed. FOLDER holds azure_conv_2023.csv and mooncake_conversation.jsonl; workloads without a file are left out.
--quick is for tests of this script.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from grids import PROFILE, Choice, Grid, arguments, run_grids, slug
from real_traffic_page import LATENCY_LOADS, page

LOADS = (0.3, 0.7, 1.0, 1.2, 2.0, 3.0)
RIVALS = ("vllm", "vllm-queue", "llm-d", "dynamo")
RIVAL_LOADS = (0.7, 1.2, 2.0, 3.0)
STATIC_LOADS = (1.2, 2.0)
SEEDS = (1, 2, 3)
LATENCY_TARGETS_S = (5, 10, 20, 40, 80)
AUDIT_REPLAYS = 4


@dataclass(frozen=True)
class Case:
    """A workload: options of every run, the rate that load 1 stands for (requests/s), requests at up to load 1.

    caps: what the best static setting is searched among, besides token budgets. uncached: also run without prefix
    caching. latency: seconds of arrivals of the runs with latency targets only, at loads 0.5, 0.9 and 1.5; None: none.
    """

    name: str
    options: dict[str, Any]
    rate_rps: float
    requests: int
    caps: tuple[int, ...]
    loads: tuple[float, ...] = LOADS
    seeds: tuple[int, ...] = SEEDS
    rivals: tuple[str, ...] = RIVALS
    rival_loads: tuple[float, ...] = RIVAL_LOADS
    static_loads: tuple[float, ...] = STATIC_LOADS
    uncached: bool = False
    latency_s: tuple[float, ...] = ()
    remark: tuple[str, ...] = field(default=())

    def at(self, load: float, quick: bool = False) -> dict[str, Any]:
        """Options of a run at this load; beyond capacity as many are served as at it."""
        requests = round(self.requests * max(1.0, load) * (0.05 if quick else 1.0))
        return self.options | {"rate_rps": round(load * self.rate_rps, 3), "requests": requests}

    def group(self, load: float, what: str) -> str:
        """The name of the runs of one policy at one load."""
        return f"{slug(self.name)}-{load:g}-{what}"


def cases(traces: Path | None, profile: str) -> list[Case]:
    """The workloads with an existing file."""
    eight = {"profile": profile, "max_model_len": 32768}
    folder = traces or Path("absent")
    azure = {"trace": str(folder / "azure_conv_2023.csv"), "slo_ttft_s": 3, "profile": PROFILE}
    found = [
        Case("Azure conversation, 80 ms", azure | {"slo_tpot_s": 0.08}, 5.2, 2000, (60, 75, 90),
             latency_s=LATENCY_TARGETS_S),
        Case("Azure conversation, 50 ms", azure | {"slo_tpot_s": 0.05}, 4.9, 2000, (36, 44, 52),
             rival_loads=(0.7, 1.2)),
        Case("Azure conversation, 25 ms", azure | {"slo_tpot_s": 0.025}, 4.2, 2000, (14, 18, 22), seeds=(1,),
             rival_loads=(0.7, 1.2)),
        Case(
            "lmsys lengths, 50 ms, 256 slots",
            {"lengths": "lmsys", "slo_ttft_s": 3, "slo_tpot_s": 0.05, "max_num_seqs": 256, "profile": PROFILE},
            37.0, 4000, (200, 256),
            latency_s=LATENCY_TARGETS_S,
        ),
        Case(
            "Mooncake conversation, 50 ms",
            {"trace": str(folder / "mooncake_conversation.jsonl"), "arrivals": "replay", "max_prompt_tokens": 16000,
             "slo_ttft_s": 3, "slo_tpot_s": 0.05} | eight,
            1.5, 1500, (20, 30, 40), uncached=True, remark=(
                "Many requests of the trace share a time of arrival. Stretching the trace keeps these bunches,",
                "and at any mean rate some hold more prompt tokens than the TTFT target has time for. The",
                "bound knows of mean rates only, so that below load 1 no rule can reach it.",
            ),
        ),
        Case(
            "sessions, 50 ms",
            {"lengths": "sessions:turns=5,system=800,first=200~1,turn=120~1,output=250~1,think=20",
             "slo_ttft_s": 3, "slo_tpot_s": 0.05} | eight,
            11.0, 3000, (80, 110, 140), uncached=True, remark=(
                "A rejected turn leaves its history uncached, so beyond capacity prefix hits fall, and the bound",
                "with them.",
            ),
        ),
        Case(
            "long answers, 50 ms",
            {"lengths": "p800~0.8d3000~1.2", "slo_ttft_s": 5, "slo_tpot_s": 0.05} | eight, 0.6, 2000, (60, 75, 90),
            loads=(0.7, 1.2, 2.0, 3.0), seeds=(1,), rivals=("vllm", "llm-d"), rival_loads=(0.7, 1.2),
            static_loads=(),
        ),
    ]
    return [
        case for case in found
        if Path(case.options.get("trace", ".")).exists()
        and (case.options["profile"] == PROFILE or Path(case.options["profile"]).is_file())
    ]


def grids_of(case: Case, quick: bool) -> dict[str, Grid]:
    """Every run of a workload, what answers most first."""
    grids = {
        case.group(load, "fluid"): Grid(case.at(load, quick) | {"policy": "fluid"}, {}, case.seeds)
        for load in case.loads
    }
    for load in case.rival_loads:
        for rival in case.rivals:
            late = {"policy": rival, "until_decided": True}
            grids[case.group(load, rival)] = Grid(case.at(load, quick) | late, {}, SEEDS[:1])
    if case.uncached:
        for load in case.loads:
            off = {"policy": "fluid", "prefix_caching": False}
            grids[case.group(load, "uncached")] = Grid(case.at(load, quick) | off, {}, SEEDS[:1])
    for load in case.static_loads:
        setting = {"policy": "vllm", "give_up_s": 2.5, "until_decided": True}
        axes: dict[str, list[Any]] = {"cap": list(case.caps), "token_budget": [512, 1024]}
        grids[case.group(load, "static")] = Grid(case.at(load, quick) | setting, axes, SEEDS[:1])
    for load in (load for load in case.loads if load > 1):
        again = {"policy": "fluid", "retries": "openai"}
        grids[case.group(load, "retries")] = Grid(case.at(load, quick) | again, {}, SEEDS[:1])
        audited = {"policy": "fluid", "audit": AUDIT_REPLAYS}
        grids[case.group(load, "audit")] = Grid(case.at(load, quick) | audited, {}, SEEDS[:1])
    return grids | latency_grids(case, quick)


def latency_grids(case: Case, quick: bool) -> dict[str, Grid]:
    """A latency target alone, beside plain vLLM and, beyond capacity, the best static cap."""
    grids = {}
    for latency_s in case.latency_s:
        for load in LATENCY_LOADS:
            at = case.at(load, quick) | {"slo_ttft_s": None, "slo_tpot_s": None, "slo_latency_s": latency_s}
            name = f"latency-{latency_s:g}"
            grids[case.group(load, f"{name}-fluid")] = Grid(at | {"policy": "fluid"}, {}, SEEDS[:1])
            plain = at | {"policy": "vllm", "until_decided": True}
            grids[case.group(load, f"{name}-vllm")] = Grid(plain, {}, SEEDS[:1])
            if load > 1:
                caps: dict[str, list[Any]] = {"cap": [max(1, round(cap * share)) for cap in case.caps[:1]
                                                      for share in (0.15, 0.3, 0.6, 1.0)]}
                leaves = plain | {"give_up_s": latency_s / 4}
                grids[case.group(load, f"{name}-static")] = Grid(leaves, caps, SEEDS[:1])
    return grids


def main() -> None:
    """Run what is missing, then write the page."""
    parser = arguments(__doc__, "runs/real-traffic")
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--profile", default="profiles/a100-llama3-8b-estimate.json")
    Choice.options(parser)
    args = parser.parse_args()
    found = cases(args.traces, args.profile)
    grids = {name: grid for case in found for name, grid in grids_of(case, args.quick).items()}
    args.out.mkdir(parents=True, exist_ok=True)
    runs = run_grids(args.runs, grids, Choice.of(args), args.out / "real-traffic.json")
    (args.out / "real-traffic.md").write_text(page(found, runs))


if __name__ == "__main__":
    main()
