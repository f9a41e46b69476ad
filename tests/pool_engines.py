"""Engines of one kind with known truths, for what the controller learns from several of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from synthetic_engine import LIMITS

from scheduler.messages import Arrival, Counters, Finished, Gauges, Iteration, RunningLengths, Telemetry
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.thresholds import Thresholds

LAW = IterationTimeModel(d0_s=0.004, d1_s_per_kv_token=4e-7, d2_s_per_prefill_token=6e-5, d3_s_per_decode_token=6e-5)
PERIOD_S, ITERATION_S = 5.0, 0.05
NOISE = 0.03


class KnownEngine:
    """Its iterations take `slow` times as long as `law` says; requests have lognormal lengths around `output` tokens.

    hits: share of the prompts that the prefix cache holds.
    """

    def __init__(
        self, seed: int, *, slow: float = 1.0, rate_rps: float = 8.0, prompt: float = 300.0, output: float = 150.0,
        hits: float = 0.3, law: IterationTimeModel = LAW,
    ) -> None:
        self._random = np.random.default_rng(seed)
        self.name, self.slow, self.law = f"r{seed}", slow, law
        self.rate_rps, self.prompt, self.output, self.hits = rate_rps, prompt, output, hits
        self.now_s, self._seq, self._arrived = 0.0, 0, 0
        self.thresholds = Thresholds(policy="fluid")
        self._under_way: list[tuple[float, int, int]] = []

    def period(self, seconds: float = PERIOD_S, **changed: Any) -> Telemetry:
        """The records of the next seconds."""
        begun_s = self.now_s
        self.now_s += seconds
        batches = self._random.integers((0, 20, 10_000), (400, 70, 60_000), (round(seconds / ITERATION_S), 3)).tolist()
        iterations = tuple(
            Iteration(
                self._next(), begun_s + ITERATION_S * place,
                self.slow * self.law.iteration_s(*batch) * self._random.normal(1, NOISE), *batch, 50,
            )
            for place, batch in enumerate(batches)
        )
        times = np.sort(self._random.uniform(begun_s, self.now_s, self._random.poisson(self.rate_rps * seconds)))
        prompts, outputs = (self._lengths(mean, times.size) for mean in (self.prompt, self.output))
        self._under_way += list(zip(times.tolist(), prompts, outputs, strict=True))
        arrivals = tuple(
            Arrival(self._next(), at_s, prompt, None) for at_s, prompt in zip(times.tolist(), prompts, strict=True)
        )
        self._arrived += len(arrivals)
        ended = [one for one in self._under_way if one[0] + one[2] * ITERATION_S <= self.now_s]
        self._under_way = [one for one in self._under_way if one[0] + one[2] * ITERATION_S > self.now_s]
        finished = tuple(
            Finished(
                self._next(), at_s + output * ITERATION_S, prompt, output, False, round(self.hits * prompt), 0, 0.2,
                ITERATION_S,
            )
            for at_s, prompt, output in sorted(ended, key=lambda one: one[0] + one[2] * ITERATION_S)
        )
        running = tuple(
            RunningLengths(prompt, int((self.now_s - at_s) / ITERATION_S)) for at_s, prompt, _ in self._under_way
        )
        given: dict[str, Any] = {
            "engine_id": self.name, "clock_s": self.now_s, "cursor": self._seq, "limits": LIMITS,
            "thresholds": self.thresholds, "from_config": True, "gauges": Gauges(running=len(running)),
            "counters": Counters(arrivals=self._arrived), "iterations": iterations, "arrivals": arrivals,
            "finished": finished, "running": running,
        }
        return Telemetry(**(given | changed))

    def _lengths(self, mean: float, count: int) -> list[int]:
        drawn = self._random.lognormal(np.log(mean) - 0.18, 0.6, count)
        lengths: list[int] = np.clip(np.round(drawn), 1, 2000).astype(int).tolist()
        return lengths

    def _next(self) -> int:
        self._seq += 1
        return self._seq
