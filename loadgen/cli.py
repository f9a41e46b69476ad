"""`headrace bench`: the command, its progress bar and its tables."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from loadgen.client import Exchange, Server
from loadgen.config import BenchConfig, Load, bench_config, draw_load
from loadgen.open_loop import OnChange, OpenLoop, allow_many_connections
from loadgen.results import is_good, summary_of, table_of, warnings_of, write_results
from simulator.output.run_files import COMPLETED, REJECTED

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
    timeout: Annotated[float, typer.Option(help="Seconds after which a request is given up.")] = 600.0,
    declare_lengths: Annotated[
        bool, typer.Option("--declare-lengths", help="Requests say how long their answers will be.")
    ] = False,
    label: Annotated[str | None, typer.Option(help="What `headrace report` calls this run, if not the model.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for summary.json and requests.parquet.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Send requests to a running server when they are due, and measure what comes back. Ctrl-C keeps what is there."""
    config = bench_config(
        url=url, model=model, label=label, duration_s=duration, warmup=warmup, timeout_s=timeout,
        declare_lengths=declare_lengths, slo={"ttft_s": slo_ttft, "tpot_s": slo_tpot, "latency_s": slo_latency},
        workload={"lengths": lengths, "trace": trace, "rate_rps": rate, "arrivals": arrivals, "requests": requests,
                  "seed": seed},
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # before an hour of sending rather than after it
    allow_many_connections()
    summary = asyncio.run(_measure(config, api_key, folder, show_progress=err.is_terminal and not as_json))
    for note in summary.pop("notes"):
        err.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    for message, count in summary["messages"].items():
        err.print(f"{count} times: {message}", style="red", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(summary, allow_nan=False))  # noqa: T201  # not rich's: programs want no wrapping
    else:
        out.print(_table(summary))
    if summary["interrupted"]:
        raise typer.Exit(INTERRUPTED)
    if summary["failed"] and not summary["completed"]:
        raise typer.Exit(1)


async def _measure(
    config: BenchConfig, api_key: str | None, folder: Path | None, *, show_progress: bool
) -> dict[str, Any]:
    async with Server(config.url, api_key) as server:
        model = await server.model(config.model)
        load = draw_load(config, model.max_model_len)
        begun_unix_s, begun_s = time.time(), time.monotonic()
        with _progress(config, load, shown=show_progress) as on_change:
            loop = OpenLoop(
                server, model.id, timeout_s=config.timeout_s, declare_lengths=config.declare_lengths,
                on_change=on_change,
            )
            whole = await loop.run(load.requests)
    requests = table_of(loop.exchanges, config.slo)
    measures = summary_of(requests, config.slo, warmup=config.warmup)
    summary = {
        "url": server.url, "model": model.id, "workload": load.name, "rate_rps": load.rate_rps, **measures,
        "slo": asdict(config.slo), "interrupted": not whole, "begun_unix_s": begun_unix_s,
        "wall_s": time.monotonic() - begun_s, "notes": [*load.notes, *warnings_of(requests, measures)],
    }
    if folder is not None:
        write_results(folder, requests, _as_run(config, load, model.id), summary)
    return summary


def _as_run(config: BenchConfig, load: Load, model: str) -> dict[str, Any]:
    """The configuration under the names that `headrace report` looks for."""
    data = config.model_dump(mode="json") | {"model": model, "policy": config.label or model}
    data["workload"] |= {"name": load.name, "rate_rps": load.rate_rps, "requests": len(load.requests)}
    return data


@contextmanager
def _progress(config: BenchConfig, load: Load, *, shown: bool) -> Iterator[OnChange]:
    columns = (
        TextColumn("answered"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[counts]}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not shown) as bar:
        task = bar.add_task("requests", total=len(load.requests), counts="")
        seen: Counter[str] = Counter()
        begun_s = time.monotonic()

        def on_change(exchange: Exchange) -> None:
            if exchange.ended_s is None:
                seen["sent"] += 1
            else:
                seen["ended"] += 1
                seen[exchange.outcome if exchange.outcome in (COMPLETED, REJECTED) else "failed"] += 1
                seen["good"] += is_good(exchange, config.slo)
            goodput_rps = seen["good"] / max(time.monotonic() - begun_s, 1.0)
            counts = f"sent {seen['sent']}, refused {seen[REJECTED]}, failed {seen['failed']}, " \
                f"goodput {goodput_rps:.2f}/s"
            bar.update(task, completed=seen["ended"], counts=counts)

        yield on_change if shown else lambda _: None


def _table(summary: dict[str, Any]) -> Table:
    title = f"{summary['model']} at {summary['url']}: {summary['workload']}, {summary['rate_rps']:g} requests/s"
    table = Table(title=escape(title), show_header=False)
    counts = {
        "requests": "requests", "completed": "completed", "refused (HTTP 429)": "rejected", "failed": "failed",
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
