"""One simulation from its configuration to its summary: K virtual replicas, a router, a stream of requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from itertools import islice
from pathlib import Path
from typing import Any

from scheduler.estimation.iteration_time_error import IterationTimeError
from scheduler.model.profiles import load_profile
from scheduler.model.steps import ONE_TOKEN_A_STEP
from scheduler.model.workload import Lengths, WorkloadMix
from scheduler.thresholds import EngineLimits, Thresholds, parse_thresholds, thresholds_as_dict
from scheduler.tuning.fluid_plan import FluidPlan, solve_fluid_params
from scheduler.tuning.replicas_needed import replicas_needed
from scheduler.tuning.solve import mix_by_length, tune_by_cap, tune_counts, tune_fluid
from simulator.audit import audit_rejections
from simulator.config import SimulationConfig, SimulationError, simulation_config
from simulator.engine.fleet import Fleet, limits_of
from simulator.engine.replica_state import Totals
from simulator.output.metrics import good_requests, summarise
from simulator.output.run_files import RunWriter, versions
from simulator.scenario.autoscalers import ORACLE, Oracle, parse_autoscaler
from simulator.scenario.baselines import BASELINES
from simulator.workload.requests import Workload, open_workload

_SAMPLED_REQUESTS = 2000
_PROGRESS_EVERY = 50

Progress = Callable[[int, int | None], None]


def simulate(
    config: SimulationConfig, *, folder: Path | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Run `config` and return its summary, JSON-ready; with `folder`, leave the run there (see
    `simulator.output.run_files`).

    `progress` gets the number of requests that have arrived, and their total (None: unknown). The same
    configuration gives the same summary but for `wall_s`.

    Raises:
        SimulationError: the thresholds do not fit, or the engine rejects its settings.
    """
    begun_s = time.perf_counter()
    try:
        workload = open_workload(_with_longest(config))
        workload.mix()  # a trace that cannot be replayed is found out now and not in the end
    except (ValueError, OSError) as error:
        raise SimulationError(str(error)) from error
    thresholds = _thresholds(config, workload) if BASELINES[config.policy].policy else None
    header = {"config": _as_json(config, workload, thresholds), "versions": versions()}
    with _writer(folder, header) as writer:
        fleet = _run(config, workload, thresholds, writer, progress)
        summary = _summary(config, workload, fleet, writer)
        if config.audit:
            summary |= audit_rejections(
                writer.written_requests(), config, lambda numbers: _goods_with(numbers, config, workload, thresholds)
            )
        summary["wall_s"] = time.perf_counter() - begun_s
        writer.close(summary)
    return summary


def _run(
    config: SimulationConfig, workload: Workload, thresholds: Thresholds | None, writer: RunWriter,
    progress: Progress | None = None, never_rejected: Collection[int] = (),
) -> Fleet:
    """Everything that happens, written down."""
    fleet = Fleet(config, thresholds, writer, never_rejected, _oracle(config, workload))
    total = config.workload.requests
    for number, request in enumerate(workload.requests()):
        fleet.arrive(number, request)
        if progress and number % _PROGRESS_EVERY == 0:
            progress(number, total)
    fleet.finish()
    return fleet


def _oracle(config: SimulationConfig, workload: Workload) -> Oracle | None:
    """The rule for the number of replicas that knows the future; None: another one is asked for."""
    if config.autoscale is None or parse_autoscaler(config.autoscale)[0] != ORACLE:
        return None
    mix, limits, profile = _mix(config, workload), limits_of(config), load_profile(config.profile)

    def plan_at(rate_rps: float) -> FluidPlan:
        return solve_fluid_params(
            mix.scaled(rate_rps / mix.rate_rps), profile.time_model.of_stage(limits.pipeline_depth), limits, config.slo,
            miss_probability=config.overflow_probability,
        )

    need = replicas_needed(plan_at, mix.rate_rps, miss_probability=config.overflow_probability)
    if need.most_rps <= 0:
        raise SimulationError(f"autoscale = {config.autoscale!r}: {need.reason}")
    arrivals_s = [request.arrival_s for request in workload.requests()]
    return Oracle(arrivals_s, need.most_rps, config.start_up_s, config.min_replicas)


def _goods_with(
    numbers: Collection[int], config: SimulationConfig, workload: Workload, thresholds: Thresholds | None
) -> frozenset[int]:
    """The requests of the window that meet their targets when those of these numbers are not rejected."""
    with RunWriter(None, {}) as writer:
        _run(config, workload, thresholds, writer, never_rejected=numbers)
        return good_requests(writer.written_requests(), config.window, config.slo)


def _writer(folder: Path | None, header: dict[str, Any]) -> RunWriter:
    try:
        return RunWriter(folder, header)
    except OSError as error:
        raise SimulationError(f"{folder} cannot be written: {error.strerror or error}") from error


