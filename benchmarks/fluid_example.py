"""The worked example of docs/fluid-policy.md and its figure, from a run that `headrace simulate --out FOLDER` kept.

    headrace simulate --trace FILE --rate 7.7 --requests 1500 --policy fluid --slo-ttft 3 --slo-tpot 0.08 --seed 1 \
        --out runs/example
    python benchmarks/fluid_example.py runs/example

Solves the plan for the lengths of the run's own requests, takes one iteration of the run apart, and writes both between
the two comments `worked example` of the page, and docs/figures/fluid-example.png and .svg. Takes seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import load_profile
from scheduler.model.workload import Lengths, WorkloadMix
from scheduler.thresholds import EngineLimits
from scheduler.tuning.fluid_plan import FluidPlan, solve_fluid_params
from scheduler.tuning.slo import Slo
from simulator.output.figures import Series, TimePanel, draw_over_time, thin
from simulator.output.rows import REJECTED
from simulator.output.run_files import Run, read_run
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import open_workload

PAGE = Path(__file__).parents[1] / "docs" / "fluid-policy.md"
BEGIN, END = "<!-- worked example: begin -->\n", "<!-- worked example: end -->\n"
AT_S = 120.0
"""The first iteration from this virtual second on is the one that is shown."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    run = read_run(args.run)
    before, rest = args.page.read_text(encoding="utf-8").split(BEGIN)
    args.page.write_text(before + BEGIN + worked(run) + END + rest.split(END)[1], encoding="utf-8")
    stem = args.page.parent / "figures" / "fluid-example"
    stem.parent.mkdir(exist_ok=True)
    draw(stem, run)


def worked(run: Run) -> str:
    """The section's text."""
    config, summary = run.config, run.summary
    lengths = lengths_of(config)
    model = load_profile(config["profile"]).time_model
    plan = plan_for(lengths, float(config["workload"]["rate_rps"]), model, config)
    return TEXT.format(
        **plan_numbers(plan, lengths, model), **iteration_numbers(run, plan, model), **result_numbers(run, summary),
        requests=summary["requests"], rate=config["workload"]["rate_rps"], ttft=config["slo"]["ttft_s"],
        tpot_ms=1000 * config["slo"]["tpot_s"],
        profile=config["profile"], margin=plan.tpot_margin, share=summary["goodput_rps"] / plan.capacity_rps,
    )


def lengths_of(config: dict[str, Any]) -> Lengths:
    """Of all requests that arrived; the run's own rows have no output length for those that were rejected."""
    workload = {name: value for name, value in config["workload"].items() if name in WorkloadConfig.model_fields}
    workload["max_total_tokens"] = config["max_model_len"]
    requests = open_workload(WorkloadConfig(**workload)).requests()
    return Lengths.from_pairs((request.prompt_tokens, request.output_tokens) for request in requests)


def plan_for(lengths: Lengths, rate_rps: float, model: IterationTimeModel, config: dict[str, Any]) -> FluidPlan:
    limits = EngineLimits(
        kv_capacity_tokens=config["kv_tokens"], max_num_batched_tokens=config["token_budget"],
        **{name: config[name] for name in ("block_tokens", "max_num_seqs", "max_model_len")},
    )
    slo = Slo(config["slo"]["ttft_s"], config["slo"]["tpot_s"])
    return solve_fluid_params(WorkloadMix.from_lengths(lengths, rate_rps), model, limits, slo)


def plan_numbers(plan: FluidPlan, lengths: Lengths, model: IterationTimeModel) -> dict[str, Any]:
    """Milliseconds of iteration time that a request costs, by cause, and what follows from them."""
    prefill_ms = 1000 * lengths.mean_prompt_tokens * model.d2_s_per_prefill_token
    decode_ms = 1000 * lengths.mean_output_tokens * model.d3_s_per_decode_token
    kv_ms = 1000 * float(lengths.weights @ lengths.kv_token_iterations_each) * model.d1_s_per_kv_token
    params = plan.fluid
    assert params.iteration_s is not None
    return {
        "prompt": lengths.mean_prompt_tokens, "output": lengths.mean_output_tokens, "prefill_ms": prefill_ms,
        "decode_ms": decode_ms, "kv_ms": kv_ms, "work_ms": prefill_ms + decode_ms + kv_ms,
        "d0_ms": 1000 * model.d0_s, "d1_us": 1e6 * model.d1_s_per_kv_token, "d2_us": 1e6 * model.d2_s_per_prefill_token,
        "planned_ms": 1000 * params.iteration_s, "capacity": plan.capacity_rps, "load": plan.load,
        "bottleneck": plan.bottleneck, "flow": params.prompt_flow_tokens, "at_capacity": params.running_at_capacity,
        "queue_limit": params.queue_limit, "kv_limit": params.kv_limit_tokens,
    }


def iteration_numbers(run: Run, plan: FluidPlan, model: IterationTimeModel) -> dict[str, Any]:
    """One iteration: the room for prompts that the policy found, and what the iteration then took."""
    row = next(row for row in run.iterations().to_pylist() if row["start_s"] >= AT_S)
    passes = [one for one in run.control().to_pylist() if one["at_s"] <= row["start_s"]]
    kv_before = row["kv_read_tokens"] - row["prefill_tokens"]
    assert plan.fluid.iteration_s is not None
    left_s = plan.fluid.iteration_s - model.d0_s - model.d3_s_per_decode_token * row["decode_tokens"]
    left_s -= model.d1_s_per_kv_token * kv_before
    return {
        "at": row["start_s"], "running": row["running"], "decodes": row["decode_tokens"], "kv": kv_before,
        "decodes_ms": 1000 * model.d3_s_per_decode_token * row["decode_tokens"],
        "reads_ms": 1000 * model.d1_s_per_kv_token * kv_before, "left_ms": 1000 * left_s,
        "room": plan.fluid.prompt_tokens_within(plan.fluid.iteration_s, row["decode_tokens"], kv_before),
        "budget": row["token_budget"], "computed": row["prefill_tokens"], "took_ms": 1000 * row["seconds"],
        "waiting": row["waiting"], "kv_used": row["kv_used_tokens"], "limit_then": passes[-1]["queue_limit"],
        "per_token_us": 1e6 * (model.d2_s_per_prefill_token + model.d1_s_per_kv_token),
    }


