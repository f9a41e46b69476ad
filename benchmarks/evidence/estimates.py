"""Estimated profiles beside known ones, and plans beside the simulator: docs/evidence/estimates.md.

    python benchmarks/evidence/estimates.py [--out docs/evidence] [--profiles FOLDER] [--traces FOLDER]

--profiles is a folder with further profiles of Llama-3-8B on an A100 80GB; --traces is one with
azure_conv_2023.csv; what needs them is left out without. The simulations take a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from a100_law import POINTS, Point
from conclusions import estimates
from page_tables import with_conclusion

from scheduler.estimation.iteration_time_error import PUBLISHED_MAPE, IterationTimeError
from scheduler.model.accelerators import accelerator, accelerators
from scheduler.model.estimate import FACTORS, DoesNotFit, Setup, estimate
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import Profile, load_profile
from scheduler.model.workload import WorkloadMix
from scheduler.tuning.fluid_plan import FluidPlan, solve_fluid_params
from scheduler.tuning.replicas_needed import replicas_needed
from scheduler.tuning.slo import Slo
from simulator.config import SimulationConfig
from simulator.engine.fleet import limits_of
from simulator.run import simulate
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import open_workload

LLAMA2: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11_008, "vocab_size": 32_000, "torch_dtype": "float16",
}
LLAMA3 = LLAMA2 | {"num_key_value_heads": 8, "intermediate_size": 14_336, "vocab_size": 128_256}
LLAMA3_70B = LLAMA3 | {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28_672,
}
MEAN_WEIGHT = 29159.356583593526
"""E[w] of the published table of M*, from its authors' repository."""
PUBLISHED_MEMORY = {50: 34_377, 60: 55_758, 70: 100_327}
PUBLISHED_CROSSING_RPS, CAPACITY = 74.1, 137_000
TERMS = (
    ("floor, ms", "floor_s", 1e3), ("d0, ms", "d0_s", 1e3), ("d2, µs", "d2_s_per_prefill_token", 1e6),
    ("d3, µs", "d3_s_per_decode_token", 1e6), ("d1, µs per KV token", "d1_s_per_kv_token", 1e6),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A workload and targets whose plan is simulated at and above its rate."""

    lengths: str
    ttft_s: float
    tpot_s: float


CASES = (
    Case("p900d230", 3, 0.08), Case("p512d20", 1, 0.05), Case("p100d400", 1, 0.05), Case("p900d230", 0.3, 0.02),
)
OF_PLAN = (0.8, 1.0, 1.1)
REQUESTS = 1500
TRACE_RPS, TRACE_REQUESTS = 20.0, 9000
TRACE_TARGETS = Slo(3, 0.08)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--profiles", type=Path)
    parser.add_argument("--traces", type=Path)
    args = parser.parse_args()
    text = page(args.profiles, "\n".join(simulated()), "\n".join(several(args.traces) if args.traces else ()))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "estimates.md").write_text(with_conclusion(text, estimates), encoding="utf-8")


def page(profiles: Path | None, plans: str, replicas: str) -> str:
    """The page; plans, replicas: the rows of its last two tables."""
    return PAGE.format(
        terms="\n".join(term_rows(profiles)), errors="\n".join(error_rows()), memory="\n".join(memory_rows()),
        devices="\n".join(device_rows()), factors="\n".join(factor_rows()), plans=plans,
        requests=REQUESTS, replicas=replicas, trace_requests=TRACE_REQUESTS,
    )


def on_a100(config: dict[str, Any], name: str) -> Profile:
    return estimate(config, accelerator("a100-80"), Setup(), name)


def term_rows(profiles: Path | None) -> Iterator[str]:
    """Each known profile's terms with the estimate's, and by how much that differs."""
    llama2 = on_a100(LLAMA2, "llama-2-7b")
    known = [(load_profile(name), llama2) for name in ("a100-llama2-7b", "a100-llama2-7b-vidur")]
    if profiles is not None:
        known += [(load_profile(path), on_a100(LLAMA3, "llama-3-8b")) for path in sorted(profiles.glob("*llama3-8b*"))]
    paper = load_profile("a100-llama2-7b-paper")
    for theirs, ours in known:
        for label, field, times in TERMS:
            yield compared(theirs.name, label, *(
                times * getattr(one.time_model, field) for one in (theirs, ours)
            ))
        yield compared(theirs.name, "KV tokens", theirs.kv_capacity_tokens, ours.kv_capacity_tokens)
    yield compared(paper.name, "d0 (here the floor), ms", 1e3 * paper.time_model.d0_s, 1e3 * llama2.time_model.floor_s)
    yield compared(
        paper.name, "d1, µs per KV token", *(1e6 * one.time_model.d1_s_per_kv_token for one in (paper, llama2))
    )


def compared(name: str, term: str, known: float, estimated: float) -> str:
    return f"| `{name}` | {term} | {known:.4g} | {estimated:.4g} | {estimated / known - 1:+.0%} |"


def error_rows() -> Iterator[str]:
    """Relative errors over Vidur's published iteration times."""
    models = {
        "the estimate": on_a100(LLAMA2, "llama-2-7b").time_model,
        "`a100-llama2-7b`": load_profile("a100-llama2-7b").time_model,
        "`a100-llama2-7b-vidur`": load_profile("a100-llama2-7b-vidur").time_model,
    }
    for name, time_model in models.items():
        found = np.array([error(time_model, point) for point in POINTS])
        off = np.abs(found)
        yield f"| {name} | {len(found)} | {off.mean():.1%} | {off.max():.1%} | {found.mean():+.1%} |"


def error(time_model: IterationTimeModel, point: Point) -> float:
    seconds = time_model.iteration_s(float(point.prefill), float(point.decodes), float(point.kv))
    return 1000 * seconds / point.ms - 1


def memory_rows() -> Iterator[str]:
    """M* = Λ_W d0/(1 − d1 Λ_W), with the estimate's floor for d0."""
    law = on_a100(LLAMA2, "llama-2-7b").time_model
    for rate_rps, published in PUBLISHED_MEMORY.items():
        flow = rate_rps * MEAN_WEIGHT
        ours = flow * law.floor_s / (1 - law.d1_s_per_kv_token * flow)
        yield f"| {rate_rps} /s | {published:,} tokens | {ours:,.0f} tokens | {ours / published - 1:+.0%} |"
    full = CAPACITY / (MEAN_WEIGHT * (law.floor_s + law.d1_s_per_kv_token * CAPACITY))
    off = full / PUBLISHED_CROSSING_RPS - 1
    yield f"| memory full | {PUBLISHED_CROSSING_RPS} /s | {full:.1f} /s | {off:+.0%} |"


def device_rows() -> Iterator[str]:
    """Every accelerator of the table, for an 8B and a 70B model; nothing of it was measured."""
    for name, device in accelerators().items():
        for model, config, times in (("Llama-3-8B", LLAMA3, 1), ("Llama-3-70B", LLAMA3_70B, 4)):
            try:
                found = estimate(config, device, Setup(tensor_parallel=times), model)
            except DoesNotFit:
                yield f"| {model} | {name}:{times} | does not fit | | | | |"
                continue
            law, interval = found.time_model, found.interval
            assert interval is not None
            floors = f"{1e3 * law.floor_s:.1f} ({1e3 * interval.fast.floor_s:.1f} to {1e3 * interval.slow.floor_s:.1f})"
            yield (
                f"| {model} | {name}:{times} | {floors} | {1e3 * law.d0_s:.1f} | "
                f"{1e6 * law.d2_s_per_prefill_token:.1f} | {1e9 * law.d1_s_per_kv_token:.1f} | "
                f"{found.kv_capacity_tokens:,} |"
            )


def factor_rows() -> Iterator[str]:
    for name, factor in FACTORS.items():
        yield f"| `{name}` | {factor.value:g} | {factor.low:g} to {factor.high:g} | {factor.source} |"


def simulated() -> Iterator[str]:
    """What a replica does at, below and above the rate that its plan allows it."""
    for case in CASES:
        config = configured(case, 1.0)
        most_rps = replicas_needed(planner(case, config), 1.0).most_rps
        for share in OF_PLAN:
            result = simulate(configured(case, share * most_rps))
            plan = planner(case, config)(share * most_rps)
            late = result["rejected_in_window"] / result["window_requests"]
            served = 1 - late
            yield (
                f"| {case.lengths} | {case.ttft_s:g} s, {1000 * case.tpot_s:g} ms | {share:g} | {share * most_rps:.2f} "
                f"| {plan.load:.2f} | {min(plan.late, 1.0):.1%} | {late:.1%} | "
                f"{served * result['served_ttft_miss_fraction']:.1%} | "
                f"{served * result['served_tpot_miss_fraction']:.1%} |"
            )


def several(traces: Path) -> Iterator[str]:
    """The planned number of replicas on a trace, and one fewer."""
    workload = WorkloadConfig(
        trace=traces / "azure_conv_2023.csv", rate_rps=TRACE_RPS, requests=TRACE_REQUESTS, arrivals="poisson",
    )
    config = SimulationConfig(
        workload=workload, policy="fluid", max_num_seqs=256, max_model_len=16_384, slo=TRACE_TARGETS
    )
    plan_at = planner_of(open_workload(workload).mix(), config)
    need = replicas_needed(plan_at, TRACE_RPS)
    assert need.replicas is not None
    for replicas in (need.replicas - 1, need.replicas):
        result = simulate(config.model_copy(update={"replicas": replicas}))
        late = result["rejected_in_window"] / result["window_requests"]
        missed = (1 - late) * max(result["served_ttft_miss_fraction"], result["served_tpot_miss_fraction"])
        planned = ", as planned" if replicas == need.replicas else ""
        yield f"| {replicas}{planned} | {plan_at(TRACE_RPS / replicas).load:.2f} | {late:.1%} | {missed:.1%} |"


def configured(case: Case, rate_rps: float) -> SimulationConfig:
    return SimulationConfig(
        workload=WorkloadConfig(lengths=case.lengths, rate_rps=rate_rps, requests=REQUESTS), policy="fluid",
        max_num_seqs=256, slo=Slo(case.ttft_s, case.tpot_s),
    )


def planner(case: Case, config: SimulationConfig) -> Any:
    return planner_of(open_workload(WorkloadConfig(lengths=case.lengths, requests=1, rate_rps=1.0)).mix(), config)


def planner_of(mix: WorkloadMix, config: SimulationConfig) -> Any:
    law, limits = load_profile(config.profile).time_model, limits_of(config)

    def plan_at(rate_rps: float) -> FluidPlan:
        return solve_fluid_params(
            WorkloadMix.from_lengths(mix.merged().lengths, rate_rps), law, limits, config.slo,
            error=IterationTimeError.from_mape(PUBLISHED_MAPE),
        )

    return plan_at


PAGE = """# Profiles from first principles, beside known ones

<!-- conclusion: begin -->
<!-- conclusion: end -->

Made by `python benchmarks/evidence/estimates.py` (`--profiles FOLDER` for the rows of Llama-3-8B, `--traces FOLDER`
for the last table). The estimates are those of `headrace profile estimate`
([how](../operate/sizing.md#without-a-profile)). **No GPU was measured for this page.** The profiles beside them are
published figures, of a simulator (Vidur's) and of the paper, except where a profile calls itself an estimate. Two
things follow. The efficiency factors were set by the Llama-2-7B figures, so agreement with those says that the form is
right and that one set of factors fits them all; it is no test on other hardware. And for every other accelerator there
is nothing here to compare with: its rows are estimates.

## Terms on an A100 80GB

| profile | term | known | estimated | off by |
|---|---|---|---|---|
{terms}

`a100-llama3-8b-estimate` is someone else's estimate by hand, no measurement: it prices a decode at less than half of a
prompt token, though both pass through the same layers.

## Errors over Vidur's published iteration times

Llama-2-7B on one A100 80GB; the [points](a100-law.md#point-by-point) of decodes, prompts and both.
The estimate counts 2 ms of host time in each iteration, and Vidur none, which is most of its signed mean.

| model | points | mean | largest | signed mean |
|---|---|---|---|---|
{errors}

## The published table of M*

M* = Λ_W d0/(1 − d1 Λ_W) as on the page [theory](theory.md), with the estimate's floor for d0; capacity 137 000 tokens.

| rate | published | estimated | off by |
|---|---|---|---|
{memory}

## On every accelerator of the table

Estimates, with vLLM's own limits on the device. The floor is the shortest iteration, with its interval.

| model | on | floor, ms | d0, ms | d2, µs | d1, ns per KV token | KV tokens |
|---|---|---|---|---|---|---|
{devices}

## Efficiency factors

| factor | value | interval | source |
|---|---|---|---|
{factors}

## A plan beside the simulator

`headrace plan` says which rate one replica takes with 99 % of the requests in time. The simulator, with vLLM's
scheduler and policy `fluid`, at shares of that rate: {requests} requests, Poisson, profile `a100-llama2-7b`, 256 slots,
one seed. "Late" is what the plan expects if nobody is rejected; above the planned rate rejection keeps the queue short,
so that fewer are late than the plan says. The plan foresees no missed TPOT: with outputs of 20 tokens policy
`fluid` leaves some below capacity.

| lengths | TTFT, TPOT | of the planned rate | rate /s | load | plan: late | rejected | TTFT missed | TPOT missed |
|---|---|---|---|---|---|---|---|---|
{plans}

## Several replicas beside the simulator

The Azure conversation trace at 20 /s, {trace_requests} requests, as Poisson arrivals, behind the request router, TTFT
3 s and TPOT 80 ms:

| replicas | load | rejected | served late |
|---|---|---|---|
{replicas}
"""


if __name__ == "__main__":
    main()
