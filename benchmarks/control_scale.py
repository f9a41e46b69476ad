"""Seconds and memory of one control pass over many replicas, in the messages that cross between them.

    python benchmarks/control_scale.py [--replicas 16 100 1000] [--passes 5]

Each row is a process of its own on one core. The pass is that of `cluster.controller.ControlLoop`, whole but for Ray:
every answer is decoded from its JSON, every offer is written as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic_core import from_json, to_json

from cluster import controller as controller_module
from cluster.controller import ControlLoop
from cluster.settings import ControllerConfig, ModelSettings
from cluster.tuned import TunedModel
from replicas import questions
from replicas.digester import Digester
from replicas.ranks import EngineAddress, ServedModel
from scheduler.messages import (
    Ack,
    Arrival,
    Counters,
    Delivered,
    Finished,
    Gauges,
    Iteration,
    RunningLengths,
    Telemetry,
)
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.profiles import load_profile
from scheduler.thresholds import EngineLimits, Thresholds, thresholds_as_dict
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo
from scheduler.wire import answer_of

PERIOD_S, ITERATION_S, RATE_RPS, KINDS = 5.0, 0.025, 8.0, 16
LIMITS = EngineLimits(
    kv_capacity_tokens=137_000, block_tokens=16, max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=8192
)
TARGETS = Slo(ttft_s=3.0, tpot_s=0.08)
DEPLOYMENT = "HeadraceServer:m"
PROFILE = "a100-llama2-7b"


@dataclass
class Engine:
    """One engine's records, period after period. slow: its iterations take so many times as long."""

    seed: int
    slow: float = 1.0

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._seq, self._now_s, self._law = 0, 0.0, load_profile(PROFILE).time_model
        self._deliveries: list[Delivered] = []
        self._arrived = self._completed = self._iterated = 0

    def period(self) -> Telemetry:
        """The report of one more period."""
        random, begun_s = self._random, self._now_s
        self._now_s += PERIOD_S
        batches = random.integers((0, 30, 20_000), (400, 60, 60_000), (round(PERIOD_S / ITERATION_S), 3)).tolist()
        iterations = tuple(
            Iteration(
                self._next(), at_s, self.slow * self._law.iteration_s(*batch) * random.normal(1, 0.02), *batch, 50
            )
            for at_s, batch in zip(np.linspace(begun_s, self._now_s, len(batches)).tolist(), batches, strict=True)
        )
        arrived = random.poisson(RATE_RPS * PERIOD_S)
        times_s = np.sort(random.uniform(begun_s, self._now_s, arrived)).tolist()
        arrivals = tuple(
            Arrival(self._next(), at_s, length, None)
            for at_s, length in zip(times_s, self._lengths(6.0, arrived), strict=True)
        )
        prompts, outputs = self._lengths(6.0, arrived), self._lengths(5.3, arrived)
        finished = tuple(
            Finished(self._next(), begun_s + PERIOD_S * (place + 1) / (arrived + 1), prompt, output, False, prompt // 3,
                     0, 0.3, 0.04)
            for place, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        )
        self._deliveries += [Delivered(done.seq, 0.01, 0.041) for done in finished]
        self._arrived, self._completed = self._arrived + arrived, self._completed + arrived
        self._iterated += len(iterations)
        running = zip(self._lengths(6.0, 45), self._lengths(4.5, 45), strict=True)
        return Telemetry(
            engine_id="ENGINE", clock_s=self._now_s, cursor=self._seq, limits=LIMITS,
            thresholds=Thresholds(policy="fluid"), from_config=False, gauges=Gauges(running=45, kv_used_tokens=40_000),
            counters=Counters(arrivals=self._arrived, completed=self._completed, iterations=self._iterated),
            iterations=iterations, arrivals=arrivals, finished=finished,
            running=tuple(RunningLengths(*pair) for pair in running), delivered=tuple(self._deliveries[-512:]),
        )

    def _lengths(self, mean_log: float, count: int) -> list[int]:
        drawn: list[int] = np.clip(np.round(self._random.lognormal(mean_log, 0.9, count)), 1, 4000).astype(int).tolist()
        return drawn

    def _next(self) -> int:
        self._seq += 1
        return self._seq


