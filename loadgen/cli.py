"""`headrace bench`: the command and its tables. Imports are deferred until it runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer()
out = Console()
err = Console(stderr=True)

INTERRUPTED = 130


@app.command()
def bench(
    url: Annotated[str, typer.Option(help="Base URL of an OpenAI-style server.", envvar="HEADRACE_URL")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[str | None, typer.Option(help="Model id; left out: the first that the server lists.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Sent as a bearer token.", envvar="HEADRACE_API_KEY", show_envvar=True)
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Lengths: p512d20, 0.7:p512d20+0.3:p512d50, lmsys; 'A; 300s: B' changes.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Trace: CSV, Parquet or ShareGPT JSON; not --lengths.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second.")] = None,
    arrivals: Annotated[
        str, typer.Option(help="poisson, gamma:cv=3, onoff:on=10,off=20, diurnal:period=3600,amplitude=0.8, "
                               "step:at=60,factor=3, uniform, or replay (the trace's own timestamps).")
    ] = "poisson",
    requests: Annotated[
        int | None, typer.Option(help="How many; left out: until --duration, or the whole trace.", min=1)
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds of arrivals, instead of --requests.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same arrivals and lengths.")] = 0,
    slo_ttft: Annotated[float | None, typer.Option(help="Target: seconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Target: mean seconds per further token.")] = None,
    slo_latency: Annotated[float | None, typer.Option(help="Target: seconds end to end.")] = None,
    warmup: Annotated[int, typer.Option(help="Requests at the beginning that are not measured.", min=0)] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds after its arrival at which a request times out.")] = 600.0,
    declare_lengths: Annotated[
        bool, typer.Option("--declare-lengths", help="Requests declare their output lengths.")
    ] = False,
    label: Annotated[str | None, typer.Option(help="What `headrace report` calls this run, if not the model.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for summary.json and requests.parquet.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Send requests open loop to a running server and measure the responses. Ctrl-C keeps the results so far."""
    from loadgen.config import bench_config
    from loadgen.measurement import measure
    from loadgen.open_loop import allow_many_connections

    config = bench_config(
        url=url, model=model, label=label, duration_s=duration, warmup=warmup, timeout_s=timeout,
        declare_lengths=declare_lengths, slo={"ttft_s": slo_ttft, "tpot_s": slo_tpot, "latency_s": slo_latency},
        workload={"lengths": lengths, "trace": trace, "rate_rps": rate, "arrivals": arrivals, "requests": requests,
                  "seed": seed},
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # before an hour of sending rather than after it
    allow_many_connections()
    summary = asyncio.run(
        measure(config, api_key, folder, progress_on=err if err.is_terminal and not as_json else None)
    )
    for note in summary.pop("notes"):
        err.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    for message, count in summary["messages"].items():
        err.print(f"{count} times: {message}", style="red", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(summary, allow_nan=False))  # noqa: T201  # rich would wrap lines
    else:
        out.print(_table(summary))
    if summary["interrupted"]:
        raise typer.Exit(INTERRUPTED)
    if summary["failed"] and not summary["completed"]:
        raise typer.Exit(1)


def _table(summary: dict[str, Any]) -> Table:
    title = f"{summary['model']} at {summary['url']}: {summary['workload']}, {summary['rate_rps']:g} requests/s"
    table = Table(title=escape(title), show_header=False)
    counts = {
        "requests": "requests", "completed": "completed", "rejected (HTTP 429)": "rejected", "failed": "failed",
        "timed out": "timed_out", "cancelled": "cancelled", "good": "good",
    }
    for name, key in counts.items():
        table.add_row(name, str(summary[key]), end_section=name == "good")
    for name, key, unit in (
        ("offered", "offered_rps", "requests/s"), ("goodput", "goodput_rps", "requests/s"),
        ("throughput", "throughput_rps", "requests/s"), ("output", "output_tokens_per_s", "tokens/s"),
    ):
        table.add_row(name, _value(summary[key], unit), end_section=name == "output")
    for name, keys in (
        ("time to first token", ("ttft_p50_s", "ttft_p90_s", "ttft_p99_s")),
        ("time per output token", ("tpot_mean_s", "tpot_p50_s", "tpot_p99_s")),
        ("latency", ("latency_mean_s", "latency_p50_s", "latency_p99_s")),
        ("send lag", ("send_lag_p50_s", "send_lag_p99_s", "send_lag_p100_s")),
    ):
        values = [f"{key.split('_')[-2]} {_value(summary[key], 's')}" for key in keys]
        table.add_row(name, ", ".join(values).replace("p100", "most"))
    return table


def _value(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value:.4g} {unit}"