def result_numbers(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    outcomes, passes = run.requests(["outcome"]).to_pylist(), run.control().to_pylist()
    return {
        "passes": len(passes), "applied": sum(one["applied"] for one in passes),
        "last_applied": max(one["at_s"] for one in passes if one["applied"]),
        "rejected": sum(row["outcome"] == REJECTED for row in outcomes), "goodput": summary["goodput_rps"],
        "ttft_p50": summary["ttft_p50_s"], "ttft_p99": summary["ttft_p99_s"],
        "tpot_p99_ms": 1000 * summary["tpot_p99_s"], "ttft_misses": summary["served_ttft_miss_fraction"],
        "tpot_misses": summary["served_tpot_miss_fraction"], "preemptions": summary["preemptions"],
        "rejection_p50_s": summary["rejection_p50_s"],     }


def draw(stem: Path, run: Run) -> None:
    """Iteration time, KV cache and requests over time, each beside its limit."""
    table, control = run.iterations(), run.control()
    at_s, pass_s = table["start_s"].to_numpy(), control["at_s"].to_numpy()

    def column(name: str, scale: float = 1.0) -> list[Series]:
        return [Series(*thin(at_s, table[name].to_numpy().astype(float) * scale, most=900))]

    def limit(name: str, scale: float = 1.0) -> list[Series]:
        return [Series(pass_s, control[name].to_numpy(zero_copy_only=False).astype(float) * scale)]

    draw_over_time(stem, f"fluid at {run.config['workload']['rate_rps']:g} requests/s", [
        TimePanel("iteration (ms)", {"measured": column("seconds", 1000)}, {"planned": limit("iteration_s", 1000)}),
        TimePanel("KV tokens (1 000)", {"used": column("kv_used_tokens", 1e-3)},
                  {"limit": limit("kv_limit_tokens", 1e-3)}),
        TimePanel("requests", {"running": column("running")}),
        TimePanel("requests", {"waiting": column("waiting")}, {"queue limit": limit("queue_limit")}),
    ])  # fmt: skip


TEXT = """\
{requests} requests of the Azure conversation trace (Poisson arrivals, {rate:g} requests/s; TTFT {ttft:g} s, TPOT
{tpot_ms:g} ms) on one replica with the profile `{profile}`. Numbers below are of this run.

**The plan.** Prompts have {prompt:.0f} tokens on average and outputs {output:.0f}. One request costs the replica
{work_ms:.0f} ms of iteration time: {prefill_ms:.0f} ms of prefill, {decode_ms:.0f} ms of decodes and {kv_ms:.0f} ms of
KV reads. An iteration is planned to take T = {tpot_ms:g} ms / (1 + {margin:g}) = {planned_ms:.1f} ms, of which
d0 = {d0_ms:.1f} ms are spent whatever the batch. Every second therefore has 1 − {d0_ms:.1f}/{planned_ms:.1f} seconds of
work in it, and capacity is that over {work_ms:.0f} ms: **{capacity:.2f} requests/s**, so the load is {load:.2f} and the
bottleneck the {bottleneck}. At capacity about {at_capacity:.0f} requests run, an iteration computes {flow:.0f} prompt
tokens, and the queue limit is {queue_limit}.

**One iteration**, at {at:.1f} s: {running} requests run, {waiting} wait (queue limit {limit_then}), {decodes} decode,
and these read {kv:,} KV tokens.

    time for prompts = {planned_ms:.1f} − {d0_ms:.1f} (d0) − {decodes_ms:.1f} (decodes) − {reads_ms:.1f} (KV reads) \
= {left_ms:.1f} ms
    room             = {left_ms:.1f} ms / {per_token_us:.2f} µs per prompt token (d2 + d1) = {room:.0f} tokens
    token budget     = {decodes} decodes + {room:.0f} = {budget}

It computed {computed} prompt tokens and took {took_ms:.1f} ms. {kv_used:,} KV tokens were allocated, of {kv_limit:,}
that admitted requests may grow into: time is scarce here, not memory.

**The result.** {rejected} of {requests} requests were rejected, in the median {rejection_p50_s:.2f} s after their
arrival. Of the requests served in the central window {ttft_misses:.1%} missed the TTFT and {tpot_misses:.1%} the TPOT
target: TTFT {ttft_p50:.2f} s in the median and {ttft_p99:.2f} s at the 99th percentile, TPOT {tpot_p99_ms:.1f} ms at
the 99th. Goodput was {goodput:.2f} requests/s, {share:.2f} of the capacity above; {preemptions} requests were
preempted.

![Iteration time, KV cache, running and waiting requests over time](figures/fluid-example.svg)

The controller starts cold and sees its first long outputs end after some ten seconds. It pushed new parameters in
{applied} of {passes} control cycles, the last time at {last_applied:.0f} s.
"""


if __name__ == "__main__":
    main()
