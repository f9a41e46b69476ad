"""One simulation from its configuration to its summary: K virtual replicas, a router, a stream of requests."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from replicas.routing_stats import RoutingStats, best_first
from scheduler.margin import Fluctuation
from scheduler.messages import Report
from scheduler.mix import Lengths, WorkloadMix
from scheduler.profiles import load_profile
from scheduler.settings import EXPECTED_OUTPUT_TOKENS
from scheduler.thresholds import EngineLimits, Thresholds, parse_thresholds, thresholds_as_dict
from scheduler.tuning import mix_by_length, tune, tune_by_cap
from simulator.config import SimulationConfig, SimulationError, simulation_config
from simulator.contenders import CONTENDERS
from simulator.controller import VirtualController
from simulator.measure import summarise, window_of
from simulator.replica import Totals, VirtualReplica
from simulator.results import RunWriter, versions
from simulator.slowdown import parse_slowdown
from simulator.workload import SimRequest, Workload, open_workload

ROUTING_STATS_PERIOD_S = 1.0
"""How often a replica tells the routers of its room, as in serving."""
_LOOK_EVERY_S = 1.0
_SAMPLED_REQUESTS = 2000
_PROGRESS_EVERY = 50

Progress = Callable[[int, int | None], None]


def simulate(
    config: SimulationConfig, *, folder: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Run `config` and return its summary, JSON-ready; with `folder`, leave the run there (see `simulator.results`).

    `progress` hears how many requests have arrived, and of how many (None: unknown). The same configuration gives the
    same summary but for `wall_s`.

    Raises:
        SimulationError: the thresholds do not fit, or the engine refuses its settings.
    """
    begun_s = time.perf_counter()
    try:
        workload = open_workload(_with_longest(config))
        workload.mix()  # a trace that cannot be replayed is found out now and not in the end
    except (ValueError, OSError) as error:
        raise SimulationError(str(error)) from error
    thresholds = _thresholds(config, workload) if CONTENDERS[config.policy].policy else None
    header = {"config": _as_json(config, workload, thresholds), "versions": versions()}
    with RunWriter(folder, header) as writer:
        fleet = _Fleet(config, thresholds, writer)
        total = config.workload.requests
        for number, request in enumerate(workload.requests()):
            fleet.arrive(number, request)
            if progress and number % _PROGRESS_EVERY == 0:
                progress(number, total)
        fleet.finish()
        summary = _summary(config, workload, fleet, writer)
        summary["wall_s"] = time.perf_counter() - begun_s
        writer.close(summary)
    return summary


