"""Faults under load.

    python -m benchmarks.faults --fault all --load 0.7,1.5 --stack headrace,ray --runs runs/faults [--json FILE]

Each fault is put into a running stack at a known time under an open-loop load; every request's outcome is kept. Results
lie in --runs, one file a fault, load and stack; what is there is not run again, so a run that was stopped goes on where
it was. The stack is started once for all faults that need the same one, and anew after one that it does not survive.
`python benchmarks/evidence/faults_page.py` writes the page.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.experiment import Span, capacity_rps, offer, run_fault
from benchmarks.faults.faults import FAULTS, Fault
from benchmarks.faults.stack import STACKS, Stack, StackFailed
from benchmarks.faults.stack_config import Settings
from scheduler.config_errors import CommandFailed

RECOVERY_S = 90.0
LEFT = ("processes", "shared_memory", "sockets", "files")
CAPACITY_FILE = "capacity.json"
_begun = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", default="all", help=f"all, or some of {', '.join(FAULTS)}")
    parser.add_argument("--load", default="0.7,1.5", help="of capacity, several with commas")
    parser.add_argument("--stack", default=",".join(STACKS), help="headrace, ray, or both")
    parser.add_argument("--capacity", type=float, help="requests/s of two replicas; left out: measured once")
    parser.add_argument("--learn", type=float, default=25.0, help="seconds of requests after each start, not measured")
    parser.add_argument("--watch", type=int, help="seconds of load after the fault, instead of each fault's own")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no fault is begun")
    parser.add_argument("--runs", type=Path, default=Path("runs/faults"))
    parser.add_argument("--json", type=Path, help="all results of --runs, without their requests, in one file")
    args = parser.parse_args()
    names = list(FAULTS) if args.fault == "all" else args.fault.split(",")
    for name, allowed in [*((n, FAULTS) for n in names), *((n, STACKS) for n in args.stack.split(","))]:
        if name not in allowed:
            parser.error(f"{name!r} is unknown; allowed: {', '.join(allowed)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the stack under way is stopped, too
    args.runs.mkdir(parents=True, exist_ok=True)
    loads = [float(load) for load in args.load.split(",")]
    failed = 0
    chosen = [FAULTS[name] for name in names]
    for kind, need in product(args.stack.split(","), dict.fromkeys(stack_needed(fault) for fault in chosen)):
        alike = [fault for fault in chosen if stack_needed(fault) == need and kind in fault.stacks]
        todo = [(load, fault) for load, fault in product(loads, alike)
                if not result_file(args.runs, kind, load, fault).exists()]
        if todo:
            failed += run_group(args, kind, todo)
    if args.json:
        args.json.write_text(json.dumps([one | {"requests": None} for one in results(args.runs)], indent=1))
    sys.exit(bool(failed))


def stack_needed(fault: Fault) -> tuple[bool, Settings]:
    """Faults that need the same can share a start: on two nodes, and with which settings."""
    return fault.two_nodes, Settings(faulty_channel=fault.faulty_channel, ingresses=fault.ingresses)


def run_group(args: argparse.Namespace, kind: str, todo: list[tuple[float, Fault]]) -> int:
    """Faults that need the same kind of stack, on as few starts of it as they leave it alive; how many did not run."""
    stack: Stack | None = None
    failed = 0
    try:
        for load, fault in todo:
            if time.monotonic() - _begun > args.budget:
                say(f"not begun: {fault.name} and what follows")
                return failed
            try:
                stack = stack or begin(args, kind, fault)
                say(f"{kind} at {load:g}: {fault.title}")
                result = run_fault(stack, fault, load * args.capacity, watch_s=args.watch)
            except (StackFailed, CommandFailed, psutil.Error) as error:
                failed += 1
                say(f"{fault.name} did not run: {error}")
                stack = stop(stack)
                continue
            result |= {"stack": kind, "load": load, "fault": fault.name, "capacity_rps": args.capacity}
            kept = result_file(args.runs, kind, load, fault)
            kept.write_text(json.dumps(result))
            say(f"  {line_of(result)}")
            try:
                result["healthy_after_s"] = stack.wait_until_healthy(RECOVERY_S)
            except StackFailed as error:
                result["unhealthy"] = str(error)[:600]
                say(f"  not healthy: {result['unhealthy']}")
                stack = stop(stack)
            kept.write_text(json.dumps(result))
    finally:
        stop(stack)
    return failed


def begin(args: argparse.Namespace, kind: str, fault: Fault) -> Stack:
    """A stack that has served some requests; the capacity is measured on the first one and kept with the runs."""
    say(f"starting {kind}{', two nodes' if fault.two_nodes else ''}")
    two_nodes, settings = stack_needed(fault)
    stack = Stack(kind, args.runs / "logs", settings, two_nodes=two_nodes)
    try:
        stack.start()
        kept = args.runs / CAPACITY_FILE
        if args.capacity is None and kept.exists():
            args.capacity = json.loads(kept.read_text())["capacity_rps"]
        asyncio.run(offer(stack.url, args.capacity or 3.0, Span(args.learn), seed=99))
        if args.capacity is None:
            args.capacity = round(capacity_rps(stack), 2)
            kept.write_text(json.dumps({"capacity_rps": args.capacity, "stack": kind}))
            say(f"capacity: {args.capacity:g} requests/s")
        stack.wait_until_healthy(RECOVERY_S)
    except BaseException:
        stop(stack)
        raise
    return stack


def stop(stack: Stack | None) -> None:
    if stack is not None:
        left = stack.stop()
        kinds = {kind: found for kind in LEFT if (found := getattr(left, kind))}
        shown = "; ".join(f"{len(found)} {kind}: {', '.join(found[:3])}" for kind, found in kinds.items())
        say(f"stopped, exit code {left.exit_code}; left behind: {shown or 'nothing'}")


def result_file(runs: Path, kind: str, load: float, fault: Fault) -> Path:
    return runs / f"{kind}-{load:g}-{fault.name}.json"


def results(runs: Path) -> list[dict[str, Any]]:
    """All results kept in a folder."""
    found = [json.loads(path.read_text()) for path in sorted(runs.glob("*-*-*.json"))]
    return [one for one in found if "fault" in one]


def line_of(result: dict[str, Any]) -> str:
    if "na" in result:
        return f"n/a: {result['na']}"
    flying, new = result["in_flight"], result["new"]
    return (
        f"{result['hit']}; in flight {flying['requests']}: complete {flying['complete']}, errors {flying['errors']}, "
        f"cut {flying['cut']}, lost {flying['lost']}, hung {flying['hung']}, 429 {flying['rejected']}; "
        f"new {new['requests']}: failed {new['failed']} (cut {new['cut']}, lost {new['lost']}, hung {new['hung']}), "
        f"429 {new['rejected']}; before {result['goodput_before_rps']:.2f}/s, to 90 % {result['seconds_to_90']} s, "
        f"kept {result['share_kept']}, replaced {result['replaced_s']} "
        f"{result['notes'] or ''} {result['messages'] or ''}"
    )


def say(line: str) -> None:
    print(f"[{time.monotonic() - _begun:5.0f} s] {line}", flush=True)


if __name__ == "__main__":
    main()
