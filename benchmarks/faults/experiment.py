"""One fault under load: the requests as their clients saw them, and what follows from them."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from benchmarks.faults.faults import Fault, NotApplicable
from benchmarks.faults.goodput import goodput_before, goodput_by_second, seconds_to, share_kept
from benchmarks.faults.outcomes import ERRORS, FAILURES, Outcome, Seen, account, arrived_from, in_flight_at, seen_of
from benchmarks.faults.processes import Role
from benchmarks.faults.stack import Stack
from benchmarks.faults.stack_config import TARGETS
from loadgen.client import Exchange, Server
from loadgen.config import bench_config, draw_load
from loadgen.open_loop import OpenLoop

LENGTHS = "0.5:p16d16+0.5:p32d32"
FILL_S, FAULT_S, SETTLE_S, DEADLINE_S = 5, 20, 3, 30.0
_PREPARE_S = 4.0
_STRIKE_TIMEOUT_S = 950.0
_SHOWN_MESSAGES = 6


@dataclass
class Struck:
    """What a fault did. at_s: on the load's clock; replaced_s: until as many processes of the role run as before."""

    at_s: float = float(FAULT_S)
    hit: str = ""
    struck_s: float = 0.0
    replaced_s: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Span:
    """How long the load lasts, seconds; may be shortened while it runs. loop: once it has begun."""

    seconds: float
    loop: OpenLoop | None = None


async def offer(url: str, rate_rps: float, span: Span, seed: int) -> list[Exchange]:
    """Send the load, open loop and evenly spaced, and return every request with its outcome."""
    config = bench_config(
        url=url, duration_s=span.seconds, timeout_s=DEADLINE_S, slo={},
        workload={"lengths": LENGTHS, "rate_rps": rate_rps, "arrivals": "uniform", "seed": seed},
    )
    async with Server(url) as server:
        model = await server.model(None)
        requests = draw_load(config, None).requests
        span.loop = OpenLoop(server, model.id, timeout_s=DEADLINE_S)
        await span.loop.run(takewhile(lambda request: request.arrival_s < span.seconds, requests))
    return span.loop.exchanges


def capacity_rps(stack: Stack, offered_rps: float = 10.0, seconds: float = 30.0) -> float:
    """Requests/s that come back whole, within targets, while far more are offered; measured after the queue filled."""
    exchanges = asyncio.run(offer(stack.url, offered_rps, Span(seconds), seed=7))
    seen = [seen_of(exchange, TARGETS) for exchange in exchanges]
    from_s = seconds / 3
    ended = sum(one.outcome is Outcome.COMPLETE and from_s <= one.ended_s < seconds for one in seen)
    return ended / (seconds - from_s)


def run_fault(stack: Stack, fault: Fault, rate_rps: float, *, watch_s: int | None = None) -> dict[str, Any]:
    """One fault at FAULT_S under that load; JSON-ready. A fault that does not apply gives its reason under `na`."""
    return asyncio.run(_run_fault(stack, fault, rate_rps, watch_s or fault.watch_s))


async def _run_fault(stack: Stack, fault: Fault, rate_rps: float, watch_s: int) -> dict[str, Any]:
    span = Span(FAULT_S + watch_s)
    load = asyncio.create_task(offer(stack.url, rate_rps, span, seed=1))
    try:
        struck = await _strike(stack, fault, load, span)
    except NotApplicable as error:
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)
        return {"na": str(error)}
    exchanges = await load
    seen = [seen_of(exchange, TARGETS) for exchange in exchanges]
    return summary(seen, len(exchanges), struck.at_s, int(span.seconds)) | {
        "hit": struck.hit, "notes": struck.notes, "replaced_s": struck.replaced_s, "struck_s": struck.struck_s,
        "rate_rps": rate_rps, "requests": [one.as_dict() for one in seen],
    }


