"""`headrace profile`: profiles of a model on a device, estimated or measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import Json, err, out
from cluster.estimated_profile import estimated_profile
from cluster.render_plan import profile_tables
from scheduler.config_errors import UsageError
from scheduler.model.estimate import CONTEXT_TOKENS, GPU_MEMORY_UTILIZATION, Setup
from scheduler.model.profiles import Profile

app = typer.Typer()
profile_app = typer.Typer(help="Profiles: iteration times and KV cache of a model on a device.", no_args_is_help=True)
app.add_typer(profile_app, name="profile")

Output = Annotated[Path | None, typer.Option(help="Write the profile's JSON file there.")]
TensorParallel = Annotated[int, typer.Option("--tp", help="Tensor parallel: accelerators of one replica.", min=1)]
KvCacheDtype = Annotated[str, typer.Option(help="auto (the model's), fp8, bfloat16.")]
MemoryShare = Annotated[float, typer.Option("--gpu-memory-utilization", help="vLLM's share of the memory.")]
ContextTokens = Annotated[
    int, typer.Option(help="Tokens of a typical running request: what sliding windows save.", min=1)
]
BatchedTokens = Annotated[int | None, typer.Option("--max-num-batched-tokens", help="vLLM's; its own default.", min=1)]
Seqs = Annotated[int | None, typer.Option("--max-num-seqs", help="vLLM's; its own default.", min=1)]


@profile_app.command("estimate")
def profile_estimate(
    model_config: Annotated[Path, typer.Option(help="The model's config.json, or its checkpoint's folder.")],
    accelerator: Annotated[str, typer.Option(help="a100-40, a100-80, h100, h200, l4, l40s, b200, mi300x.")],
    tp: TensorParallel = 1,
    kv_cache_dtype: KvCacheDtype = "auto",
    gpu_memory_utilization: MemoryShare = GPU_MEMORY_UTILIZATION,
    max_num_batched_tokens: BatchedTokens = None,
    max_num_seqs: Seqs = None,
    context_tokens: ContextTokens = CONTEXT_TOKENS,
    dtype: Annotated[str | None, typer.Option(help="Of weights that are not quantised; the config's own.")] = None,
    name: Annotated[str, typer.Option(help="The model's name; the checkpoint's own.")] = "",
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Estimate a profile from first principles, without the device: with intervals and the source of each number."""
    setup = Setup(
        tensor_parallel=tp, kv_cache_dtype=kv_cache_dtype, gpu_memory_utilization=gpu_memory_utilization,
        max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs, dtype=dtype,
        context_tokens=context_tokens,
    )
    _give(estimated_profile(model_config, accelerator, setup, name), output, as_json)


@profile_app.command("measure")
def profile_measure(
    model: Annotated[str, typer.Option(help="The model's folder, or its name on a hub.")],
    name: Annotated[str, typer.Option(help="The profile's name.")],
    dtype: Annotated[str | None, typer.Option(help="As vLLM's.")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option("--tp", help="As vLLM's tensor_parallel_size.")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="As vLLM's.")] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="As vLLM's.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="As vLLM's.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="As vLLM's.")] = None,
    largest_batch: Annotated[int | None, typer.Option(help="Requests; 32 on a CPU, else 256.", min=1)] = None,
    longest_prompt: Annotated[int | None, typer.Option(help="Tokens; 512 on a CPU, else 4 096.", min=16)] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the points, and of the prompts.")] = 0,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Measure a profile on this machine with the real engine, and check it on other iterations; minutes."""
    from dataclasses import replace

    from cluster.measure_profile import CPU_GRID, GPU_GRID, Engine, measure

    given = {
        "dtype": dtype, "tensor_parallel_size": tensor_parallel_size, "kv_cache_dtype": kv_cache_dtype,
        "gpu_memory_utilization": gpu_memory_utilization, "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    grid = None
    if largest_batch or longest_prompt:
        base = CPU_GRID if (longest_prompt or 0) <= CPU_GRID.longest_prompt else GPU_GRID
        grid = replace(
            base, largest_batch=largest_batch or base.largest_batch,
            longest_prompt=longest_prompt or base.longest_prompt,
        )
    engine = Engine(model=model, arguments={key: value for key, value in given.items() if value is not None}, seed=seed)
    _give(measure(engine, name, grid, lambda line: err.print(f"[dim]{line}[/dim]")), output, as_json)


def _give(profile: Profile, output: Path | None, as_json: bool) -> None:
    text = json.dumps(profile.as_dict(), indent=2)
    if output is not None:
        try:
            output.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{output} cannot be written: {error.strerror or error}") from error
    if as_json:
        print(text)  # noqa: T201
        return
    for table in profile_tables(profile):
        out.print(table, soft_wrap=isinstance(table, str))
    if output is not None:
        out.print(f"written to {output}", highlight=False, soft_wrap=True)
