"""`headrace status --watch`: the dashboard's sentences and replicas in a terminal, asked for anew every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scheduler.config_errors import CommandFailed

EVERY_S = 2.0
_STYLES = {"ok": "bold green", "note": "bold green", "warning": "bold yellow", "bad": "bold red"}
_TAGS = {"note": "cyan", "warning": "yellow", "bad": "red"}
_QUESTIONS = (
    ("How loaded?", "load"), ("What limits it?", "limit"), ("One more replica?", "one_more"),
    ("How many replicas?", "wanted"),
)
_CHANGES = 3


def watch(
    ask: Callable[[], dict[str, Any]], console: Console, *, every_s: float = EVERY_S,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show what `ask` answers until Ctrl-C; a server that does not answer is shown as such, and asked again."""
    latest: dict[str, Any] | None = None
    try:
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                trouble = ""
                try:
                    latest = ask()
                except CommandFailed as error:
                    trouble = str(error)
                live.update(Group(*shown(latest, trouble)), refresh=True)
                sleep(every_s)
    except KeyboardInterrupt:
        return


def shown(overview: dict[str, Any] | None, trouble: str = "") -> Iterator[Any]:
    """What `/admin/overview` answered last, for a terminal. trouble: why there is no newer answer."""
    if trouble:
        yield Text(f"No answer: {trouble}", style="bold red")
    if overview is None:
        return
    at = time.strftime("%H:%M:%S", time.localtime(overview["at_unix_s"]))
    health = overview["health"]
    title = Text.assemble((health["title"], _STYLES[health["level"]]), (f"  {overview['application']}, {at}", "dim"))
    yield title
    for sentence in health["sentences"]:
        yield Text(f"  {sentence}")
    yield Text()
    yield _answers(overview)
    yield _replicas(overview["replicas"])
    for name, row in overview["replicas"].items():
        for odd in row["oddities"]:
            yield Text.assemble((f"{name}: ", "bold"), (odd["name"], _TAGS[odd["level"]]), f". {odd['text']}")


def _answers(overview: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    models = overview["models"]
    for name, model in models.items():
        prefix = f"{name}: " if len(models) > 1 else ""
        for question, key in _QUESTIONS:
            answer = model[key]
            said = Text.assemble(prefix, (answer["headline"], "bold"), f". {answer['sentence']}")
            table.add_row(question, said)
    for number, change in enumerate(overview["changes"][:_CHANGES]):
        said = Text.assemble((_ago(change["age_s"]), "bold"), f". {change['sentence']}")
        table.add_row("What changed?" if number == 0 else "", said)
    return table


def _replicas(rows: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=0)
    table.add_column("replica", no_wrap=True)
    for column in ("running", "waiting", "KV", "arrive /s", "possible /s", "rejected"):
        table.add_column(column, no_wrap=True, justify="right")
    table.add_column("tuning", no_wrap=True)
    for name, row in rows.items():
        if not row["reachable"]:
            table.add_row(name, Text("silent", style="red"))
            continue
        most = "" if row["max_running"] is None else f" of {row['max_running']}"
        table.add_row(
            name, f"{row['running']}{most}", str(row["waiting"]), f"{row['kv_used_fraction']:.0%}",
            _number(row["rate_rps"]), _number(row["capacity_rps"]), str(row["rejected"]),
            "pinned" if row["pinned"] else "auto",
        )
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s ago" if seconds < 100 else f"{seconds / 60:.0f} min ago"
