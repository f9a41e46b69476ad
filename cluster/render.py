"""Tables for people. Programs use `--json`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def plain(text: str) -> str:
    """Text with rich's markup escaped."""
    return escape(text)


def status_tables(state: dict[str, Any]) -> Iterator[Any]:
    """`headrace status`."""
    # One space between columns: with ids of 8 and the longest policy name it fits 80.
    table = Table(title=f"{state['application']}: replicas", box=box.SIMPLE, pad_edge=False, padding=0)
    for column in ("replica", "ver", "policy", "tuning", "running", "waiting", "held", "KV", "preempted", "rejected"):
        table.add_column(column, no_wrap=True)
    for name, replica in state["replicas"].items():
        if not replica["reachable"]:
            table.add_row(name, "–", Text("unreachable", style="red"))
            continue
        thresholds = replica["thresholds"]
        table.add_row(
            name, str(thresholds["version"]), thresholds["policy"], "pinned" if thresholds["pinned"] else "auto",
            _of(replica["running"], thresholds["max_running"]), str(replica["waiting"]), str(replica["held"]),
            f"{replica['kv_used_fraction']:.0%}", str(replica["preemptions"]), str(replica["counters"]["rejected"]),
        )
    yield table
    yield _fluid_table(state["replicas"])
    forecasts = {name: replica.get("forecast") for name, replica in state["replicas"].items()}
    if any(forecasts.values()):
        yield _forecast_table({name: forecast for name, forecast in forecasts.items() if forecast})
    models = {replica["model"] for replica in state["replicas"].values()}
    for name, replica in state["replicas"].items():
        said = replica["decision"] if replica["reachable"] else f"not reachable: {replica['reason']}"
        yield Text(f"{name} ({replica['model']}): {said}" if len(models) > 1 else f"{name}: {said}")
        if replica.get("deviation"):
            yield Text(f"{name} {replica['deviation']['text']}", style="yellow")
        if replica["reachable"] and replica["counters"]["completed"]:
            yield Text(f"{name}: {_kept(replica['counters'])}")
    controller = state["controller"]
    for model, pin in controller.get("pins", {}).items():
        at = datetime.fromtimestamp(pin["at_unix_s"], UTC).astimezone().isoformat(" ", "seconds")
        why = f": {pin['reason']}" if pin["reason"] else ""
        yield Text(f"{model}: pinned {at} by {pin['by'] or 'an operator'} ({pin['key']}){why}")
    for model, wanted in controller.get("scaling", {}).items():
        yield Text(f"{model}: {wanted['replicas']} replicas wanted. {wanted['reason']}")
    period = f"every {controller['period_s']:g} s" if controller["alive"] else controller["reason"]
    yield Text(f"controller: {'running, ' if controller['alive'] else ''}{period}")


def _kept(counters: dict[str, int]) -> str:
    """Targets missed by the completed requests, and the result of the rejection audit."""
    served = counters["completed"]
    missed = ", ".join(f"{name.upper()} {counters[f'{name}_misses']}" for name in ("ttft", "tpot", "latency"))
    said = f"of {served} served, missed {missed}"
    if counters["audited"]:
        said += f"; of {counters['audited']} served to audit rejections, {counters['audited_met']} met every target"
    return said