def simulate_options(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`simulate` from flat options (see `simulation_config`): one point of a sweep."""
    return simulate(simulation_config(options), folder=folder)


def _thresholds(config: SimulationConfig, workload: Workload) -> Thresholds:
    """What the replicas start with: as configured where the controller runs, as a server does; else the thresholds that
    the shipped rule solves for this workload, then what the user set."""
    limits, baseline = limits_of(config), BASELINES[config.policy]
    chunk = config.thresholds.get("prefill_chunk_tokens")
    try:
        configured = parse_thresholds({"policy": baseline.policy or "fcfs", "prefill_chunk_tokens": chunk})
        if baseline.policy != "fcfs" and not config.controlled:
            configured = _tuned(config, configured, _mix(config, workload), limits)
        given = thresholds_as_dict(configured) | config.thresholds
        if config.cap:
            given = thresholds_as_dict(parse_thresholds(given | {"max_running": None}))
            given["max_running"] = config.cap
            given["types"] = [entry | {"n": entry["n"] and min(entry["n"], config.cap)} for entry in given["types"]]
        thresholds = parse_thresholds(given)
        thresholds.check_fits(limits)
    except ValueError as error:
        raise SimulationError(str(error)) from error
    return thresholds


def _tuned(config: SimulationConfig, configured: Thresholds, mix: WorkloadMix, limits: EngineLimits) -> Thresholds:
    if config.counts == "solved":
        time_model = load_profile(config.profile).time_model.of_stage(limits.pipeline_depth)
        steps = config.speculation.steps if config.speculation else ONE_TOKEN_A_STEP
        if configured.policy != "fluid":
            return tune_counts(
                configured, mix, time_model, limits, overflow_probability=config.overflow_probability, steps=steps
            )[0]
        return tune_fluid(
            configured, mix, time_model, limits, config.slo, miss_probability=config.overflow_probability,
            error=IterationTimeError.from_mape(config.law_error), steps=steps,
        )[0]
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
    if config.declares and BASELINES[config.policy].policy == "wait":
        return mix_by_length(sample, 0, None, rate_rps=rate_rps, longest=config.max_model_len)
    return mix_by_length([], len(sample), Lengths.from_pairs(sample), rate_rps=rate_rps, longest=config.max_model_len)


def _with_longest(config: SimulationConfig) -> Any:
    workload, limits = config.workload, limits_of(config)
    longest = limits.longest_request
    most = longest if workload.max_total_tokens is None else min(workload.max_total_tokens, longest)
    return workload.model_copy(update={"max_total_tokens": most})


def _summary(
    config: SimulationConfig, workload: Workload, fleet: Fleet, writer: RunWriter
) -> dict[str, Any]:
    slo = config.slo
    measured = summarise(
        writer.written_requests(), window=config.window, slo_ttft_s=slo.ttft_s, slo_tpot_s=slo.tpot_s,
        slo_latency_s=slo.latency_s,
    )
    totals = [replica.totals for replica in fleet.replicas]
    returns = fleet.returns.totals if fleet.returns else None
    decode_steps = _sum(totals, "decode_steps")
    return {
        "policy": config.policy, "workload": workload.name, "rate_rps": workload.mix().rate_rps, **measured,
        "retry_attempts": returns.attempts if returns else None,
        "returned_admitted_fraction": returns.admitted_fraction if returns else None,
        "wrong_rejection_fraction": None, "wrong_rejection_low": None, "wrong_rejection_high": None,
        "rejected_individually_servable_fraction": None,
        "controller": config.controlled,
        "replica_hours": fleet.replica_s / 3600,
        "stranded": fleet.stranded, "unfinished": fleet.unfinished,
        "preemptions": _sum(totals, "preemptions"), "recomputed_tokens": _sum(totals, "recomputed_tokens"),
        "kv_peak_fraction": max(total.kv_peak_fraction for total in totals),
        "tokens_per_step": _sum(totals, "gained_tokens") / decode_steps if decode_steps else None,
        "iterations": _sum(totals, "iterations"), "virtual_s": max(replica.now_s for replica in fleet.replicas),
        "notes": list(workload.notes()),
    }


def _sum(totals: list[Totals], name: str) -> int:
    return sum(getattr(total, name) for total in totals)


def _as_json(config: SimulationConfig, workload: Workload, thresholds: Thresholds | None) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    data["workload"]["name"] = workload.name
    data["kv_tokens"] = limits_of(config).kv_capacity_tokens
    data["token_budget"] = limits_of(config).max_num_batched_tokens
    data["thresholds_in_force"] = thresholds_as_dict(thresholds) if thresholds else None
    return data
