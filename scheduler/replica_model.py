"""What the controller knows of one replica, and the thresholds that follow from it. No Ray, no vLLM, no clock.

Fed with telemetry, it keeps the service-time law (refined online from the profile's), the arrival rate over a window
and the lengths of finished requests; asked, it solves the fluid model and says what it would put in force, and why.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scheduler.fit import OnlineLaw
from scheduler.fluid import FluidEquilibrium
from scheduler.law import ServiceTimeLaw
from scheduler.messages import Arrival, Telemetry
from scheduler.mix import Lengths, RequestType, WorkloadMix
from scheduler.pace import Pace
from scheduler.survival import cold_lengths, product_limit
from scheduler.targets import Targets
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds
from scheduler.tuning import mix_by_length, tune

KEPT_LENGTHS = 2000
WINDOW_S, MIN_FINISHED = 60.0, 20
"""What a controller is told of `Tuning` unless its configuration says otherwise."""
_SETTLED_PACE, _SETTLED_SURVIVAL = 0.05, 0.02
_LEAST_RATE_RPS = 1e-3
_SETTLED = 0.10
"""Thresholds closer than this (relatively) to those in force are left alone: estimates jitter, engines should not."""


class Tuning(Protocol):
    """How a replica is tuned. window_s: seconds of arrivals that count; min_finished: finished requests to see before
    anything is touched; overflow_probability: accepted chance that memory overflows; validity_s: how long thresholds
    stay in force unless renewed; targets: what the operator promises."""

    @property
    def window_s(self) -> float: ...

    @property
    def min_finished(self) -> int: ...

    @property
    def overflow_probability(self) -> float: ...

    @property
    def validity_s(self) -> float: ...

    @property
    def targets(self) -> Targets: ...


@dataclass(frozen=True, slots=True)
class Proposal:
    """The thresholds a replica should run with, the equilibrium behind them (None: too little is known), and why."""

    thresholds: Thresholds
    equilibrium: FluidEquilibrium | None
    reason: str


class ReplicaModel:
    """Running estimates of one replica under the configured policy."""

    def __init__(self, config: Tuning, law: ServiceTimeLaw, configured: Thresholds) -> None:
        self._config = config
        self._configured = configured
        self.law = OnlineLaw(law)
        self.cursor = 0
        self.telemetry: Telemetry | None = None
        self._engine_id = ""
        self._watched_since_s = 0.0
        self._arrivals: deque[Arrival] = deque()
        self._finished: deque[tuple[int, int]] = deque(maxlen=KEPT_LENGTHS)

    def observe(self, telemetry: Telemetry) -> None:
        """Take in one report. A report seen before changes nothing; a restarted engine starts the window anew."""
        if telemetry.engine_id != self._engine_id:
            self._engine_id, self.cursor = telemetry.engine_id, 0
            self._arrivals.clear()
            oldest = telemetry.arrivals[0].at_s if telemetry.arrivals else telemetry.clock_s
            self._watched_since_s = max(oldest, telemetry.clock_s - self._config.window_s)
        for iteration in telemetry.iterations:
            if iteration.seq > self.cursor:
                self.law.update(
                    iteration.prefill_tokens, iteration.decode_tokens, iteration.kv_tokens, iteration.seconds
                )
        self._arrivals.extend(arrival for arrival in telemetry.arrivals if arrival.seq > self.cursor)
        self._finished.extend(
            (done.prompt_tokens, done.output_tokens)
            for done in telemetry.finished
            if done.seq > self.cursor and not done.aborted and done.output_tokens > 0
        )
        while self._arrivals and self._arrivals[0].at_s < telemetry.clock_s - self._config.window_s:
            self._arrivals.popleft()
        self.cursor = max(self.cursor, telemetry.cursor)
        self.telemetry = telemetry

    @property
    def rate_rps(self) -> float:
        """Arrivals per second over the window (or since watching began, when that is shorter)."""
        if self.telemetry is None:
            return 0.0
        watched_s = min(self._config.window_s, self.telemetry.clock_s - self._watched_since_s)
        return len(self._arrivals) / max(watched_s, 1.0)

    @property
    def finished_seen(self) -> int:
        """Finished requests whose lengths are known."""
        return len(self._finished)

    def propose(self) -> Proposal:
        """The thresholds for what is known now; the configured ones while that is too little."""
        if self.telemetry is None:
            return Proposal(self._configured, None, "no telemetry yet: the configured thresholds")
        if self._configured.policy == "fluid":
            return self._solved(self._mix_for_pace())
        if len(self._finished) < self._config.min_finished:
            reason = (
                f"{len(self._finished)} finished requests seen, {self._config.min_finished} needed: "
                "the configured thresholds"
            )
            return Proposal(self._configured, None, reason)
        if not self._arrivals:
            reason = f"no arrivals in the last {self._config.window_s:g} s: the configured thresholds"
            return Proposal(self._configured, None, reason)
        return self._solved(self._mix())

    def _solved(self, mix: WorkloadMix) -> Proposal:
        assert self.telemetry is not None
        tuned = tune(
            self._configured, mix, self.law.law, self.telemetry.limits,
            overflow_probability=self._config.overflow_probability, targets=self._config.targets,
            law_error=self._law_error(mix),
        )
        thresholds = replace(tuned.thresholds, valid_for_s=self._config.validity_s)
        return Proposal(thresholds, tuned.equilibrium, thresholds.reason)

    def _law_error(self, mix: WorkloadMix) -> float:
        """Relative standard error of a request's mean iteration: a normal error's, averaged over its iterations."""
        return math.sqrt(math.pi / 2 / mix.merged().lengths.mean_output_tokens) * (self.law.mape or 0.0)

    def _mix_for_pace(self) -> WorkloadMix:
        """All requests as of unknown length; a pace always has an answer, if need be from a guess."""
        known = len(self._finished) >= self._config.min_finished
        lengths = self._lengths() if known else cold_lengths(self._longest)
        return WorkloadMix((RequestType(UNKNOWN_TYPE, max(self.rate_rps, _LEAST_RATE_RPS), lengths),))

    def _mix(self) -> WorkloadMix:
        """The window's arrivals by type; without `wait`, which alone looks at declared lengths, one unknown type."""
        declared = [
            (arrival.prompt_tokens, arrival.known_output_tokens)
            for arrival in self._arrivals
            if arrival.known_output_tokens is not None and self._configured.policy == "wait"
        ]
        unknown = len(self._arrivals) - len(declared)
        return mix_by_length(declared, unknown, self._lengths(), rate_rps=self.rate_rps, longest=self._longest)

    def _lengths(self) -> Lengths:
        in_service = self.telemetry.in_service if self.telemetry else ()
        running = [(one.prompt_tokens, one.output_tokens) for one in in_service]
        return product_limit(list(self._finished), running, self._longest)

    @property
    def _longest(self) -> int:
        assert self.telemetry is not None
        return self.telemetry.limits.max_model_len


