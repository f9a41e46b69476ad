"""One measurement of a server from its configuration to its summary, with a progress bar."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loadgen.client import Exchange, Server
from loadgen.config import BenchConfig, OfferedLoad, draw_load
from loadgen.open_loop import OnChange, OpenLoop
from loadgen.results import is_good, summary_of, table_of, warnings_of, write_results
from simulator.output.rows import COMPLETED, REJECTED


async def measure(
    config: BenchConfig, api_key: str | None, folder: Path | None, *, progress_on: Console | None
) -> dict[str, Any]:
    """Send the load of `config`, and return the summary (see docs/bench.md) with `notes` for the reader.

    `folder` (None: none is written) gets the results, `progress_on` shows progress.

    Raises:
        ServerError: the server cannot be measured. BenchError: there is nothing to send.
    """
    async with Server(config.url, api_key) as server:
        model = await server.model(config.model)
        load = draw_load(config, model.max_model_len)
        begun_unix_s, begun_s = time.time(), time.monotonic()
        with _progress(config, load, progress_on) as on_change:
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


def _as_run(config: BenchConfig, load: OfferedLoad, model: str) -> dict[str, Any]:
    """The configuration under the names that `headrace report` looks for."""
    data = config.model_dump(mode="json") | {"model": model, "policy": config.label or model}
    data["workload"] |= {"name": load.name, "rate_rps": load.rate_rps, "requests": len(load.requests)}
    return data


@contextmanager
def _progress(config: BenchConfig, load: OfferedLoad, console: Console | None) -> Iterator[OnChange]:
    columns = (
        TextColumn("answered"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[counts]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=console is None) as bar:
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
            counts = f"sent {seen['sent']}, rejected {seen[REJECTED]}, failed {seen['failed']}, " \
                f"goodput {goodput_rps:.2f}/s"
            bar.update(task, completed=seen["ended"], counts=counts)

        yield on_change if console else lambda _: None
