"""What the pages about targets share: workloads with their targets, the fluid bound, and the best static setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grids import PROFILE, Grid, mean_of

from scheduler.model.fluid import PrefixReuse
from scheduler.model.littles_law import requests_running
from scheduler.model.profiles import load_profile
from scheduler.model.workload import Lengths, WorkloadMix
from scheduler.thresholds import EngineLimits
from scheduler.tuning.fluid_plan import solve_fluid_params
from scheduler.tuning.slo import Slo
from simulator.config import simulation_config
from simulator.engine.fleet import limits_of
from simulator.output.metrics import window_of
from simulator.sweep import PointResult
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import open_workload

TTFT_S = 3.0
PERIOD_S = 5.0
CAP_SHARES = (0.7, 0.8, 0.9)
TOKEN_BUDGETS = (512, 1024, 2048)
GIVE_UP_S = 2.5
OTHER_GIVE_UPS_S = (1.0, 2.0)
NEXT_CAPS = (0.94, 1.06)

Runs = Mapping[str, list[PointResult]]


@dataclass(frozen=True)
class SloWorkload:
    """A workload (`lengths`, or `trace`: a file's name in the traces' folder) with its target per further token."""

    name: str
    source: dict[str, str]
    tpot_s: float

    def lengths_of(self, traces: Path | None) -> dict[str, Any]:
        """The workload as options of a simulation."""
        if "trace" in self.source:
            assert traces is not None
            return {"trace": str(traces / self.source["trace"])}
        return dict(self.source)

    def mix(self, traces: Path | None) -> WorkloadMix:
        """Lengths at one request a second."""
        config = WorkloadConfig(**self.lengths_of(traces), requests=1, rate_rps=1.0, max_total_tokens=4096)
        return open_workload(config).mix()

    def options(self, traces: Path | None) -> dict[str, Any]:
        """Options of every run."""
        targets = {"slo_ttft_s": TTFT_S, "slo_tpot_s": self.tpot_s}
        return self.lengths_of(traces) | {"profile": PROFILE} | targets


def bound_rps(mix: WorkloadMix, tpot_s: float) -> float:
    """The fluid model's capacity with every iteration within the target."""
    profile = load_profile(PROFILE)
    limits = EngineLimits(
        kv_capacity_tokens=profile.kv_capacity_tokens, block_tokens=16, max_num_seqs=512,
        max_num_batched_tokens=2048, max_model_len=4096,
    )
    return solve_fluid_params(mix, profile.time_model, limits, Slo(TTFT_S, tpot_s)).capacity_rps


def bound_of_run(result: PointResult) -> float:
    """The fluid bound for the lengths of the very requests that a run measures, with the prefix hits it had."""
    config = simulation_config(result.options)
    limits, hits = limits_of(config), (result.summary or {}).get("prefix_hit_fraction") or 0.0
    longest = limits.longest_request
    requests = list(open_workload(config.workload.model_copy(update={"max_total_tokens": longest})).requests())
    measured = window_of(len(requests), config.window)
    lengths = Lengths.from_pairs((r.prompt_tokens, r.output_tokens) for r in requests[measured.start : measured.stop])
    return solve_fluid_params(
        WorkloadMix.from_lengths(lengths, 1.0), load_profile(config.profile).time_model, limits,
        Slo(tpot_s=config.slo.tpot_s), reuse=PrefixReuse(1 - hits, 1 - hits),
    ).capacity_rps


def running_at_capacity(mix: WorkloadMix, bound: float, tpot_s: float) -> float:
    """Requests that run at that capacity, over l' + 1 iterations."""
    return requests_running(bound, mix.merged().lengths.mean_output_tokens + 1, tpot_s)


def static_grid(
    at: dict[str, Any], running: float, budgets: tuple[int, ...] = TOKEN_BUDGETS,
    shares: tuple[float, ...] = CAP_SHARES,
) -> Grid:
    """The oracle's grid for a run `at`: caps around the fluid's running requests, and token budgets."""
    caps: list[Any] = sorted({max(1, round(share * running)) for share in shares})
    return Grid(at | {"policy": "vllm", "give_up_s": GIVE_UP_S}, {"cap": caps, "token_budget": list(budgets)}, (1,))