def materially_different(proposed: Thresholds, in_force: Thresholds) -> bool:
    """False when a change would be noise: the same rule, or every count within a tenth (or one) of what it is."""
    if proposed.same_rule(in_force):
        return False
    if proposed.pace and in_force.pace:
        return not _same_pace(proposed.pace, in_force.pace)
    counts, current = _counts(proposed), _counts(in_force)
    without_counts = _without_counts(proposed).same_rule(_without_counts(in_force))
    if not without_counts or len(counts) != len(current):
        return True
    return any(abs(new - old) > max(1.0, _SETTLED * old) for new, old in zip(counts, current, strict=True))


def _same_pace(new: Pace, old: Pace) -> bool:
    """True when a new pace would make hardly a difference: its numbers within a twentieth, its survival within 0.02."""
    if new.kv_limit_tokens != old.kv_limit_tokens or new.ttft_s != old.ttft_s:
        return False
    load = (new.prompt_flow_tokens, 100.0, float(new.kv_limit_tokens))
    numbers = (
        (new.iteration_s, old.iteration_s), (new.queue_requests, old.queue_requests),
        (new.prompt_flow_tokens, old.prompt_flow_tokens), (new.law.iteration_s(*load), old.law.iteration_s(*load)),
    )
    if any((a is None) != (b is None) or abs((a or 0) - (b or 0)) > _SETTLED_PACE * (b or 1) for a, b in numbers):
        return False
    at = [x for x, _ in (*new.survival, *old.survival)]
    return float(np.max(np.abs(_survival_at(new, at) - _survival_at(old, at)))) <= _SETTLED_SURVIVAL


def _survival_at(pace: Pace, at: list[int]) -> NDArray[np.float64]:
    lengths, survival = zip(*pace.survival, strict=True)
    return np.asarray(np.interp(at, lengths, survival, right=0.0), dtype=np.float64)


def _counts(thresholds: Thresholds) -> list[int]:
    counts = [entry.n for entry in thresholds.types] + [segment.n for segment in thresholds.segments]
    return [*counts, thresholds.max_in_service or 0]


def _without_counts(thresholds: Thresholds) -> Thresholds:
    return replace(
        thresholds,
        types=tuple(replace(entry, n=1) for entry in thresholds.types),
        segments=tuple(replace(segment, n=1) for segment in thresholds.segments),
        max_in_service=None if thresholds.max_in_service is None else 1,
    )
