"""`headrace simulate`, `sweep` and `report`: the simulator's commands. Each imports what it needs when it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from simulator.scenario.autoscalers import AUTOSCALERS
from simulator.scenario.baselines import BASELINES
from simulator.scenario.routers import ROUTERS

app = typer.Typer()
out = Console()
err = Console(stderr=True)

_DEFAULT_REQUESTS = 1000
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _policies(incomplete: str) -> list[str]:
    return [name for name in BASELINES if name.startswith(incomplete)]


def _profiles(incomplete: str) -> list[str]:
    from scheduler.model.profiles import profile_names

    return [name for name in profile_names() if name.startswith(incomplete)]


@app.command()
def simulate(
    workload: Annotated[
        str | None, typer.Option(
            help="Lengths: p512d20, 0.7:p512d20+0.3:p512d50, lmsys; 'A; 300s: B' changes. Or sessions:turns=5,think=20."
        )
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Trace: CSV, Parquet, ShareGPT JSON, Mooncake JSONL; not --workload.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second.")] = None,
    arrivals: Annotated[
        str, typer.Option(help="poisson, gamma:cv=3, onoff:on=10,off=20, diurnal:period=3600,amplitude=0.8, "
                               "step:at=60,factor=3, uniform, or replay (the trace's own timestamps).")
    ] = "poisson",
    requests: Annotated[int | None, typer.Option(help="How many; left out: the whole trace, or 1000.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
    policy: Annotated[
        str, typer.Option(help=f"One of {', '.join(BASELINES)}.", autocompletion=_policies)
    ] = "vllm",
    profile: Annotated[
        str, typer.Option(help="Iteration-time model and KV capacity: preset or JSON file.", autocompletion=_profiles)
    ] = "a100-llama2-7b",
    kv_tokens: Annotated[int | None, typer.Option(help="KV cache capacity in tokens, if not the profile's.")] = None,
    token_budget: Annotated[
        int | None, typer.Option(help="Most tokens in an iteration (2048; vllm-v0 4096; sarathi 512).")
    ] = None,
    cap: Annotated[int | None, typer.Option(help="Most running requests.")] = None,
    slo_ttft: Annotated[float | None, typer.Option(help="Target: seconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Target: mean seconds per further token.")] = None,
    slo_latency: Annotated[float | None, typer.Option(help="Target: seconds end to end.")] = None,
    replicas: Annotated[int, typer.Option(help="Replicas behind the request router.", min=1)] = 1,
    router: Annotated[str, typer.Option(help=f"How a replica is chosen: {', '.join(ROUTERS)}.")] = "fluid",
    ingresses: Annotated[int, typer.Option(help="Ingresses that route, each for itself.", min=1)] = 1,
    stats_age: Annotated[float, typer.Option(help="Oldest report of a replica that they go by, in seconds.")] = 1.0,
    speeds: Annotated[str, typer.Option(help="Of the replicas, relative to the profile: 1,1,1,0.5")] = "1",
    autoscale: Annotated[
        str | None, typer.Option(help=f"The number of replicas changes by a rule: {', '.join(AUTOSCALERS)}.")
    ] = None,
    start_up: Annotated[float, typer.Option(help="Until a started replica serves, in seconds.")] = 60.0,
    min_replicas: Annotated[int, typer.Option(help="With --autoscale, the fewest.", min=0)] = 1,
    max_replicas: Annotated[int, typer.Option(help="With --autoscale, the most.", min=1)] = 16,
    pipeline_parallel: Annotated[int, typer.Option(help="Pipeline stages of each replica.", min=1)] = 1,
    prefix_caching: Annotated[bool, typer.Option(help="Compute what prompts share once, as vLLM does.")] = True,
    speculative_tokens: Annotated[
        int | None, typer.Option(help="Draft tokens of a decoding request in every iteration; with --acceptance-rate.")
    ] = None,
    acceptance_rate: Annotated[
        float | None, typer.Option(help="Chance that the model accepts a draft token, from 0 to 1.")
    ] = None,
    solve_once: Annotated[
        bool, typer.Option("--solve-once", help="No controller: thresholds solved once, from the workload itself.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, any other option: mode=strict, max_num_seqs=256, …")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for the run's Parquet files.")] = None,
    as_json: Json = False,
) -> None:
    """Run vLLM's own scheduler in virtual time; an iteration takes what an iteration-time model predicts."""
    given = {
        "lengths": workload, "trace": trace, "rate_rps": rate, "arrivals": arrivals, "requests": requests, "seed": seed,
        "policy": policy, "profile": profile, "kv_tokens": kv_tokens, "token_budget": token_budget, "cap": cap,
        "slo_ttft_s": slo_ttft, "slo_tpot_s": slo_tpot, "slo_latency_s": slo_latency, "replicas": replicas,
        "router": router, "ingresses": ingresses, "stats_age_s": stats_age, "speeds": speeds,
        "autoscale": autoscale, "start_up_s": start_up, "min_replicas": min_replicas, "max_replicas": max_replicas,
        "pipeline_parallel": pipeline_parallel, "prefix_caching": prefix_caching,
        "speculative_tokens": speculative_tokens, "acceptance_rate": acceptance_rate, "solve_once": solve_once or None,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if workload is not None:
        options.setdefault("requests", _DEFAULT_REQUESTS)
    from simulator.config import options_from, simulation_config

    config = simulation_config(options | options_from(settings or []))
    with err.status("loading vLLM"):
        from simulator.run import simulate as run
    with _requests_bar(config.workload.requests) as progress:
        summary = run(config, folder=folder, progress=progress)
    for note in summary.pop("notes"):
        err.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(summary, allow_nan=False))  # noqa: T201  # not rich's: programs want no wrapping
    else:
        out.print(_summary_table(summary))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML with base, grid, seeds and out, see docs/simulator.md.")],
    workers: Annotated[int | None, typer.Option(help="Processes; all cores when left out.", min=1)] = None,
) -> None:
    """Run a grid of simulations on all cores; points that are there already are kept."""
    import os

    from simulator.run import simulate_options
    from simulator.sweep import load_sweep, run_sweep

    plan = load_sweep(file)
    results = run_sweep(plan, simulate_options, workers or os.cpu_count() or 1, err)
    failed = [result for result in results if result.error]
    out.print(f"{len(results) - len(failed)} of {len(results)} points are in {plan.out}", highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders that hold some.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for report.md and its figures.")] = Path("report"),
) -> None:
    """Figures (PNG, SVG) and a Markdown table from runs."""
    from simulator.output.report import make_report

    out.print(str(make_report(runs, folder, err)), highlight=False)


@contextmanager
def _requests_bar(total: int | None) -> Iterator[Any]:
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda done, _total: bar.update(task, completed=done)


def _summary_table(summary: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    for key, value in summary.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table
