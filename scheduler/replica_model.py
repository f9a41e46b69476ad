"""What the controller knows of one replica, and the thresholds that follow from it. No Ray, no vLLM, no clock.

Fed with telemetry, it keeps the service-time law (refined online from the profile's) and a `Watch` of arrivals and
answers; asked, it solves the fluid model and says what it would put in force, and why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
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
from scheduler.realised import LastingQuantile, RealisedMargin
from scheduler.steps import StepsSeen
from scheduler.survival import cold_lengths, mean_of, product_limit
from scheduler.targets import Promise, Targets
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds
from scheduler.tuning import LEAST_RATE_RPS, mix_by_length, tune
from scheduler.watch import Watch, stratified

WINDOW_S, MIN_FINISHED = 60.0, 20
"""What a controller is told of `Tuning` unless its configuration says otherwise."""
_SETTLED = 0.10
"""Thresholds closer than this (relatively) to those in force are left alone: estimates jitter, engines should not."""
_PROMPT_TOKENS = 2048.0
"""Prompt tokens beside which iteration times are compared where nothing says how many there are."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a field may be from the one in force: by `share` of it, or by `least` if that is more; by default not."""

    share: float = 0.0
    least: float = 0.0

    def covers(self, new: float | None, old: float | None) -> bool:
        """Whether a change is too small to matter; what is given and what is not always differ."""
        if new is None or old is None:
            return new is old
        return abs(new - old) <= max(self.least, self.share * old)


_EXACT, _TIME, _ESTIMATE = Tolerance(), Tolerance(0.05), Tolerance(_SETTLED)
PACE_TOLERANCES: Mapping[str, Tolerance] = {
    # What an operator or an engine sets, and what follows from that alone.
    **dict.fromkeys(("kv_limit_tokens", "block_tokens", "overflow_z", "miss_probability"), _EXACT),
    **dict.fromkeys(("tpot_s", "ttft_s", "latency_s", "pipeline_depth", "cold"), _EXACT),
    # What the engine's iterations are held to. The law is compared by the iteration times it gives.
    **dict.fromkeys(("law", "iteration_s", "tokens_per_step", "computed_per_step"), _TIME),
    "survival": Tolerance(least=0.05),
    # What follows from estimates of arrivals, and so moves most.
    **dict.fromkeys(("prompt_flow_tokens", "capacity_rps", "steady_s", "variability"), _ESTIMATE),
    "first_token_within_s": _ESTIMATE,
    "queue_requests": Tolerance(_SETTLED, 1.0),
}
"""For each field of a pace, the change that is none."""


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
    """Running estimates of one replica under the configured policy.

    law: of the whole model, as a profile has it; of a pipeline, the estimated one is that of a stage.
    """

    def __init__(self, config: Tuning, law: ServiceTimeLaw, configured: Thresholds) -> None:
        self._config = config
        self._configured = configured
        self._watch = Watch(config.window_s, config.min_finished)
        self._profiled, self._depth = law, 1
        self.law = OnlineLaw(law)
        self._realised, self._delays = RealisedMargin(), LastingQuantile()
        self._delivered = 0
        self._steps = StepsSeen(config.window_s)
        self.cursor = 0
        self.telemetry: Telemetry | None = None
        self._engine_id = ""

    def observe(self, telemetry: Telemetry) -> None:
        """Take in one report. A report seen before changes nothing; a restarted engine starts the window anew."""
        if telemetry.limits.pipeline_depth != self._depth:
            self._depth = telemetry.limits.pipeline_depth
            self.law = OnlineLaw(self._profiled.of_stage(self._depth))
        if telemetry.engine_id != self._engine_id:
            self._engine_id, self.cursor, self._delivered = telemetry.engine_id, 0, 0
            self._watch.restart(telemetry)
            self._steps.restart()
        for iteration in telemetry.iterations:
            if iteration.seq > self.cursor:
                self.law.update(
                    iteration.prefill_tokens, iteration.decode_tokens, iteration.kv_tokens, iteration.seconds
                )
        self._observe_finished(telemetry)
        self._steps.observe(telemetry.clock_s, telemetry.counters)
        self._watch.observe(telemetry, self.cursor, self._steps.steps.tokens)
        self.cursor = max(self.cursor, telemetry.cursor)
        self.telemetry = telemetry

    def _observe_finished(self, telemetry: Telemetry) -> None:
        """What requests got beside the plan; while lengths and law are guesses, there is no plan to keep.

        Where the replica tells when its answers left it, that is what they got.
        """
        delivered = [done for done in telemetry.delivered if done.seq > self._delivered]
        for done in delivered:
            if done.delay_s is not None:
                self._delays.observe(done.delay_s)
        self._delivered = max([self._delivered, *(done.seq for done in delivered)])
        pace = telemetry.thresholds.pace
        if pace is None or pace.token_s is None or pace.cold:
            return
        finished = [done for done in telemetry.finished if done.seq > self.cursor and not done.aborted]
        for got in delivered if telemetry.delivered else finished:
            if got.tpot_s is not None:
                self._realised.observe(got.tpot_s, pace.token_s)

    @property
    def delivery_s(self) -> float:
        """Seconds from a first token in the engine until it has left the replica, for all but the promised share; 0
        while too little is known, and at most half of what the targets leave."""
        targets = self._config.targets
        most_s = min((t for t in (targets.ttft_s, targets.latency_s) if t is not None), default=0.0) / 2
        return min(self._delays.of_all_but(self._config.overflow_probability) or 0.0, most_s)

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
            overflow_probability=self._config.overflow_probability, steps=self._steps.steps,
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
            cold=cold, reuse=self._watch.prefix_reuse, steps=self._steps.steps,
            realised_margin=self._realised.margin(self._config.overflow_probability), delivery_s=self.delivery_s,
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
            iteration_std_s=times[1] if times else None, cold=cold, delivery_s=self.delivery_s,
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
    without_counts = _without_counts(proposed).same_rule(_without_counts(in_force))
    if not without_counts or len(counts) != len(current):
        return True
    return any(abs(new - old) > max(1.0, _SETTLED * old) for new, old in zip(counts, current, strict=True))


def _same_pace(new: Pace, old: Pace) -> bool:
    """True when a new pace would make hardly a difference; a field that `PACE_TOLERANCES` leaves out may not change."""
    return all(
        PACE_TOLERANCES.get(field.name, Tolerance()).covers(getattr(new, field.name), getattr(old, field.name))
        for field in fields(Pace) if field.name not in ("law", "survival")
    ) and _same_law(new, old) and _same_survival(new, old)


def _same_law(new: Pace, old: Pace) -> bool:
    """Iterations of a full batch, with prompts and without, within a twentieth."""
    prompts = old.prompt_flow_tokens or _PROMPT_TOKENS
    loads = ((0.0, 100.0, float(old.kv_limit_tokens)), (prompts, 100.0, float(old.kv_limit_tokens)))
    return all(
        PACE_TOLERANCES["law"].covers(new.law.iteration_s(*load), old.law.iteration_s(*load)) for load in loads
    )


def _same_survival(new: Pace, old: Pace) -> bool:
    at = [x for x, _ in (*new.survival, *old.survival)]
    return float(np.max(np.abs(_survival_at(new, at) - _survival_at(old, at)))) <= PACE_TOLERANCES["survival"].least


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