class Cluster:
    """Stands where Ray and the replicas are: reports are written before a pass, and what is offered is taken."""

    def __init__(self, replicas: int) -> None:
        self.names = [f"r{number:05d}" for number in range(replicas)]
        self._kinds = [(Engine(number), Digester()) for number in range(KINDS)]
        self._thresholds = dict.fromkeys(self.names, to_json(thresholds_as_dict(Thresholds())))
        self._reports: list[bytes] = []
        self.inbound_bytes = self.offers = 0

    def engines(self) -> dict[str, EngineAddress]:
        return {name: EngineAddress(name, 0, "m", DEPLOYMENT) for name in self.names}

    def advance(self, loop: ControlLoop) -> None:
        """A period passes, and every replica reports."""
        self._reports, self.inbound_bytes, self.offers = [], 0, 0
        asked = loop.report(DEPLOYMENT, {})
        law = IterationTimeModel(**asked["profile"])
        for engine, digester in self._kinds:
            report = digester.digested(engine.period(), TuningSettings(**asked["tuning"], targets=TARGETS), law)
            written = from_json(answer_of(report))
            written["thresholds"] = "THRESHOLDS"
            self._reports.append(to_json(written))
        for number, name in enumerate(self.names):
            report = self._reports[number % KINDS].replace(b'"THRESHOLDS"', self._thresholds[name])
            report = report.replace(b"ENGINE", name.encode())
            self.inbound_bytes += len(report)
            loop.report(DEPLOYMENT, {name: report})

    async def call_replica(self, actor_name: str, method: str, **arguments: Any) -> bytes:
        assert method == "apply_thresholds"
        offered = from_json(arguments["offer"])["apply"]
        self._thresholds[actor_name], self.offers = to_json(offered), self.offers + 1
        return answer_of(Ack(accepted=True, active_version=offered["version"]))


class _NoStore:
    """The cluster's store of events and pins, which is empty."""

    def keys(self, folder: str) -> list[str]:
        return []

    def get(self, key: str) -> Any:
        return None

    def put(self, key: str, value: Any) -> None:
        return None

    def delete(self, key: str) -> None:
        return None


def measured(replicas: int, passes: int) -> dict[str, Any]:
    """One row: the passes of a cluster of this size, timed after a first one."""
    cluster = Cluster(replicas)
    settings = ModelSettings(controller=ControllerConfig(profile=PROFILE, period_s=PERIOD_S), targets=TARGETS)
    loop = ControlLoop("benchmark", {DEPLOYMENT: TunedModel(ServedModel("m"), settings)}, _NoStore())
    controller_module.engines_of = lambda *_: cluster.engines()  # type: ignore[attr-defined]
    questions.call_replica = cluster.call_replica  # type: ignore[assignment]
    start_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken_s = []
    for _ in range(passes + 1):
        cluster.advance(loop)
        loop.hurry()
        begun_s = time.process_time()
        asyncio.run(loop.one_cycle())
        taken_s.append(time.process_time() - begun_s)
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "replicas": replicas, "first_s": taken_s[0], "pass_s": statistics.median(taken_s[1:]),
        "least_s": min(taken_s[1:]), "most_s": max(taken_s[1:]), "start_mb": start_kb / 1024,
        "peak_mb": peak_kb / 1024, "message_bytes": cluster.inbound_bytes / replicas, "offers": cluster.offers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[16, 100, 1000])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.alone:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(json.dumps(measured(asked.replicas[0], asked.passes)))
        return
    for replicas in asked.replicas:
        command = [sys.executable, __file__, "--alone", "--replicas", str(replicas), "--passes", str(asked.passes)]
        one = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        print(
            f"{replicas:6d} replicas: {1000 * one['pass_s']:8.1f} ms a pass ({1000 * one['least_s']:.1f} to "
            f"{1000 * one['most_s']:.1f}), the first {1000 * one['first_s']:.1f} ms; {one['peak_mb']:.0f} MB, of which "
            f"{one['start_mb']:.0f} before; {one['message_bytes'] / 1000:.1f} kB a replica, {one['offers']} offers"
        )


if __name__ == "__main__":
    main()
