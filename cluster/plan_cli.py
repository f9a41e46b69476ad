"""`headrace plan`: how many replicas, on what, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster import render
from cluster.cli import Json, err, show
from cluster.profile_cli import BatchedTokens, KvCacheDtype, MemoryShare, Seqs
from cluster.render_plan import plan_tables
from scheduler.model.estimate import GPU_MEMORY_UTILIZATION
from scheduler.model.probability import ACCEPTED_MISSES

app = typer.Typer()


@app.command()
def plan(
    types: Annotated[
        list[str] | None, typer.Option("--type", help="rate=R,prompt=TOKENS,output=TOKENS[,name=NAME]; repeatable.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Trace: CSV, Parquet, ShareGPT JSON, Mooncake JSONL.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second, with --trace or --from.")] = None,
    url: Annotated[
        str | None, typer.Option("--from", help="URL of a running application: plan with its own estimates.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --from: the model, where it serves several.")] = None,
    ttft: Annotated[float | None, typer.Option(help="Target: seconds to the first token.")] = None,
    tpot: Annotated[float | None, typer.Option(help="Target: mean seconds per further token.")] = None,
    latency: Annotated[float | None, typer.Option(help="Target: seconds to the last token.")] = None,
    profile: Annotated[str | None, typer.Option(help="Iteration-time model and KV capacity: preset or file.")] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="A model's config.json or folder; with --accelerator, in place of a profile.")
    ] = None,
    accelerator: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:TP, such as h100:2; several stand side by side.")
    ] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor parallel of accelerators without :TP.", min=1)] = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    gpu_memory_utilization: MemoryShare = GPU_MEMORY_UTILIZATION,
    max_num_seqs: Seqs = None,
    max_num_batched_tokens: BatchedTokens = None,
    d0: Annotated[float | None, typer.Option(help="Seconds every iteration takes.")] = None,
    d1: Annotated[float | None, typer.Option(help="Seconds per KV token read.")] = None,
    d2: Annotated[float | None, typer.Option(help="Seconds per prefill token.")] = None,
    d3: Annotated[float | None, typer.Option(help="Seconds per decode token.")] = None,
    floor: Annotated[float | None, typer.Option(help="Least seconds of compute in an iteration.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="KV cache capacity in tokens.")] = None,
    segments: Annotated[int, typer.Option(help="Most segments of Nested WAIT.", min=1, max=16)] = 4,
    overflow_probability: Annotated[
        float, typer.Option(help="Accepted probability of a KV cache overflow, and share of missed targets.", max=0.5)
    ] = ACCEPTED_MISSES,
    as_json: Json = False,
) -> None:
    """How many replicas serve this traffic within these targets, on what, what binds, and what one more would buy.

    Also the fluid model of the whole rate on one replica: load, iteration time, memory, throughput, thresholds.
    """
    from cluster.plan import Options, PlanInputs, make_plan, targets_of

    inputs = PlanInputs(
        types=tuple(types or ()), trace=trace, rate=rate, url=url, model=model, targets=targets_of(ttft, tpot, latency),
        options=Options(
            profile=profile, coefficients={"d0": d0, "d1": d1, "d2": d2, "d3": d3, "floor": floor},
            kv_tokens=kv_tokens, model_config=model_config, accelerators=tuple(accelerator or ()), tensor_parallel=tp,
            kv_cache_dtype=kv_cache_dtype, gpu_memory_utilization=gpu_memory_utilization, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        ),
        segments=segments, overflow_probability=overflow_probability,
    )
    result = make_plan(inputs)
    for warning in result.pop("warnings"):
        err.print(f"[yellow]warning:[/yellow] {render.plain(warning)}", soft_wrap=True)
    show(result, as_json, plan_tables)