def static_neighbours(at: dict[str, Any], name: str, grid: list[PointResult]) -> dict[str, Grid]:
    """Around the grid's best pair: other times after which clients leave, and caps between the grid's."""
    if not grid:
        return {}
    chosen = best_static(grid).options
    pair = at | {"policy": "vllm", "token_budget": chosen["token_budget"]}
    caps: list[Any] = sorted({max(1, round(chosen["cap"] * share)) for share in NEXT_CAPS} - {chosen["cap"]})
    return {
        f"{name}-wait": Grid(pair | {"cap": chosen["cap"]}, {"give_up_s": list(OTHER_GIVE_UPS_S)}, (1,)),
        f"{name}-cap": Grid(pair | {"give_up_s": GIVE_UP_S}, {"cap": caps}, (1,)),
    }


def statics(runs: Runs, name: str) -> list[PointResult]:
    """All static settings that were run."""
    return [result for part in ("", "-wait", "-cap") for result in runs.get(f"{name}{part}", [])]


def static_of(runs: Runs, name: str) -> PointResult | None:
    """The oracle's choice among them, None when none was run."""
    several = statics(runs, name)
    return best_static(several) if several else None


def best_static(results: list[PointResult]) -> PointResult:
    """The run of the highest goodput."""
    return max(results, key=lambda result: goodput(result.summary))


def static_seeds(name: str, tried: list[PointResult], seeds: tuple[int, ...]) -> dict[str, Grid]:
    """The oracle's choice on other seeds than the one it was chosen on."""
    if not tried:
        return {}
    chosen = dict(best_static(tried).options)
    own = chosen.pop("seed")
    others = tuple(seed for seed in seeds if seed != own)
    return {f"{name}-seeds": Grid(chosen, {}, others)} if others else {}


def static_summaries(runs: Runs, name: str) -> dict[int, dict[str, Any]]:
    """The oracle's choice, its summaries by seed."""
    best = static_of(runs, name)
    several = ([best] if best else []) + list(runs.get(f"{name}-seeds", []))
    return {result.options["seed"]: result.summary for result in several if result.summary}


def static_cell(runs: Runs, name: str) -> str:
    """The oracle's goodput, what an operator would have set, and of how many settings that is the best."""
    best = static_of(runs, name)
    if best is None:
        return "–"
    chosen, tried = best.options, len(statics(runs, name))
    setting = f"cap {chosen['cap']}, budget {chosen['token_budget']}, {chosen['give_up_s']:g} s; of {tried}"
    reached = [goodput(summary) for summary in static_summaries(runs, name).values()]
    return f"{sum(reached) / len(reached):.2f} ({setting})"


def goodput(summary: dict[str, Any] | None) -> float:
    """Requests/s within the targets; 0 where a run has none."""
    return float((summary or {}).get("goodput_rps") or 0.0)


def summaries(runs: Runs, group: str, seeds: tuple[int, ...] | None = None) -> list[dict[str, Any]]:
    """The summaries of a group's runs, of these seeds only if they are given."""
    return [
        result.summary for result in runs.get(group, [])
        if result.summary and (seeds is None or result.options["seed"] in seeds)
    ]


def ratio(
    runs: Runs, ours: str, theirs: str, key: str, combine: Callable[[list[dict[str, Any]], str], float] = mean_of
) -> float | None:
    """Our group's measure over theirs, on the seeds that both have; None when there is no such seed."""
    seeds = {r.options["seed"] for r in runs.get(ours, [])} & {r.options["seed"] for r in runs.get(theirs, [])}
    both = [summaries(runs, group, tuple(seeds)) for group in (ours, theirs)]
    if not seeds:
        return None
    below = combine(both[1], key)
    return combine(both[0], key) / below if below else None
