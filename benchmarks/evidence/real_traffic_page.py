"""The page of `real_traffic.py` from its runs: conclusions, each computed, and the grid behind them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from scheduler.fluid import PrefixReuse
from scheduler.mix import Lengths, WorkloadMix
from scheduler.profiles import load_profile
from scheduler.targets import Targets, solve_pace
from simulator.config import simulation_config
from simulator.fleet import limits_of
from simulator.measure import window_of
from simulator.workload import open_workload

Point = tuple[str, str, float, int]
Results = dict[Point, dict[str, Any]]
COMMAND = "python benchmarks/evidence/real_traffic.py --traces FOLDER --profile FILE"


def write_page(path: Path, found: dict[str, dict[str, Any]], results: Results) -> None:
    """Write the page; a dash stands where no run is."""
    lines = [
        "# Traffic as real engines see it", "",
        f"Made by `{COMMAND}`:",
        "vLLM's real scheduler and prefix cache in virtual time, caching on as vLLM has it by default, the controller",
        "live from a cold start, the central 60 % of the requests measured. n is the number of seeds. Goodput in",
        "requests/s within both targets. Bound: the fluid capacity for the very requests measured, counting only the",
        "prompt tokens that were computed, or the offered rate if that is less. Rejection times are from arrival until",
        "the client hears, which takes one and a half iterations at least.", "", "## What it says", "",
    ]
    lines += [f"- {sentence}" for name in found for sentence in _sentences(name, found[name], results)]
    for name, case in found.items():
        lines += ["", f"## {name}", "", f"Load 1 stands for {case['rate_rps']:g} requests/s.", ""]
        lines += [*case["remark"], ""] if "remark" in case else []
        lines += _grid(name, case, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _loads(name: str, policy: str, results: Results) -> list[float]:
    return sorted({load for n, p, load, _ in results if (n, p) == (name, policy)})


def _runs(name: str, policy: str, load: float, results: Results) -> list[tuple[int, dict[str, Any]]]:
    return [(seed, run) for (n, p, at, seed), run in results.items() if (n, p, at) == (name, policy, load)]


def _mean(runs: Iterable[tuple[int, dict[str, Any]]], key: str) -> float | None:
    values = [run[key] for _, run in runs if run.get(key) is not None]
    return mean(values) if values else None


def _bound_rps(case: dict[str, Any], load: float, runs: Sequence[tuple[int, dict[str, Any]]]) -> float:
    """Capacity for the measured requests with the prefix hits of that run, at most what is offered; mean over seeds."""
    bounds = []
    for seed, run in runs:
        rate_rps = load * case["rate_rps"]
        config = simulation_config(case["options"] | {"policy": "fluid", "rate_rps": rate_rps, "seed": seed})
        limits, hits = limits_of(config), run.get("prefix_hit_fraction") or 0.0
        longest = min(config.max_model_len, limits.kv_capacity_tokens - limits.block_tokens)
        workload = open_workload(config.workload.model_copy(update={"max_total_tokens": longest}))
        pairs = [(request.prompt_tokens, request.output_tokens) for request in workload.requests()]
        measured = window_of(len(pairs), config.window)
        mix = WorkloadMix.from_lengths(Lengths.from_pairs(pairs[measured.start : measured.stop]), rate_rps)
        solved = solve_pace(
            mix, load_profile(config.profile).law, limits, Targets(tpot_s=config.slo.tpot_s),
            reuse=PrefixReuse(1 - hits, 1 - hits),
        )
        offered_rps = run["window_requests"] / (run["window_to_s"] - run["window_from_s"])
        bounds.append(min(solved.capacity_rps, offered_rps))
    return mean(bounds)


def _sentences(name: str, case: dict[str, Any], results: Results) -> list[str]:
    """The conclusions on one workload."""
    loads = _loads(name, "fluid", results)
    if not loads:
        return [f"{name}: not run."]
    runs = {load: _runs(name, "fluid", load, results) for load in loads}
    goodput = {load: _mean(runs[load], "goodput_rps") or 0.0 for load in loads}
    shares = {load: goodput[load] / _bound_rps(case, load, runs[load]) for load in loads}
    beyond = [load for load in loads if load > 1]
    said = [
        f"{name}: `fluid` reaches {min(shares.values()):.2f} to {max(shares.values()):.2f} of the bound over loads "
        f"{min(loads):g} to {max(loads):g}; of the served at most {_worst(runs, 'served_ttft_miss_fraction'):.1%} miss "
        f"TTFT and {_worst(runs, 'served_tpot_miss_fraction'):.1%} TPOT."
    ]
    if beyond:
        peak = max(goodput.values())
        said[0] += f" From {min(beyond):g} on it keeps {min(goodput[load] for load in beyond) / peak:.2f} of its peak."
    rivals = sorted({p for n, p, _, _ in results if n == name and p != "fluid"})
    for load in beyond:
        best = max(
            ((_mean(_runs(name, rival, load, results), "goodput_rps") or 0.0, rival) for rival in rivals
             if _runs(name, rival, load, results)), default=None,
        )
        if best:
            said[0] += f" At {load:g} the best rule that others ship is {best[1]} with {best[0]:.2f}, "
            said[0] += f"`fluid` has {goodput[load]:.2f}."
    light = [load for load in loads if load < 1 and _runs(name, "vllm", load, results)]
    for load in light:
        ours = [run for run in runs[load] if run[0] == 1]
        theirs = _mean(_runs(name, "vllm", load, results), "ttft_p99_s")
        if ours and theirs:
            ratio = (_mean(ours, "ttft_p99_s") or 0.0) / theirs
            said[0] += f" p99 TTFT at load {load:g} is {ratio:.2f} of plain vLLM's (same seed)."
    return said


def _worst(runs: dict[float, list[tuple[int, dict[str, Any]]]], key: str) -> float:
    return max((_mean(some, key) or 0.0) for some in runs.values())


def _grid(name: str, case: dict[str, Any], results: Results) -> list[str]:
    lines = [
        "| policy | load | n | goodput | bound | TTFT p50, p99 (s) | TPOT p99 (ms) | miss TTFT | miss TPOT | rejected "
        "| rejection p50, p99 (s) | prefix hits | preemptions |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    policies = ["fluid", *sorted({p for n, p, _, _ in results if n == name and p != "fluid"})]
    for policy in policies:
        for load in _loads(name, policy, results):
            runs = _runs(name, policy, load, results)
            get = {key: _mean(runs, key) for key in (
                "goodput_rps", "ttft_p50_s", "ttft_p99_s", "tpot_p99_s", "served_ttft_miss_fraction",
                "served_tpot_miss_fraction", "rejected_in_window", "rejection_p50_s", "rejection_p99_s",
                "prefix_hit_fraction", "preemptions",
            )}
            bound = f"{_bound_rps(case, load, runs):.2f}" if policy == "fluid" else ""
            tpot_ms = None if get["tpot_p99_s"] is None else 1000 * get["tpot_p99_s"]
            lines.append(
                f"| `{policy}` | {load:g} | {len(runs)} | {_text(get['goodput_rps'])} | {bound} "
                f"| {_text(get['ttft_p50_s'])}, {_text(get['ttft_p99_s'])} | {_text(tpot_ms, 1)} "
                f"| {_share(get['served_ttft_miss_fraction'])} | {_share(get['served_tpot_miss_fraction'])} "
                f"| {_text(get['rejected_in_window'], 0)} | {_text(get['rejection_p50_s'])}, "
                f"{_text(get['rejection_p99_s'])} | {_text(get['prefix_hit_fraction'])} "
                f"| {_text(get['preemptions'], 0)} |"
            )
    return lines


def _text(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
