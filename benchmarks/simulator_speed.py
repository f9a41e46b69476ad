"""How fast the simulator is, and where its time goes: vLLM's scheduler, our policy, the simulator's own code.

    python benchmarks/simulator_speed.py [--trace FILE.csv]

Prints JSON. Without --trace the long run takes made-up conversation lengths instead of a trace's. CPU seconds; the
split comes from runs of their own with every call to vLLM's scheduler timed, the totals from runs without.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from scheduler.vllm_scheduler import HeadraceScheduler
from simulator.config import simulation_config
from simulator.engine.replica import VirtualReplica
from simulator.run import simulate

CONVERSATION_LIKE = "0.5:p300d150+0.3:p1200d250+0.2:p2000d350"
FLATNESS_REQUESTS = (2_000, 20_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="CSV for the long run (Azure conversation)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    simulate(simulation_config({"lengths": "p512d20", "requests": 50, "rate_rps": 20.0}))  # imports and first calls
    short = {"lengths": "p512d20", "requests": 3000, "rate_rps": 23.0, "seed": 1, "solve_once": True}
    source = {"trace": args.trace} if args.trace else {"lengths": CONVERSATION_LIKE}
    long = source | {"requests": 20_000, "rate_rps": 4.0, "seed": 1, "solve_once": True}
    result = {
        "p512d20_3000_wall_s": {
            policy: sorted(round(wall_s(short | {"policy": policy}), 2) for _ in range(args.repeats))
            for policy in ("vllm", "fcfs", "wait", "nested-wait")
        },
        "conversation_20000_wall_s": {
            policy: round(wall_s(long | {"policy": policy}), 1) for policy in ("vllm", "fcfs")
        },
        "split_us_per_iteration": {
            name: {policy: split(options | {"policy": policy}) for policy in ("vllm", "fcfs", "wait", "nested-wait")}
            for name, options in {"p512d20": short, "conversation": long | {"requests": 3000}}.items()
        },
        "peak_rss_mib": flatness(),
    }
    print(json.dumps(result, indent=2))


def wall_s(options: dict[str, Any]) -> float:
    gc.collect()
    summary: dict[str, Any] = simulate(simulation_config(options))
    return float(summary["wall_s"])


def split(options: dict[str, Any]) -> dict[str, float]:
    """Microseconds of CPU per iteration by the code that spends them: vLLM, policy, simulator."""
    spent = {"scheduler": 0, "request": 0, "with policy": 0, "inside": 0}
    patched = [
        *((AsyncScheduler, name, "scheduler") for name in ("schedule", "update_from_output", "add_request")),
        *((HeadraceScheduler, name, "with policy") for name in ("schedule", "update_from_output", "add_request")),
        (Request, "__init__", "request"), (VirtualReplica, "left", "inside"),
    ]
    saved = [(cls, name, cls.__dict__.get(name)) for cls, name, _ in patched]
    for cls, name, owner in patched:
        setattr(cls, name, timed(getattr(cls, name), spent, owner))
    try:
        gc.collect()
        begun = time.process_time_ns()
        summary = simulate(simulation_config(options))
        total = time.process_time_ns() - begun
    finally:
        for cls, name, method in saved:
            if method is None:
                delattr(cls, name)
            else:
                setattr(cls, name, method)
    iterations = summary["iterations"]
    ours = max(0, spent["with policy"] - spent["scheduler"])
    vllm = spent["scheduler"] + spent["request"] - spent["inside"]  # our bookkeeping runs inside vLLM's calls
    own = total - vllm - ours
    return {
        "vllm": round(vllm / iterations / 1000, 1), "policy": round(ours / iterations / 1000, 1),
        "simulator": round(own / iterations / 1000, 1), "policy_and_simulator_over_vllm": round((ours + own) / vllm, 3),
    }


def timed(method: Callable[..., Any], spent: dict[str, int], owner: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.process_time_ns()
        try:
            return method(*args, **kwargs)
        finally:
            spent[owner] += time.process_time_ns() - begun

    return call


def flatness() -> dict[str, float]:
    """Peak RSS of the process after runs of so many requests, the largest last."""
    peaks = {}
    for requests in FLATNESS_REQUESTS:
        simulate(simulation_config({"lengths": "p64d8", "requests": requests, "rate_rps": 40.0}))
        peaks[str(requests)] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    return peaks


if __name__ == "__main__":
    main()
