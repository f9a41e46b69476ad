"""What the controller knows of one replica, and the thresholds that follow from it. No Ray, no vLLM, no clock.

Fed with telemetry, it keeps the service-time law (refined online from the profile's) and a `Watch` of arrivals and
answers; asked, it solves the fluid model and says what it would put in force, and why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scheduler.estimates import ArrivalRates, mean_estimate
from scheduler.fit import OnlineLaw
from scheduler.fluid import FluidEquilibrium
from scheduler.forecast import Forecast
from scheduler.law import ServiceTimeLaw
from scheduler.messages import Telemetry
from scheduler.mix import Lengths, RequestType, WorkloadMix
from scheduler.pace import Pace
from scheduler.realised import RealisedMargin
from scheduler.survival import cold_lengths, mean_of, product_limit
from scheduler.targets import Promise, Targets
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds
from scheduler.tuning import LEAST_RATE_RPS, mix_by_length, tune
from scheduler.watch import Watch, stratified

WINDOW_S, MIN_FINISHED = 60.0, 20
"""What a controller is told of `Tuning` unless its configuration says otherwise."""
_SETTLED_PACE = 0.05
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
    """The thresholds a replica should run with, the equilibrium behind them (None: too little is known), and why.

    forecast: what `fluid` expects and how sure it is; None under another policy and without telemetry.
    """

    thresholds: Thresholds
    equilibrium: FluidEquilibrium | None
    reason: str
    forecast: Forecast | None = None


class ReplicaModel:
    """Running estimates of one replica under the configured policy."""

    def __init__(self, config: Tuning, law: ServiceTimeLaw, configured: Thresholds) -> None:
        self._config = config
        self._configured = configured
        self._watch = Watch(config.window_s, config.min_finished)
        self.law = OnlineLaw(law)
        self._realised = RealisedMargin()
        self._changes = 0
        self.cursor = 0
        self.telemetry: Telemetry | None = None
        self._engine_id = ""

    def observe(self, telemetry: Telemetry) -> None:
        """Take in one report. A report seen before changes nothing; a restarted engine starts the window anew."""
        if telemetry.engine_id != self._engine_id:
            self._engine_id, self.cursor = telemetry.engine_id, 0
            self._watch.restart(telemetry)
        for iteration in telemetry.iterations:
            if iteration.seq > self.cursor:
                self.law.update(
                    iteration.prefill_tokens, iteration.decode_tokens, iteration.kv_tokens, iteration.seconds
                )
        self._observe_finished(telemetry)
        self._watch.observe(telemetry, self.cursor)
        self.cursor = max(self.cursor, telemetry.cursor)
        self.telemetry = telemetry

    def _observe_finished(self, telemetry: Telemetry) -> None:
        """What requests got beside the plan; while lengths and law are guesses, there is no plan to keep."""
        pace = telemetry.thresholds.pace
        if pace is None or pace.token_s is None or pace.cold:
            return
        if self.law.changes != self._changes:
            self._changes = self.law.changes
            self._realised.forget()
        for done in telemetry.finished:
            if done.seq > self.cursor and done.tpot_s is not None and not done.aborted:
                self._realised.observe(done.tpot_s, pace.token_s)

    @property
    def rates(self) -> ArrivalRates:
        """What arrives, in all and by type, with intervals."""
        return self._watch.rates

    @property
    def rate_rps(self) -> float:
        """Arrivals per second since they are alike, at most over the window."""
        return self._watch.rates.total.value if self.telemetry else 0.0

    @property
    def finished_seen(self) -> int:
        """Finished requests whose lengths are known, and alike."""
        return self._watch.finished_count

    def propose(self) -> Proposal:
        """The thresholds for what is known now; the configured ones while that is too little."""
        if self.telemetry is None:
            return Proposal(self._configured, None, "no telemetry yet: the configured thresholds")
        if self._configured.policy == "fluid":
            return self._paced()
        if self.finished_seen < self._config.min_finished:
            reason = (
                f"{self.finished_seen} finished requests seen, {self._config.min_finished} needed: "
                "the configured thresholds"
            )
            return Proposal(self._configured, None, reason)
        if not self._watch.arrivals:
            reason = f"no arrivals in the last {self._config.window_s:g} s: the configured thresholds"
            return Proposal(self._configured, None, reason)
        tuned = tune(
            self._configured, self._mix(), self.law.law, self.telemetry.limits,
            overflow_probability=self._config.overflow_probability,
        )
        thresholds = replace(tuned.thresholds, valid_for_s=self._config.validity_s)
        return Proposal(thresholds, tuned.equilibrium, thresholds.reason)

    def _paced(self) -> Proposal:
        """All requests as of unknown length; a pace always has an answer, if need be from a guess."""
        assert self.telemetry is not None
        rates, cold = self._watch.rates, self.finished_seen < self._config.min_finished
        answers = self._watch.answers(guessed=_guesses(self._longest) if cold else ())
        lengths = product_limit(answers, self._longest)
        samples = float(answers.ended.sum())
        lengths = stratified(lengths, [one.prompt_tokens for one in self._watch.arrivals], rates)
        tuned = tune(
            self._configured, WorkloadMix((RequestType(UNKNOWN_TYPE, max(self.rate_rps, LEAST_RATE_RPS), lengths),)),
            self.law.law, self.telemetry.limits, overflow_probability=self._config.overflow_probability,
            targets=self._config.targets, fluctuation=self.law.fluctuation, dispersion=rates.dispersion,
            cold=cold, reuse=self._watch.prefix_reuse,
            realised_margin=self._realised.margin(self._config.overflow_probability),
        )
        assert tuned.promise is not None
        thresholds = replace(tuned.thresholds, valid_for_s=self._config.validity_s)
        forecast = self._forecast(tuned.promise, lengths, samples, cold=cold)
        return Proposal(thresholds, tuned.equilibrium, thresholds.reason, forecast)

    def _forecast(self, promise: Promise, lengths: Lengths, samples: float, *, cold: bool) -> Forecast:
        assert self.telemetry is not None
        rates, strays, now_s = self._watch.rates, self.law.fluctuation, self.telemetry.clock_s
        times, since_s = self.law.iteration_time_s, self._watch.answers_since_s
        return Forecast(
            binding=promise.binding, goodput_rps=promise.goodput_rps, capacity_rps=promise.capacity_rps,
            load=promise.load, miss_probability=self._config.overflow_probability, in_time=promise.in_time,
            tpot_margin=promise.tpot_margin, tpot_s=promise.tpot_s, ttft_s=promise.pace.first_token_limit_s,
            queue_requests=promise.pace.queue_requests, rate_rps=rates.total, rate_by_type_rps=rates.by_type,
            rate_since_s=now_s - rates.since_s, dispersion=rates.dispersion,
            prompt_tokens=mean_of(lengths.prompt_tokens, lengths.weights, samples),
            output_tokens=mean_of(lengths.output_tokens, lengths.weights, samples), survival_samples=samples,
            survival_since_s=now_s - since_s if math.isfinite(since_s) else None,
            law_error_std=strays.std_estimate, law_error_correlation=strays.correlation,
            iteration_s=mean_estimate(*times, strays.iterations) if times else None,
            iteration_std_s=times[1] if times else None, cold=cold,
        )

    def _mix(self) -> WorkloadMix:
        """The arrivals by type; without `wait`, which alone looks at declared lengths, one unknown type."""
        arrivals = self._watch.arrivals
        declared = [
            (arrival.prompt_tokens, arrival.known_output_tokens)
            for arrival in arrivals
            if arrival.known_output_tokens is not None and self._configured.policy == "wait"
        ]
        # A moment without arrivals is no reason to solve for none.
        rate_rps = self.rate_rps or self._watch.rates.total.high / 2
        lengths = product_limit(self._watch.answers(), self._longest)
        return mix_by_length(
            declared, len(arrivals) - len(declared), lengths, rate_rps=rate_rps, longest=self._longest
        )

    @property
    def _longest(self) -> int:
        assert self.telemetry is not None
        return self.telemetry.limits.max_model_len


def _guesses(longest: int) -> list[tuple[int, int]]:
    """A few pairs of `cold_lengths`, which stand for finished requests until there are enough."""
    lengths = cold_lengths(longest)
    prompts, outputs = np.unique(lengths.prompt_tokens), np.unique(lengths.output_tokens)
    # A step coprime to their number goes through all prompts, in no relation to the outputs.
    return [(int(prompts[(7 * place) % len(prompts)]), int(output)) for place, output in enumerate(outputs)]


def materially_different(proposed: Thresholds, in_force: Thresholds) -> bool:
    """False when a change would be noise: the same rule, or every count within a tenth (or one) of what it is."""
    if proposed.same_rule(in_force):
        return False
    if proposed.pace and in_force.pace:
        return not _same_pace(proposed.pace, in_force.pace)
    counts, current = _counts(proposed), _counts(in_force)
    last = _last_end(proposed, in_force)
    without_counts = _without_counts(proposed, last).same_rule(_without_counts(in_force, last))
    if not without_counts or len(counts) != len(current):
        return True
    return any(abs(new - old) > max(1.0, _SETTLED * old) for new, old in zip(counts, current, strict=True))


def _same_pace(new: Pace, old: Pace) -> bool:
    """True when a new pace would make hardly a difference.

    Its times and its survival are within a twentieth; its queue and its prompt flow, which follow from estimates of
    arrivals and so move most, within a tenth (or one request).
    """
    targets = ("kv_limit_tokens", "ttft_s", "tpot_s", "latency_s", "pipeline_depth", "cold")
    if any(getattr(new, name) != getattr(old, name) for name in targets):
        return False
    load = (old.prompt_flow_tokens, 100.0, float(old.kv_limit_tokens))
    times, flow = (_SETTLED_PACE, 0.0), (_SETTLED, 0.0)
    numbers = (
        (new.iteration_s, old.iteration_s, times), (new.law.iteration_s(*load), old.law.iteration_s(*load), times),
        (new.prompt_flow_tokens, old.prompt_flow_tokens, flow), (new.queue_requests, old.queue_requests, (_SETTLED, 1)),
        (new.capacity_rps, old.capacity_rps, flow), (new.steady_s, old.steady_s, flow),
        (new.first_token_within_s, old.first_token_within_s, flow), (new.tokens_per_step, old.tokens_per_step, times),
    )
    for now, before, (share, least) in numbers:
        if now is None or before is None:
            if now is not before:
                return False
        elif abs(now - before) > max(least, share * before):
            return False
    at = [x for x, _ in (*new.survival, *old.survival)]
    return float(np.max(np.abs(_survival_at(new, at) - _survival_at(old, at)))) <= _SETTLED_PACE


def _survival_at(pace: Pace, at: list[int]) -> NDArray[np.float64]:
    lengths, survival = zip(*pace.survival, strict=True)
    return np.asarray(np.interp(at, lengths, survival, right=0.0), dtype=np.float64)


def _counts(thresholds: Thresholds) -> list[int]:
    counts = [entry.n or 0 for entry in thresholds.types] + [segment.total for segment in thresholds.segments]
    return [*counts, thresholds.max_in_service or 0]


def _last_end(new: Thresholds, old: Thresholds) -> int | None:
    """The end of both last segments where it differs by noise: nobody waits there, and it moves with every record."""
    if not new.segments or not old.segments:
        return None
    ends = sorted(value.segments[-1].end_output_tokens for value in (new, old))
    return ends[1] if ends[1] <= (1 + _SETTLED) * ends[0] else None


def _without_counts(thresholds: Thresholds, last_end: int | None) -> Thresholds:
    segments = tuple(replace(segment, total=1) for segment in thresholds.segments)
    if last_end is not None:
        segments = (*segments[:-1], replace(segments[-1], end_output_tokens=last_end))
    return replace(
        thresholds,
        types=tuple(replace(entry, n=entry.n and 1) for entry in thresholds.types),  # an open gate differs from any
        segments=segments,
        max_in_service=None if thresholds.max_in_service is None else 1,
    )
