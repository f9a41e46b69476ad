"""Time of one controller pass over one replica: `observe` a full report, then `propose` thresholds.

    python benchmarks/solve_cost.py [--passes 30]

The report has what an engine keeps at most or nearly: 4 096 iterations, and of steady traffic some 2 000 finished and
500 running requests. A pass every 5 s sees far fewer new records; `observe` is stated for such a one too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from scheduler.messages import Arrival, Counters, Finished, Gauges, Iteration, RunningLengths, Telemetry
from scheduler.model.profiles import load_profile
from scheduler.thresholds import EngineLimits, Thresholds
from scheduler.tuning.replica_model import ReplicaModel
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo

ITERATIONS, FINISHED, ITERATION_S, PERIOD_S = 4096, 2000, 0.05, 5.0
LIFE_S = 50.0
TARGETS = Slo(ttft_s=3.0, tpot_s=0.08)
LIMITS = EngineLimits(
    kv_capacity_tokens=137_000, block_tokens=16, max_num_seqs=512, max_num_batched_tokens=2048, max_model_len=4096
)

Record = TypeVar("Record", Iteration, Arrival, Finished)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=30)
    passes = parser.parse_args().passes
    for policy in ("fluid", "nested_wait", "wait"):
        full = report()
        models = [model(policy) for _ in range(passes)]
        for name, telemetry in (("full report", full), ("one period", one_period_later(full))):
            calls = [partial(learning.observe, telemetry) for learning in models]
            print(f"{policy:12} observe, {name:12} {milliseconds(calls)}")
        print(f"{policy:12} propose               {milliseconds([learned.propose for learned in models])}")


def model(policy: str) -> ReplicaModel:
    time_model = load_profile("a100-llama2-7b").time_model
    return ReplicaModel(TuningSettings(targets=TARGETS), time_model, Thresholds(policy=policy))


def one_period_later(full: Telemetry) -> Telemetry:
    """The records of the report's last period once more, as the next one's."""

    def latest(records: tuple[Record, ...]) -> tuple[Record, ...]:
        return tuple(
            one._replace(seq=one.seq + full.cursor, at_s=one.at_s + PERIOD_S)
            for one in records if one.at_s > full.clock_s - PERIOD_S
        )

    return replace(
        full, clock_s=full.clock_s + PERIOD_S, cursor=2 * full.cursor, iterations=latest(full.iterations),
        arrivals=latest(full.arrivals), finished=latest(full.finished),
    )


def milliseconds(calls: list[Callable[[], object]]) -> str:
    taken = []
    for call in calls:
        begun = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - begun))
    return f"median {statistics.median(taken):7.2f} ms, worst {max(taken):7.2f} ms"


def report() -> Telemetry:
    """Steady traffic up to now."""
    random, time_model = np.random.default_rng(1), load_profile("a100-llama2-7b").time_model
    now_s = ITERATIONS * ITERATION_S
    seq = iter(range(1, 10**6))
    batches = random.integers((0, 60, 40_000), (500, 90, 100_000), (ITERATIONS, 3)).tolist()
    iterations = tuple(
        Iteration(next(seq), at_s, time_model.iteration_s(*batch) * random.normal(1, 0.02), *batch, 90)
        for at_s, batch in zip(np.linspace(0, now_s, ITERATIONS), batches, strict=True)
    )
    rate_rps = FINISHED / now_s
    begun_s = np.sort(random.uniform(-5 * LIFE_S, now_s, round(rate_rps * (now_s + 5 * LIFE_S))))
    lengths = np.clip(np.round(random.lognormal((6.3, 6.7), (1.0, 0.6), (begun_s.size, 2))), 1, 4000).astype(int)
    ended_s = begun_s + ITERATION_S * lengths[:, 1]
    requests = list(zip(begun_s.tolist(), ended_s.tolist(), lengths.tolist(), strict=True))
    arrivals = tuple(
        Arrival(next(seq), begun, prompt, output if output % 2 else None)
        for begun, _, (prompt, output) in requests if begun >= 0
    )
    finished = tuple(
        Finished(next(seq), end, prompt, output, False)
        for begun, end, (prompt, output) in sorted(requests, key=lambda one: one[1]) if 0 <= end <= now_s
    )
    running = tuple(
        RunningLengths(prompt, int((now_s - begun) / ITERATION_S))
        for begun, end, (prompt, output) in requests if end > now_s
    )
    return Telemetry(
        engine_id="engine", clock_s=now_s, cursor=next(seq), limits=LIMITS, thresholds=Thresholds(), from_config=True,
        gauges=Gauges(), counters=Counters(), iterations=iterations, arrivals=arrivals, finished=finished,
        running=running,
    )


if __name__ == "__main__":
    main()