def _fluid_table(replicas: dict[str, Any]) -> Table:
    table = Table(title="fluid model", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("replica", "rate /s", "load", "iteration", "memory", "of", "time model R²"):
        table.add_column(column, no_wrap=True)
    for name, replica in replicas.items():
        fluid, time_model = replica.get("fluid") or {}, replica.get("time_model") or {}
        rate = replica.get("rate_rps")
        table.add_row(
            name, number(rate, ".2f"), number(fluid.get("load"), ".2f"),
            number(fluid.get("iteration_time_s"), ".3f", " s"), number(fluid.get("memory_tokens"), ".0f"),
            number(fluid.get("kv_capacity_tokens"), ".0f"), number(time_model.get("r2"), ".3f"),
        )
    return table


def _forecast_table(forecasts: dict[str, Any]) -> Table:
    table = Table(title="requests/s within the targets", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("replica", "arrive", "good", "possible", "bottleneck", "queue limit", "known from"):
        table.add_column(column, no_wrap=True)
    for name, forecast in forecasts.items():
        known = "prior" if forecast["cold"] else f"{forecast['survival_samples']:.0f} outputs"
        table.add_row(
            name, _interval(forecast["rate_rps"], ".2f"), number(forecast["goodput_rps"], ".2f"),
            number(forecast["capacity_rps"], ".2f"), forecast["bottleneck"],
            "any" if forecast["queue_limit"] is None else str(forecast["queue_limit"]), known,
        )
    return table


def events_table(answer: dict[str, Any]) -> Iterator[Any]:
    """`headrace events`, the newest last."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("at", "replica", "version", "taken"):
        table.add_column(column, no_wrap=True)
    table.add_column("reason")
    for event in answer["events"]:
        at = datetime.fromtimestamp(event["at_unix_s"], UTC).astimezone().isoformat(" ", "seconds")
        versions = event["kind"] if event["new_version"] is None else f"{event['old_version']} → {event['new_version']}"
        taken = "yes" if event["accepted"] else "no"
        about = event["replica"] or event["model"]
        table.add_row(at, about, versions, taken, plain(event["reason"]))
    if answer["events"]:
        yield table
    else:
        yield Text("no change of thresholds yet" if answer["controller"]["alive"] else answer["controller"]["reason"])


def thresholds_table(result: dict[str, Any]) -> Iterator[Any]:
    """`headrace thresholds get`."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("replica", "version", "policy", "n", "most running", "token budget", "longest hold", "tuning"):
        table.add_column(column, no_wrap=column in ("replica", "policy", "tuning"))
    for name, entry in result["replicas"].items():
        if "error" in entry:
            table.add_row(name, Text(entry["error"], style="red"))
            continue
        table.add_row(
            name, str(entry["version"]), entry["policy"], _counts(entry), _or_engine(entry["max_running"]),
            _or_engine(entry["token_budget"]), f"{entry['max_hold_s']:g} s", "pinned" if entry["pinned"] else "auto",
        )
    yield table


def acks_table(result: dict[str, Any]) -> Iterator[Any]:
    """The answer to a change."""
    table = Table()
    for column in ("replica", "active version", "reason"):
        table.add_column(column)
    for name, ack in result["replicas"].items():
        table.add_row(name, str(ack["version"]), plain(ack["reason"]))
    yield table
    if "pin" in result and not result["pin"]["kept"]:
        yield Text(result["pin"]["reason"], style="yellow")


def settings_table(answer: dict[str, Any]) -> Iterator[Any]:
    """`headrace settings get`: one column a model."""
    models = answer["models"]
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("setting", *models):
        table.add_column(column)
    flat = {name: dict(_flat(model["settings"])) for name, model in models.items()}
    for key in dict.fromkeys(key for values in flat.values() for key in values):
        table.add_row(key, *("–" if values.get(key) is None else plain(str(values[key])) for values in flat.values()))
    yield table
    for name, model in models.items():
        if changed := model["changed"]:
            at = datetime.fromtimestamp(changed["at_unix_s"], UTC).astimezone().isoformat(" ", "seconds")
            why = f": {changed['reason']}" if changed["reason"] else ""
            yield Text(f"{name}: changed since it was deployed, {at} by {changed['by'] or changed['key']}{why}")


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def settings_answer_table(answer: dict[str, Any]) -> Iterator[Any]:
    """The answer to a change of settings."""
    for name, changed in answer["models"].items():
        yield Text(f"{name}: " + ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items()))
    if not answer["models"]:
        yield Text("nothing changed")
    for name, ack in answer["replicas"].items():
        if not ack["accepted"]:
            yield Text(f"{name}: not taken: {ack['reason']}", style="red")


def doctor_table(result: dict[str, Any]) -> Iterator[Any]:
    """`headrace doctor`."""
    table = Table()
    for column in ("check", "", "found", "fix"):
        table.add_column(column)
    for finding in result["findings"]:
        mark = Text("ok", style="green") if finding["ok"] else Text("wrong", style="red")
        table.add_row(finding["name"], mark, plain(finding["found"]), plain(finding["mend"]))
    yield table


def _counts(entry: dict[str, Any]) -> str:
    types = [f"{item['name']}: {'open' if item['n'] is None else item['n']}" for item in entry["types"]]
    segments = [f"to {item['end_output_tokens']}: {item['total']}" for item in entry["segments"]]
    return ", ".join(types + segments) or "none"


def _of(value: int, most: int | None) -> str:
    return str(value) if most is None else f"{value} of {most}"


def _or_engine(value: int | None) -> str:
    return "engine's own" if value is None else str(value)


def _interval(estimate: dict[str, float] | None, form: str, unit: str = "") -> str:
    """An estimate with half the width of its interval."""
    if estimate is None or estimate["low"] is None or estimate["high"] is None:
        return number(estimate and estimate["value"], form, unit)
    return f"{estimate['value']:{form}} ± {(estimate['high'] - estimate['low']) / 2:{form}}{unit}"


def number(value: float | None, form: str, unit: str = "") -> str:
    """The value in this form with its unit; a dash for None."""
    return "–" if value is None else f"{value:{form}}{unit}"