def simulate_options(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`simulate` from flat options (see `simulation_config`): one point of a sweep."""
    return simulate(simulation_config(options), folder=folder)


class _Fleet:
    """The replicas of one run, and the router before them."""

    def __init__(self, config: SimulationConfig, thresholds: Thresholds | None, writer: RunWriter) -> None:
        contender, profile = CONTENDERS[config.policy], load_profile(config.profile)
        self._config, self._declares, self._arrived = config, config.declares, 0
        self.stranded, self.unfinished = 0, 0
        slowdown = parse_slowdown(config.slowdown) if config.slowdown else None
        self.replicas = [
            VirtualReplica(
                index, _scheduler(config, thresholds), profile.law, writer, give_up_s=config.give_up_s,
                door=contender.door, ttft_s=config.slo.ttft_s, slowdown=None if index else slowdown,
            )
            for index in range(config.replicas)
        ]
        self._rng = random.Random(config.workload.seed)
        self._stats: dict[int, RoutingStats] = {}
        self._stats_due_s = ROUTING_STATS_PERIOD_S
        self._controllers: list[VirtualController] = []
        self._control_due_s = self._latest_s = 0.0
        self._period_s = config.period_s or math.inf
        if config.period_s is not None and contender.policy:
            configured = Thresholds(policy=contender.policy)
            self._controllers = [
                VirtualController(replica, config, profile.law, configured, writer) for replica in self.replicas
            ]

    def arrive(self, number: int, request: SimRequest) -> None:
        """Let everything happen that comes before this arrival, then hand the request to a replica."""
        if len(self.replicas) > 1:
            while self._stats_due_s <= request.arrival_s:
                self._advance(self._stats_due_s)
                self._report()
                self._stats_due_s += ROUTING_STATS_PERIOD_S
        while self._controllers and self._control_due_s <= request.arrival_s:
            self._advance(self._control_due_s)
            for controller in self._controllers:
                controller.one_pass()
            self._control_due_s += self._period_s
        self._advance(request.arrival_s)
        self._arrived, self._latest_s = number + 1, request.arrival_s
        declared = {EXPECTED_OUTPUT_TOKENS: request.output_tokens} if self._declares else None
        self._route().submit(number, request, declared=declared)

    def finish(self) -> None:
        """Run everything to its end, or until the measured requests are decided if that is asked for."""
        if self._config.until_decided:
            self._decide()
            self.unfinished = sum(replica.leave_unfinished() for replica in self.replicas)
        else:
            self.stranded = sum(len(replica.finish()) for replica in self.replicas)

    def _decide(self) -> None:
        measured, targets = window_of(self._arrived, self._config.window), self._config.slo.promised
        now_s = self._latest_s
        while any(replica.undecided(measured, now_s, targets) for replica in self.replicas):
            now_s += _LOOK_EVERY_S
            self._advance(now_s)

    def _advance(self, until_s: float) -> None:
        for replica in self.replicas:
            replica.advance(until_s)

    def _route(self) -> VirtualReplica:
        if len(self.replicas) == 1:
            return self.replicas[0]
        ranked = best_first(
            self.replicas, lambda replica: self._stats.get(replica.index), lambda replica: replica.ongoing,
            self._rng.shuffle,
        )
        return ranked[0]

    def _report(self) -> None:
        self._stats = {
            replica.index: RoutingStats.from_telemetry(replica.headrace.telemetry(Report(cursor=None)))
            for replica in self.replicas if replica.headrace
        }


def _scheduler(config: SimulationConfig, thresholds: Thresholds | None) -> Any:
    from simulator.in_process import make_scheduler

    contender, limits = CONTENDERS[config.policy], _limits(config)
    settings = {"thresholds": thresholds_as_dict(thresholds), "allow_strict": True} if thresholds else {}
    try:
        return make_scheduler(
            contender.scheduler_class(), blocks=limits.kv_capacity_tokens // limits.block_tokens,
            block_tokens=limits.block_tokens, max_model_len=limits.max_model_len,
            additional_config={"headrace": settings}, max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens, async_scheduling=config.async_scheduling,
            enable_prefix_caching=config.prefix_caching, **contender.engine_args,
        )
    except ValueError as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise SimulationError(f"the engine refuses its settings: {said.removeprefix('Value error, ')}") from error


def _limits(config: SimulationConfig) -> EngineLimits:
    contender, profile = CONTENDERS[config.policy], load_profile(config.profile)
    blocks = (config.kv_tokens or profile.kv_capacity_tokens) // config.block_tokens
    plain_cap = config.cap if config.cap and not contender.policy else config.max_num_seqs
    return EngineLimits(
        kv_capacity_tokens=blocks * config.block_tokens, block_tokens=config.block_tokens, max_num_seqs=plain_cap,
        max_num_batched_tokens=config.token_budget or contender.token_budget, max_model_len=config.max_model_len,
    )


def _thresholds(config: SimulationConfig, workload: Workload) -> Thresholds:
    """The thresholds that the shipped rule solves for this workload, then what the user set."""
    limits, contender = _limits(config), CONTENDERS[config.policy]
    configured = Thresholds(policy=contender.policy or "fcfs")
    if contender.policy != "fcfs":
        configured = _tuned(config, configured, _mix(config, workload), limits)
    given = thresholds_as_dict(configured) | config.thresholds
    try:
        if config.cap:
            given = thresholds_as_dict(parse_thresholds(given | {"max_in_service": None}))
            given["max_in_service"] = config.cap
            given["types"] = [entry | {"n": min(entry["n"], config.cap)} for entry in given["types"]]
            given["segments"] = [entry | {"n": min(entry["n"], config.cap)} for entry in given["segments"]]
        thresholds = parse_thresholds(given)
        thresholds.check_fits(limits)
    except ValueError as error:
        raise SimulationError(str(error)) from error
    return thresholds


def _tuned(config: SimulationConfig, configured: Thresholds, mix: WorkloadMix, limits: EngineLimits) -> Thresholds:
    if config.counts == "solved":
        law = load_profile(config.profile).law
        return tune(
            configured, mix, law, limits, overflow_probability=config.overflow_probability, targets=config.slo.promised,
            fluctuation=Fluctuation.from_mape(config.law_error),
        ).thresholds
    if config.cap is None:
        raise SimulationError("counts = 'by_cap': give a cap too, from which they follow")
    return tune_by_cap(configured, mix, config.cap)


def _mix(config: SimulationConfig, workload: Workload) -> WorkloadMix:
    """The workload as one replica sees it: its first requests, by type if their lengths are declared."""
    sample = [(r.prompt_tokens, r.output_tokens) for r in islice(workload.requests(), _SAMPLED_REQUESTS)]
    if not sample:
        raise SimulationError("the workload holds no request that fits the engine")
    rate_rps = workload.mix().rate_rps / config.replicas
    # As in serving, no other policy looks at what clients declare.
    if config.declares and CONTENDERS[config.policy].policy == "wait":
        return mix_by_length(sample, 0, None, rate_rps=rate_rps, longest=config.max_model_len)
    return mix_by_length([], len(sample), Lengths.from_pairs(sample), rate_rps=rate_rps, longest=config.max_model_len)


def _with_longest(config: SimulationConfig) -> Any:
    workload, limits = config.workload, _limits(config)
    longest = min(config.max_model_len, limits.kv_capacity_tokens - limits.block_tokens)  # vLLM keeps one block empty
    most = longest if workload.max_total_tokens is None else min(workload.max_total_tokens, longest)
    return workload.model_copy(update={"max_total_tokens": most})


def _summary(
    config: SimulationConfig, workload: Workload, fleet: _Fleet, writer: RunWriter
) -> dict[str, Any]:
    slo = config.slo
    measured = summarise(
        writer.written_requests(), window=config.window, slo_ttft_s=slo.ttft_s, slo_tpot_s=slo.tpot_s,
        slo_latency_s=slo.latency_s,
    )
    totals = [replica.totals for replica in fleet.replicas]
    return {
        "policy": config.policy, "workload": workload.name, "rate_rps": workload.mix().rate_rps, **measured,
        "stranded": fleet.stranded, "unfinished": fleet.unfinished,
        "preemptions": _sum(totals, "preemptions"), "recomputed_tokens": _sum(totals, "recomputed_tokens"),
        "kv_peak_fraction": max(total.kv_peak_fraction for total in totals),
        "iterations": _sum(totals, "iterations"), "virtual_s": max(replica.now_s for replica in fleet.replicas),
        "notes": list(workload.notes()),
    }


def _sum(totals: list[Totals], name: str) -> int:
    return sum(getattr(total, name) for total in totals)


def _as_json(config: SimulationConfig, workload: Workload, thresholds: Thresholds | None) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    data["workload"]["name"] = workload.name
    data["kv_tokens"] = _limits(config).kv_capacity_tokens
    data["token_budget"] = _limits(config).max_num_batched_tokens
    data["thresholds_in_force"] = thresholds_as_dict(thresholds) if thresholds else None
    return data
