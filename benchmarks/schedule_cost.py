"""What Headrace costs the engine: CPU time of schedule() beside plain vLLM's, and the live channel's answer times.

    python benchmarks/schedule_cost.py [--running 256] [--waiting 1000] [--rounds 30] [--only REGEX]

Both schedulers are vLLM's real class with its real block manager in one process, stepped in turn, one iteration each,
so that the machine's drift hits both alike. Prints JSON: medians of CPU time; the ratio round by round (a round is ten
iterations) with its quartiles; and `own`: our schedule() over that part of it which is vLLM's, which hardly depends on
the machine's load but leaves out what vLLM's part costs more behind an admission queue.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("", "tests"))  # tests/ has like folders

from engine_harness import Engine
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from scheduler.engine.channel import ChannelClient, ChannelServer, new_endpoint, remove_endpoint
from scheduler.thresholds import Thresholds
from scheduler.vllm_scheduler import HeadraceScheduler

PARAMS: dict[str, Any] = {
    "time_model": {
        "d0_s": 4e-3,
        "d1_s_per_kv_token": 4e-9,
        "d2_s_per_prefill_token": 6e-5,
        "d3_s_per_decode_token": 6e-5,
        "floor_s": 0.011,
    },
    "survival": [[0, 1.0], *([100 * n, 1.0 - n / 10] for n in range(1, 11))],
    "kv_limit_tokens": 10**9,
    "iteration_s": 0.05,
    "tpot_s": 0.05,
    "ttft_s": 1e6,
    "queue_limit": 1_000_000,
    "prompt_flow_tokens": 200.0,
}
POLICIES: dict[str, dict[str, Any]] = {
    "fcfs, cap": {"policy": "fcfs"},
    "wait": {"policy": "wait", "types": [{"name": "all", "n": 8}]},
    "nested_wait": {
        "policy": "nested_wait",
        "segments": [{"end_output_tokens": 1000, "total": 8000}, {"end_output_tokens": 2000, "total": 4000}],
    },
    # Memory is full, so that all requests are looked at again and again; none is late or beyond the queue limit.
    "fluid, memory binds": {"policy": "fluid", "fluid": PARAMS | {"kv_limit_tokens": 1}},
    "fluid, slots bind": {"policy": "fluid", "fluid": PARAMS},
    "fluid, slots bind, prompts of 16 000 tokens, a shared prefix": {"policy": "fluid", "fluid": PARAMS},
}
_LONG, _SHARED = 16_000, 8_000
"""Prompt tokens of the long prompts, and of these what one in eight of the requests has in common."""
_ITERATIONS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="only cases with a name that matches this regular expression")
    args = parser.parse_args()
    result: dict[str, Any] = {"running": args.running, "waiting": args.waiting, "schedule": {}}
    for name, thresholds in POLICIES.items():
        if not re.search(args.only, name):
            continue
        cap = {} if name.startswith("fluid") else {"max_running": args.running}
        long = "16 000" in name
        ours = loaded(HeadraceScheduler, args, thresholds | cap, long=long)
        plain = loaded(AsyncScheduler, args, None, long=long)  # anew, so that both have the same tokens behind them
        result["schedule"][name] = compared(ours, plain, args.rounds)
    ours = loaded(HeadraceScheduler, args, POLICIES["wait"] | {"max_running": args.running})
    result["thresholds_poll_us"] = round(poll_us(ours), 3)
    result["channel_ms_while_stepping"] = channel_ms(ours)
    print(json.dumps(result, indent=2))


def loaded(
    cls: type[AsyncScheduler], args: argparse.Namespace, thresholds: dict[str, Any] | None, *, long: bool = False
) -> Engine:
    """An engine with that many decodes running and the rest waiting."""
    settings: dict[str, Any] = {"max_num_seqs": args.running, "max_num_batched_tokens": 8192}
    if long:
        settings |= {"max_model_len": 32_768, "enable_prefix_caching": True}
    blocks = (_LONG // 16 + 64 if long else 64) * args.running
    engine = Engine(cls, blocks=blocks, thresholds=thresholds, **settings)
    if thresholds is not None:
        engine.apply({"version": 1, "policy": "fcfs", "max_running": args.running})
    for index in range(args.running + args.waiting):
        prompt = [index % 8] * _SHARED + [8 + index] * (_LONG - _SHARED) if long else [7] * 32
        engine.add(f"r{index}", prompt=prompt, output=900)
    running = engine.scheduler.running
    while len(running) < args.running or not all(request.num_output_tokens for request in running):
        engine.step()
        running = engine.scheduler.running
    if thresholds is not None:
        engine.apply(thresholds | {"version": 2})
    for _ in range(5):
        engine.step()
    return engine


def compared(ours: Engine, plain: Engine, rounds: int) -> dict[str, Any]:
    """CPU time of schedule() in microseconds, and the ratios, after a collection as the engine core makes one."""
    inner = Stopwatch(AsyncScheduler, "schedule")
    gc.collect()
    gc.freeze()
    pairs, own = [], []
    for _ in range(rounds):
        spent = [0.0, 0.0, 0.0]
        for _ in range(_ITERATIONS):
            spent[0] += step_us(ours)
            spent[2] += inner.read_us()
            spent[1] += step_us(plain)
            inner.read_us()
        pairs.append((spent[0], spent[1]))
        own.append(spent[0] / spent[2])
    inner.remove()
    gc.unfreeze()
    return {
        "us": round(statistics.median(a for a, _ in pairs) / _ITERATIONS, 1),
        "plain_us": round(statistics.median(b for _, b in pairs) / _ITERATIONS, 1),
        "ratio": spread([a / b for a, b in pairs]), "own": spread(own),
    }


def spread(ratios: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, median, high = statistics.quantiles(ratios, n=4)
    named = {"median": median, "quartile1": low, "quartile3": high, "min": min(ratios), "max": max(ratios)}
    return {name: round(value, 3) for name, value in named.items()}


class Stopwatch:
    """CPU microseconds in one method of a class since they were last read."""

    def __init__(self, cls: type, method: str) -> None:
        self._cls, self._method, self._spent_us = cls, method, 0.0
        had, inner = method in vars(cls), getattr(cls, method)
        self._before = inner if had else None

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time_ns()
            try:
                return inner(*args, **kwargs)
            finally:
                self._spent_us += (time.process_time_ns() - begun) / 1000

        setattr(cls, method, timed)

    def read_us(self) -> float:
        spent_us, self._spent_us = self._spent_us, 0.0
        return spent_us

    def remove(self) -> None:
        if self._before is None:
            delattr(self._cls, self._method)
        else:
            setattr(self._cls, self._method, self._before)


def step_us(engine: Engine) -> float:
    """CPU microseconds of schedule() in one iteration."""
    scheduler, inner, spent_ns = engine.scheduler, engine.scheduler.schedule, 0

    def timed(*positional: Any) -> Any:
        nonlocal spent_ns
        begun = time.process_time_ns()
        output = inner(*positional)
        spent_ns += time.process_time_ns() - begun
        return output

    scheduler.schedule = timed
    engine.step()
    del scheduler.schedule
    return spent_ns / 1000


def poll_us(engine: Engine, times: int = 100_000) -> float:
    """Microseconds to read the active thresholds: what the live channel adds to every iteration."""
    current = engine.scheduler.active.current
    begun = time.perf_counter_ns()
    for _ in range(times):
        current()
    return (time.perf_counter_ns() - begun) / times / 1000


def channel_ms(engine: Engine, questions: int = 100) -> dict[str, float]:
    """From an offer of thresholds to the acknowledgement that they are active, while the engine steps."""
    endpoint, done = new_endpoint(), threading.Event()
    server = ChannelServer(
        endpoint, engine.scheduler.active.offer, engine.scheduler.telemetry, engine.scheduler.stats,
        engine.scheduler.in_force.configure, engine.scheduler.drain.ask,
    )
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