async def _strike(stack: Stack, fault: Fault, load: asyncio.Task[Any], span: Span) -> Struck:
    while span.loop is None:
        await asyncio.sleep(0.05)
        if load.done():
            load.result()
    loop = span.loop
    struck = Struck()
    await asyncio.sleep(FAULT_S - _PREPARE_S - loop.now_s())
    prepared = await asyncio.to_thread(fault.prepare, stack)
    before = await asyncio.to_thread(_counts, stack)
    await asyncio.sleep(FAULT_S - loop.now_s())
    struck.at_s = loop.now_s()
    watching = asyncio.create_task(_watch(stack, before, struck, loop))
    striking = asyncio.create_task(asyncio.to_thread(fault.strike, stack, prepared))
    if fault.lasts_s is not None:
        await asyncio.wait([striking])
        await asyncio.sleep(struck.at_s + fault.lasts_s - loop.now_s())
        try:
            await asyncio.to_thread(fault.relieve, stack, prepared)
        except Exception as error:  # the stack's trouble is part of the result
            struck.notes.append(f"not relieved: {error}")
    try:
        struck.hit = await asyncio.wait_for(striking, _STRIKE_TIMEOUT_S)
    except NotApplicable:
        raise
    except Exception as error:  # such as a redeploy that fails: the requests still count
        struck.hit, struck.notes = "failed", [*struck.notes, f"{type(error).__name__}: {error}"[:400]]
    struck.struck_s = loop.now_s() - struck.at_s
    if fault.after_done_s is not None:
        span.seconds = min(span.seconds, loop.now_s() + fault.after_done_s)
    await asyncio.wait([load])
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    return struck


def _counts(stack: Stack) -> Counter[Role]:
    return Counter(role for role, _ in stack.family.by_role() if role is not Role.OTHER)


async def _watch(stack: Stack, before: Counter[Role], struck: Struck, loop: OpenLoop) -> None:
    """Note when as many processes of every role run as before the fault; None unless some were missing."""
    missed = False
    while True:
        now = await asyncio.to_thread(_counts, stack)
        missing = before - now
        if missing:
            missed, struck.replaced_s = True, None
        elif missed and struck.replaced_s is None:
            struck.replaced_s = round(loop.now_s() - struck.at_s, 1)
        await asyncio.sleep(0.5)


def summary(requests: list[Seen], sent: int, fault_s: float, seconds: int) -> dict[str, Any]:
    """The numbers of the table. Counts of requests in flight at the fault and of new ones; seconds; requests/s."""
    by_second = goodput_by_second(requests, seconds)
    at = round(fault_s)
    before_rps = goodput_before(by_second, FILL_S, at, SETTLE_S)
    flying, new = in_flight_at(requests, fault_s), arrived_from(requests, fault_s)
    earlier = [one for one in requests if one.ended_s < fault_s]
    return {
        "sent": sent, "account": account(requests, sent), "fault_s": fault_s, "goodput_before_rps": before_rps,
        "seconds_to_90": seconds_to(by_second, before_rps, at), "share_kept": share_kept(by_second, before_rps, at),
        "goodput_by_second": by_second, "in_flight": _split(flying), "new": _split(new),
        "failed_before": sum(one.outcome in FAILURES for one in earlier),
        "messages": dict(Counter(
            one.message for one in (*flying, *new) if one.message and one.outcome in FAILURES
        ).most_common(_SHOWN_MESSAGES)),
    }


def _split(requests: list[Seen]) -> dict[str, int]:
    counts = Counter(one.outcome for one in requests)
    return {
        "requests": len(requests), "complete": counts[Outcome.COMPLETE], "rejected": counts[Outcome.REJECTED],
        "errors": sum(counts[one] for one in ERRORS), "errors_within": counts[Outcome.ERROR_WITHIN],
        "cut": counts[Outcome.CUT], "lost": counts[Outcome.LOST], "hung": counts[Outcome.HUNG],
        "failed": sum(counts[one] for one in FAILURES),
    }
