"""Half an hour of faults under overload: every request accounted for, flat memory, nothing left behind.

    python -m benchmarks.faults.soak --minutes 30 --quiet 15 --load 1.5 --out runs/soak [--capacity RPS]

One stack of Headrace, a fault a minute, then minutes of the same load without faults, in which every process lives long
enough for its memory to be watched. Writes soak.json; exit code 1 when a request has no proper end, a process's memory
grows by more than --grow, or something is left after the stop.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.faults.experiment import DEADLINE_S, Span, capacity_rps, offer
from benchmarks.faults.faults import FAULTS, NotApplicable
from benchmarks.faults.memory import MemoryLog, Slope, sample
from benchmarks.faults.outcomes import account, seen_of, to_the_last
from benchmarks.faults.processes import Role
from benchmarks.faults.stack import HEADRACE, Leftovers, Stack, StackFailed
from benchmarks.faults.stack_config import TARGETS

BETWEEN_S = 60.0
SAMPLE_S = 5.0
WARM_S = 300.0
_SETTLED_S = 90.0
ORDER = (
    "kill-engine-core", "hang-ups", "kill-controller", "kill-replica", "stop-controller", "redeploy",
    "kill-serve-controller", "stop-engine-core", "scale", "wrong-law",
)
"""Faults that leave the front door open: behind one that does not, a lost connection is no one's fault."""


async def soak(stack: Stack, rate_rps: float, seconds: float, quiet_s: float = 0.0) -> dict[str, Any]:
    """The load with its faults, and for quiet_s after them without any; JSON-ready."""
    memory, struck = MemoryLog(min(WARM_S, seconds / 4)), []
    begun_s = time.monotonic()
    async with _running(_sample(stack, memory)), _running(_strike(stack, seconds, struck)):
        exchanges = await offer(stack.url, rate_rps, Span(seconds + quiet_s), seed=5)
    seen = [seen_of(exchange, TARGETS) for exchange in exchanges]
    return {
        "minutes": (time.monotonic() - begun_s) / 60, "quiet_minutes": quiet_s / 60, "rate_rps": rate_rps,
        "sent": len(exchanges), "struck": struck,
        "account": account(seen, len(exchanges)), "good": sum(one.good for one in seen),
        "slopes": {name: dataclasses.asdict(slope) for name, slope in memory.slopes().items()},
    }


@asynccontextmanager
async def _running(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _sample(stack: Stack, memory: MemoryLog) -> None:
    begun_s = time.monotonic()
    while True:
        used = await asyncio.to_thread(lambda: sample(
            (role, process) for role, process in stack.family.by_role() if role is not Role.OTHER
        ))
        memory.add(time.monotonic() - begun_s, used)
        await asyncio.sleep(SAMPLE_S)


async def _strike(stack: Stack, seconds: float, struck: list[dict[str, Any]]) -> None:
    """A fault a minute, those that take longer one after the other; the last one early enough to be over in time."""
    begun_s = time.monotonic()
    for number, name in enumerate(cycle(ORDER), 1):
        due_s = number * BETWEEN_S - BETWEEN_S / 2
        if due_s + BETWEEN_S > seconds:
            return
        await asyncio.sleep(max(0.0, begun_s + due_s - time.monotonic()))
        fault = FAULTS[name]
        at_s = time.monotonic() - begun_s
        try:
            prepared = await asyncio.to_thread(fault.prepare, stack)
            hit = await asyncio.to_thread(fault.strike, stack, prepared)
            if fault.lasts_s is not None:
                await asyncio.sleep(min(fault.lasts_s, BETWEEN_S / 2))
                await asyncio.to_thread(fault.relieve, stack, prepared)
        except (NotApplicable, StackFailed) as error:
            hit = f"not struck: {str(error)[:200]}"
        struck.append({"at_s": at_s, "fault": name, "hit": hit})
        print(f"[{at_s:5.0f} s] {name}: {hit}", flush=True)


def verdict(result: dict[str, Any], left: Leftovers, grow_mib_per_hour: float) -> list[str]:
    """What is not as it has to be, a line each. A slope counts when its whole interval is above the limit."""
    slopes = {name: Slope(**one) for name, one in result["slopes"].items()}
    found = [] if to_the_last(result["account"]) else [f"not accounted for to the last: {result['account']}"]
    found += [
        f"{name} grows by {slope.mib_per_hour:.1f} MiB/h ({slope.low:.1f} to {slope.high:.1f})"
        for name, slope in slopes.items() if slope.low > grow_mib_per_hour
    ]
    kinds = ("processes", "shared_memory", "sockets", "files")
    return found + [f"left behind: {kind}: {getattr(left, kind)}" for kind in kinds if getattr(left, kind)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="with faults")
    parser.add_argument("--quiet", type=float, default=15.0, help="minutes without faults after them")
    parser.add_argument("--load", type=float, default=1.5, help="of capacity")
    parser.add_argument("--capacity", type=float, help="requests/s of two replicas; left out: measured")
    parser.add_argument("--grow", type=float, default=30.0, help="MiB per hour that a process may grow by")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    stack, result, left = Stack(HEADRACE, args.out), {}, None
    try:
        stack.start()
        capacity = args.capacity or capacity_rps(stack)
        print(f"capacity {capacity:.2f} requests/s; a request has {DEADLINE_S:g} s", flush=True)
        result = asyncio.run(soak(stack, args.load * capacity, args.minutes * 60, args.quiet * 60))
        try:
            result["healthy_after_s"] = stack.wait_until_healthy(_SETTLED_S)
        except StackFailed as error:
            result["unhealthy"] = str(error)[:600]
    finally:
        left = stack.stop()
    result |= {"load": args.load, "capacity_rps": capacity, "left": dataclasses.asdict(left)}
    (args.out / "soak.json").write_text(json.dumps(result, indent=1))
    for name, slope in result["slopes"].items():
        print(f"{name}: {slope['mib_per_hour']:+.1f} MiB/h ({slope['low']:+.1f} to {slope['high']:+.1f})")
    print(result["account"])
    wrong = verdict(result, left, args.grow) + ([result["unhealthy"]] if "unhealthy" in result else [])
    print("\n".join(wrong) or "as it has to be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
