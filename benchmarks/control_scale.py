"""Seconds and memory of one control pass over many replicas, in the messages that cross between them.

    python benchmarks/control_scale.py [--replicas 16 100 1000] [--passes 5] [--page docs/evidence/control-scale.md]

Each row is a process of its own on one core. The pass is that of `cluster.controller.ControlLoop`, whole but for Ray:
every report is decoded from its JSON, every offer is written as JSON.
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
from pathlib import Path
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
        self.kinds = [(Engine(number), Digester()) for number in range(KINDS)]
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
        for engine, digester in self.kinds:
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


PAGE = """# The controller at scale

A control pass over {replicas} replicas takes {pass_ms} ms of one core, in a process of {peak_mb} MB: {within} the aim
of 500 ms and 300 MB. Each replica sends one message of {kb} kB a period.

Made by `python benchmarks/control_scale.py --replicas 16 100 1000 10000 --page docs/evidence/control-scale.md`. A row
is a process of its own, pinned to one core: the median of {passes} passes after a first one, in CPU seconds of all its
threads. A pass is the controller's own, without Ray, from the reports as they arrive (JSON, 64 buckets of output
lengths, digested out of {rate} requests a second and {iterations} iterations a period by the code that runs in a
replica) to the offers as they leave. One replica in {kinds} is twice as slow as the others.

{table}
At {largest} replicas each costs {each_ms} ms of a pass and {each_kb} kB; at {replicas}, {thousand_each_ms} ms. The
sums of all replicas are compared in a few array operations, and plans are made for groups of replicas that are alike.
What remains is reading and checking each report. It happens in a thread: the actor's event loop stores reports, answers
calls and sends offers. A pass in which all replicas get new thresholds costs most.

## Beyond

At {largest} replicas a pass takes {largest_s} s; the default period is {period} s. Up to about {most} replicas a pass
takes at most half of the period. For more, in this order:

1. a longer `controller.period_s`, which divides the cost; replicas keep their thresholds for `validity_s`;
2. a controller for each deployment, since only replicas of one kind share anything: models are split first;
3. the digests of a node added up there before they are sent (they are sums), and its deviations reported beside them:
   then the controller reads one message for each node.

Not measured here: Ray's own part. {largest} replicas send {per_second} messages a second to one actor, and Serve's own
controller tracks as many replicas; neither has been tried with Ray at that size.
"""


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
    slow = KINDS - 1 if replicas >= KINDS else None  # one kind of sixteen: replicas of it take twice as long
    if slow is not None:
        cluster.kinds[slow][0].slow = 2.0
    start_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken_s, offers = [], []
    for _ in range(passes + 1):
        cluster.advance(loop)
        loop.hurry()
        begun_s = time.process_time()
        asyncio.run(loop.one_cycle())
        taken_s.append(time.process_time() - begun_s)
        offers.append(cluster.offers)
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "replicas": replicas, "first_s": taken_s[0], "pass_s": statistics.median(taken_s[1:]),
        "least_s": min(taken_s[1:]), "most_s": max(taken_s[1:]), "start_mb": start_kb / 1024,
        "peak_mb": peak_kb / 1024, "message_bytes": cluster.inbound_bytes / replicas, "offers": offers[1:],
        "slow": replicas // KINDS if slow is not None else 0, "named": len(loop.learning.deviations),
        "plans": sum(len(one._plans) for one in loop.learning._kinds.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[16, 100, 1000])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--page", type=Path, help="write the table as a page of the documentation")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.alone:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(json.dumps(measured(asked.replicas[0], asked.passes)))
        return
    rows = []
    for replicas in asked.replicas:
        command = [sys.executable, __file__, "--alone", "--replicas", str(replicas), "--passes", str(asked.passes)]
        one = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        rows.append(one)
        print(
            f"{replicas:6d} replicas: {1000 * one['pass_s']:8.1f} ms a pass ({1000 * one['least_s']:.1f} to "
            f"{1000 * one['most_s']:.1f}), the first {1000 * one['first_s']:.1f} ms; {one['peak_mb']:.0f} MB, of which "
            f"{one['start_mb']:.0f} before; {one['message_bytes'] / 1000:.1f} kB a replica, "
            f"offers {one['offers']}, {one['named']} of {one['slow']} slow ones named", flush=True,
        )
    if asked.page:
        asked.page.write_text(page(rows, asked.passes), encoding="utf-8")


def page(rows: list[dict[str, Any]], passes: int) -> str:
    """The table as a page; every number in a sentence comes from it."""
    header = (
        "| replicas | seconds a pass, median (least to most) | the first pass | process, MB | of it the replicas, MB | "
        "inbound a replica and period, kB | plans | slow ones named |\n|---|---|---|---|---|---|---|---|\n"
    )
    table = header + "".join(
        f"| {one['replicas']:,} | {one['pass_s']:.3f} ({one['least_s']:.3f}–{one['most_s']:.3f}) | "
        f"{one['first_s']:.3f} | {one['peak_mb']:.0f} | {one['peak_mb'] - one['start_mb']:.0f} | "
        f"{one['message_bytes'] / 1000:.1f} | "
        f"{one['plans']} | {one['named']} of {one['slow']} |\n".replace(",", " ") for one in rows
    )
    thousand = next((one for one in rows if one["replicas"] == 1000), rows[-1])
    largest = rows[-1]
    each_ms = 1000 * largest["pass_s"] / largest["replicas"]
    each_kb = 1024 * (largest["peak_mb"] - largest["start_mb"]) / largest["replicas"]
    within = "within" if thousand["pass_s"] <= 0.5 and thousand["peak_mb"] <= 300 else "not within"
    most = int(PERIOD_S / 2 / (each_ms / 1000))
    return PAGE.format(
        table=table, passes=passes, replicas=f"{thousand['replicas']:,}".replace(",", " "),
        pass_ms=f"{1000 * thousand['pass_s']:.0f}", peak_mb=f"{thousand['peak_mb']:.0f}", within=within,
        thousand_each_ms=f"{1000 * thousand['pass_s'] / thousand['replicas']:.2f}", each_ms=f"{each_ms:.2f}",
        each_kb=f"{each_kb:.0f}", kb=f"{thousand['message_bytes'] / 1000:.1f}",
        largest=f"{largest['replicas']:,}".replace(",", " "), largest_s=f"{largest['pass_s']:.1f}",
        most=f"{round(most, -2):,}".replace(",", " "), period=f"{PERIOD_S:g}", kinds=KINDS,
        rate=f"{RATE_RPS:g}", iterations=round(PERIOD_S / ITERATION_S),
        per_second=f"{largest['replicas'] / PERIOD_S:,.0f}".replace(",", " "),
    )


if __name__ == "__main__":
    main()
