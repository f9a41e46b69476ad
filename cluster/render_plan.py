"""Tables of `headrace plan` and `headrace profile`, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cluster.render import number, plain
from scheduler.model.profiles import Profile

_TERMS = (
    ("floor, ms", "floor_s", 1e3), ("d0, ms", "d0_s", 1e3), ("d2, µs per prompt token", "d2_s_per_prefill_token", 1e6),
    ("d3, µs per decode token", "d3_s_per_decode_token", 1e6), ("d1, ns per KV token", "d1_s_per_kv_token", 1e9),
)


def profile_tables(profile: Profile) -> Iterator[Any]:
    """`headrace profile`: the law, with its interval where it is an estimate, and where it comes from."""
    yield Text(f"{profile.name}: {profile.description}")
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("")
    interval = profile.interval
    for column in ("value", *(("low", "high") if interval else ())):
        table.add_column(column, justify="right")
    for name, field, times in _TERMS:
        models = [profile.time_model, *((interval.fast, interval.slow) if interval else ())]
        table.add_row(name, *(f"{times * getattr(model, field):.4g}" for model in models))
    bounds = (interval.kv_low, interval.kv_high) if interval else ()
    table.add_row("KV cache, tokens", *(str(tokens) for tokens in (profile.kv_capacity_tokens, *bounds)))
    yield table
    for line in profile.provenance:
        yield Text(f"- {line}")


def plan_tables(plan: dict[str, Any]) -> Iterator[Any]:
    """`headrace plan`."""
    table = Table(title="fluid equilibrium of the whole rate on one replica", show_header=False)
    verdict = "stable, fits memory" if plan["stable"] and plan["fits_memory"] else plan["reason"]
    rows = [
        ("verdict", verdict),
        ("load", f"{plan['load']:.3f}"),
        ("iteration time", number(plan["iteration_time_s"], ".4f", " s")),
        ("memory", f"{number(plan['memory_tokens'], '.0f')} of {plan['kv_capacity_tokens']} tokens"),
        ("throughput", f"{plan['throughput_tokens_per_s']:.1f} output tokens/s"),
        ("critical rate", f"{plan['critical_rate_scale']:.3f} times the given one, limited by {plan['limit']}"),
        ("running", f"{number(plan['in_service'], '.1f')} (at most {plan['thresholds']['max_in_service']})"),
    ]
    for name, value in rows:
        table.add_row(name, plain(value))
    yield from _sizing_tables(plan["sizing"])
    yield table
    for policy in ("wait", "nested_wait"):
        solution = plan["thresholds"][policy]
        if "infeasible" in solution:
            yield Text(f"{policy}: infeasible, {solution['infeasible']}")
        elif policy == "wait":
            yield Text("wait: " + ", ".join(f"n({name}) = {n}" for name, n in solution["n"].items()))
        else:
            pairs = zip(solution["boundaries"], solution["n"], strict=True)
            yield Text("nested_wait: " + ", ".join(f"n(to {end}) = {n:.3g}" for end, n in pairs))


def _sizing_tables(sizing: dict[str, Any]) -> Iterator[Any]:
    """How many replicas of each candidate, and what one more would buy."""
    stated = {"TTFT": "ttft_s", "TPOT": "tpot_s", "latency": "latency_s"}
    seconds = sizing["targets"]
    targets = ", ".join(f"{name} {seconds[key]:g} s" for name, key in stated.items() if seconds[key])
    title = f"replicas for {sizing['offered_rps']:.3g} requests/s, {targets or 'no targets'}"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("on", "replicas", "GPUs", "one serves", "binds", "load", "iteration", "KV tokens"):
        table.add_column(column, no_wrap=column != "on", justify="left" if column in ("on", "binds") else "right")
    for one in sizing["candidates"]:
        now = one["now"] or {}
        table.add_row(
            one["name"], _replicas(one), number(one["accelerators_in_all"], "d"), number(one["most_rps"], ".3g", "/s"),
            plain(_binds(one)), number(now.get("load"), ".2f"), number(now.get("iteration_s"), ".4f", " s"),
            number(one["kv_capacity_tokens"], "d"),
        )
    yield table
    for one in sizing["candidates"]:
        if said := one["error"] or one["reason"]:
            yield Text(f"{one['name']}: {said}")
        if one["one_more"]:
            yield Text(f"{one['name']}: {_one_more(one)}")
    if any(one["estimated"] for one in sizing["candidates"]):
        yield Text("in brackets: the ends of an estimate's interval; nothing was measured")


def _binds(one: dict[str, Any]) -> str:
    if one["binds"] in (None, one["limit"]):
        return one["binds"] or "–"
    return f"{one['binds']} ({one['limit']})"


def _replicas(one: dict[str, Any]) -> str:
    if not one["estimated"] or one["replicas"] is None:
        return "none" if one["replicas"] is None else str(one["replicas"])
    low, high = (one[key] for key in ("replicas_low", "replicas_high"))
    return f"{one['replicas']} ({low or 'none'} to {high or 'none'})"


def _one_more(one: dict[str, Any]) -> str:
    now, more = one["now"], one["one_more"]
    said = f"one more: load {number(now['load'], '.2f')} → {number(more['load'], '.2f')}, iterations of "
    said += f"{number(1e3 * now['iteration_s'], '.1f')} → {number(1e3 * more['iteration_s'], '.1f')} ms"
    if one["most_rps"] is not None:
        said += f", room for {more['replicas'] * one['most_rps']:.3g} requests/s"
    return said
