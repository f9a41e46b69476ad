"""What Headrace costs the engine: CPU time of schedule() beside plain vLLM's, and the live channel's answer times.

    python benchmarks/schedule_cost.py [--running 256] [--waiting 1000] [--rounds 15]

Both schedulers are vLLM's real class with its real block manager in one process, stepped in turn, so that the machine's
drift hits both alike. Prints JSON: medians, and the ratio pair by pair with its spread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from engine_harness import Engine
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from scheduler.channel import ChannelClient, ChannelServer, new_endpoint, remove_endpoint
from scheduler.thresholds import Thresholds
from scheduler.vllm_scheduler import HeadraceScheduler

POLICIES: dict[str, dict[str, Any]] = {
    "fcfs, cap": {"policy": "fcfs"},
    "wait": {"policy": "wait", "types": [{"name": "all", "n": 8}]},
    "nested_wait": {
        "policy": "nested_wait",
        "segments": [{"end_output_tokens": 1000, "total": 8000}, {"end_output_tokens": 2000, "total": 4000}],
    },
    # A replica whose memory is full, so that it looks at everybody again and again, and nobody is late or useless.
    "fluid": {
        "policy": "fluid",
        "pace": {
            "law": {"d0_s": 4e-3, "d1_s_per_kv_token": 4e-7, "d2_s_per_prefill_token": 6e-5,
                    "d3_s_per_decode_token": 6e-5, "floor_s": 0.011},
            "survival": [[0, 1.0], *([100 * n, 1.0 - n / 10] for n in range(1, 11))], "kv_limit_tokens": 1,
            "iteration_s": 0.05, "ttft_s": 1e6, "queue_requests": 1_000_000, "prompt_flow_tokens": 200.0,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    plain_us: list[float] = []
    result: dict[str, Any] = {"running": args.running, "waiting": args.waiting, "schedule_us": {}, "ratio": {}}
    for name, thresholds in POLICIES.items():
        cap = {} if name == "fluid" else {"max_in_service": args.running}
        ours = loaded(HeadraceScheduler, args, thresholds | cap)
        plain = loaded(AsyncScheduler, args, None)  # anew, so that both have the same tokens behind them
        pairs = [(step_us(ours), step_us(plain)) for _ in range(args.rounds)]
        ratios = sorted(a / b for a, b in pairs)
        plain_us += [b for _, b in pairs]
        result["schedule_us"][name] = round(statistics.median(a for a, _ in pairs), 1)
        result["ratio"][name] = {
            "median": round(statistics.median(ratios), 3), "min": round(ratios[0], 3), "max": round(ratios[-1], 3)
        }
    result["schedule_us"]["plain vLLM"] = round(statistics.median(plain_us), 1)
    ours = loaded(HeadraceScheduler, args, POLICIES["wait"] | {"max_in_service": args.running})
    result["thresholds_poll_us"] = round(poll_us(ours), 3)
    result["channel_ms_while_stepping"] = channel_ms(ours)
    print(json.dumps(result, indent=2))


def loaded(cls: type[AsyncScheduler], args: argparse.Namespace, thresholds: dict[str, Any] | None) -> Engine:
    """An engine with that many decodes running and the rest waiting."""
    engine = Engine(
        cls, blocks=16 * args.running, thresholds=thresholds, max_num_seqs=args.running, max_num_batched_tokens=8192
    )
    if thresholds is not None:
        engine.apply({"version": 1, "policy": "fcfs", "max_in_service": args.running})
    for index in range(args.running + args.waiting):
        engine.add(f"r{index}", prompt=32, output=900)
    while len(engine.scheduler.running) < args.running:
        engine.step()
    if thresholds is not None:
        engine.apply(thresholds | {"version": 2})
    for _ in range(5):
        engine.step()
    return engine


def step_us(engine: Engine, steps: int = 10) -> float:
    """Mean CPU microseconds of one schedule() over `steps` iterations."""
    scheduler, inner, spent = engine.scheduler, engine.scheduler.schedule, 0.0

    def timed(*positional: Any) -> Any:
        nonlocal spent
        begun = time.process_time_ns()
        output = inner(*positional)
        spent += time.process_time_ns() - begun
        return output

    scheduler.schedule = timed
    for _ in range(steps):
        engine.step()
    scheduler.schedule = inner
    return spent / steps / 1000


def poll_us(engine: Engine, times: int = 100_000) -> float:
    """Microseconds to learn which thresholds are in force: what the live channel adds to every iteration."""
    current = engine.scheduler.in_force.current
    begun = time.perf_counter_ns()
    for _ in range(times):
        current()
    return (time.perf_counter_ns() - begun) / times / 1000


def channel_ms(engine: Engine, questions: int = 100) -> dict[str, float]:
    """From offering thresholds to the acknowledgement that they are in force, while the engine steps."""
    endpoint, done = new_endpoint(), threading.Event()
    server = ChannelServer(endpoint, engine.scheduler.in_force.offer, engine.scheduler.telemetry)
    times: list[float] = []

    async def ask() -> None:
        client = ChannelClient(endpoint)
        for _ in range(questions):
            begun = time.perf_counter()
            ack = await client.apply(Thresholds(policy="fcfs", version=0))
            assert ack.accepted, ack.reason
            times.append((time.perf_counter() - begun) * 1000)
        client.close()

    thread = threading.Thread(target=lambda: (asyncio.run(ask()), done.set()))
    thread.start()
    while not done.is_set():
        engine.step()
    thread.join()
    server.close()
    remove_endpoint(endpoint)
    times.sort()
    return {
        "p50": round(times[len(times) // 2], 2), "p99": round(times[int(len(times) * 0.99)], 2),
        "max": round(times[-1], 2),
    }


if __name__ == "__main__":
    main()
