"""Traffic as real engines see it: cached prefixes, conversations, long answers; caching on, the controller live.

    python benchmarks/evidence/real_traffic.py --traces FOLDER [--profile FILE] [--only REGEX] [--workers 2]

Runs what is not in `--runs` yet, and writes docs/evidence/real-traffic.md from what is there; every sentence with a
number on that page is computed here. FOLDER holds azure_conv_2023.csv and mooncake_conversation.jsonl; workloads whose
file is absent are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.evidence.real_traffic_page import write_page

LOADS = (0.3, 0.7, 1.0, 1.2, 2.0, 3.0)
RIVALS = ("vllm", "vllm-queue", "llm-d", "dynamo")
RIVAL_LOADS = (0.7, 1.2, 2.0)
LARGE = {"max_model_len": 32768}


def cases(traces: Path, profile: str) -> dict[str, dict[str, Any]]:
    """Workloads by name: options of a simulation, the rate of load 1 (requests/s), seeds and loads of `fluid`."""
    eight = {"profile": profile} | LARGE
    found: dict[str, dict[str, Any]] = {
        "Azure conversation, 80 ms": {
            "options": {"trace": str(traces / "azure_conv_2023.csv"), "requests": 2000, "slo_ttft_s": 3,
                        "slo_tpot_s": 0.08},
            "rate_rps": 5.2,
        },
        "Mooncake conversation, 50 ms": {
            "options": {"trace": str(traces / "mooncake_conversation.jsonl"), "requests": 2000, "arrivals": "replay",
                        "max_prompt_tokens": 16000, "slo_ttft_s": 3, "slo_tpot_s": 0.05} | eight,
            "rate_rps": 1.5, "remark": (
                "Many requests of the trace share a time of arrival. Stretching the trace keeps these bunches,",
                "and at any mean rate some hold more prompt tokens than the TTFT target has time for. The",
                "bound knows of mean rates only, so that below load 1 no rule can reach it.",
            ),
        },
        "sessions, 50 ms": {
            "options": {"lengths": "sessions:turns=5,system=800,first=200~1,turn=120~1,output=250~1,think=20",
                        "requests": 4000, "slo_ttft_s": 3, "slo_tpot_s": 0.05} | eight,
            "rate_rps": 11.0, "remark": (
                "A rejected turn leaves its history uncached, so beyond capacity prefix hits fall, and the bound",
                "with them.",
            ),
        },
        "lmsys lengths, 50 ms": {
            "options": {"lengths": "lmsys", "requests": 4000, "slo_ttft_s": 3, "slo_tpot_s": 0.05,
                        "max_num_seqs": 256},
            "rate_rps": 37.0,
        },
        "long answers, 50 ms": {
            "options": {"lengths": "p800~0.8d3000~1.2", "requests": 2500, "slo_ttft_s": 5, "slo_tpot_s": 0.05} | eight,
            "rate_rps": 0.6, "seeds": (1,), "loads": (0.7, 1.2, 2.0), "rivals": ("llm-d",), "rival_loads": (1.2,),
        },
    }
    present = {name: case for name, case in found.items() if Path(case["options"].get("trace", ".")).exists()}
    return present if Path(profile).is_file() else {n: c for n, c in present.items() if "profile" not in c["options"]}


def points(found: dict[str, dict[str, Any]], seeds: int) -> list[tuple[str, str, float, int]]:
    """(workload, policy, load, seed) of every run, what ends soon first."""
    wanted = []
    for name, case in found.items():
        for load in case.get("loads", LOADS):
            wanted += [(name, "fluid", load, seed) for seed in case.get("seeds", range(1, seeds + 1))]
        for rival in case.get("rivals", RIVALS):
            wanted += [(name, rival, load, 1) for load in case.get("rival_loads", RIVAL_LOADS)]
    return sorted(wanted, key=lambda point: (point[3], point[0].startswith("long")))


def run_point(task: tuple[dict[str, Any], Path]) -> str:
    """One simulation, its summary written as JSON."""
    from simulator.config import simulation_config
    from simulator.run import simulate

    options, path = task
    summary = simulate(simulation_config(options))
    path.write_text(json.dumps(summary, allow_nan=False))
    return path.stem


def file_of(runs: Path, point: tuple[str, str, float, int]) -> Path:
    """Where a run's summary lies."""
    name, policy, load, seed = point
    return runs / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}_{policy}_{load:g}_{seed}.json"


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("traces"))
    parser.add_argument("--profile", default="profiles/a100-llama3-8b-estimate.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/real-traffic"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--only", default="", help="regular expression: run only files of that name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="0: only write the page")
    asked = parser.parse_args()
    asked.runs.mkdir(parents=True, exist_ok=True)
    found = cases(asked.traces, asked.profile)
    wanted = points(found, asked.seeds)
    tasks = []
    for point in wanted:
        name, policy, load, seed = point
        path = file_of(asked.runs, point)
        if not path.exists() and re.search(asked.only, path.stem):
            options = found[name]["options"] | {
                "policy": policy, "rate_rps": load * found[name]["rate_rps"], "seed": seed,
                "until_decided": policy != "fluid",
            }
            tasks.append((options, path))
    if asked.workers and tasks:
        context = multiprocessing.get_context("spawn")
        with context.Pool(asked.workers, maxtasksperchild=4) as pool:
            for number, done in enumerate(pool.imap_unordered(run_point, tasks), 1):
                print(f"{number} of {len(tasks)}: {done}", flush=True)
    results = {
        point: json.loads(file_of(asked.runs, point).read_text())
        for point in wanted if file_of(asked.runs, point).exists()
    }
    write_page(asked.out / "real-traffic.md", found, results)


if __name__ == "__main__":
    main()
