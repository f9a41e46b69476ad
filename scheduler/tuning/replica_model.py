"""The controller's model of one replica, and the thresholds that follow from it. No Ray, no vLLM, no clock.

From telemetry it keeps the iteration-time model (refined online from the profile's) and a `TrafficMonitor` of arrivals
and outputs; on request it solves the fluid model and proposes thresholds with a reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from scheduler.digest import Digest
from scheduler.estimation.arrival_rates import ArrivalRates
from scheduler.estimation.digested import DigestedEngine, DigestedTimes
from scheduler.estimation.engine_records import EngineRecords
from scheduler.estimation.estimates import Estimates, Rates
from scheduler.estimation.intervals import mean_estimate
from scheduler.estimation.iteration_time_online import OnlineIterationTimeModel
from scheduler.estimation.output_lengths import cold_lengths, mean_of, product_limit
from scheduler.estimation.traffic_monitor import TrafficMonitor, stratified
from scheduler.messages import Arrival, Telemetry
from scheduler.model.fluid import FluidEquilibrium
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.varying_rates import Stretch
from scheduler.model.workload import Lengths, RequestType, WorkloadMix
from scheduler.thresholds import UNKNOWN_TYPE, EngineLimits, Thresholds
from scheduler.tuning.fluid_plan import FluidPlan
from scheduler.tuning.forecast import Forecast
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo
from scheduler.tuning.solve import LEAST_RATE_RPS, mix_by_length, tune_counts, tune_fluid


@dataclass(frozen=True, slots=True)
class Proposal:
    """The thresholds for a replica, the equilibrium behind them (None: too little is known), and why.

    forecast: the plan of `fluid` with its estimates; None under another policy and without telemetry.
    """

    thresholds: Thresholds
    equilibrium: FluidEquilibrium | None
    reason: str
    forecast: Forecast | None = None


class ReplicaModel:
    """Running estimates of one replica under the configured policy, from its records or from its replica's digests.

    time_model: of the whole language model, as a profile has it; of a pipeline, the estimated one is that of a stage.
    shared: what its siblings know with it (None: nothing), to be set before `propose`.
    """

    def __init__(self, settings: TuningSettings, time_model: IterationTimeModel, configured: Thresholds) -> None:
        self._settings = settings
        self._configured = configured
        self._prior = time_model
        self._digested: DigestedEngine | None = None
        self._cursor = 0
        self.telemetry: Telemetry | None = None
        self.shared: Estimates | None = None

    def follow(self, settings: TuningSettings, configured: Thresholds) -> None:
        """Other settings and configured thresholds from now on; the estimates stay."""
        if settings != self._settings and "_records" in self.__dict__:
            self._records.follow(settings.window_s, settings.min_finished)
        self._settings, self._configured = settings, configured

    def observe(self, telemetry: Telemetry) -> None:
        """Take in one report. A report seen before changes nothing; a restarted engine starts the window anew."""
        if telemetry.digest is not None:
            self._digested, self._cursor = DigestedEngine(telemetry.digest, telemetry.clock_s), telemetry.cursor
        else:
            self._digested = None
            self._records.observe(telemetry)
            self._cursor = self._records.cursor
        self.telemetry = telemetry

    @cached_property
    def _records(self) -> EngineRecords:
        """What its records say; a replica that sends digests costs no memory for them."""
        return EngineRecords(self._prior, self._settings.window_s, self._settings.min_finished)

    def digest(self) -> Digest:
        """What the records come to, for whoever pools them."""
        if self._digested is not None:
            return self._digested.digest
        return self._records.digest(self._settings.overflow_probability)

    @property
    def cursor(self) -> int:
        """The records read so far."""
        return self._cursor

    @property
    def time_model(self) -> OnlineIterationTimeModel | DigestedTimes:
        """The replica's own iteration-time model."""
        return self._records.time_model if self._digested is None else self._digested.time_model

    @property
    def delivery_s(self) -> float:
        """Seconds from a first token in the engine until it has left the replica, for all but the accepted share; 0
        while too little is known, and at most half of what the targets leave."""
        own = self._records if self._digested is None else self._digested
        return self._bounded(own.delay_s(self._settings.overflow_probability) or 0.0)

    def _bounded(self, delivery_s: float) -> float:
        targets = self._settings.targets
        most_s = min((t for t in (targets.ttft_s, targets.latency_s) if t is not None), default=0.0) / 2
        return min(delivery_s, most_s)

    @property
    def rates(self) -> ArrivalRates:
        """Arrival rates, in all and by type, with intervals."""
        return self._traffic.rates if self._digested is None else self._digested.rates

    @property
    def rate_rps(self) -> float:
        """Arrivals per second since the last change, at most over the window."""
        return self.rates.total.value if self.telemetry else 0.0

    @property
    def miss_probability(self) -> float:
        """The accepted share of requests that miss a target."""
        return self._settings.overflow_probability

    @property
    def finished_seen(self) -> int:
        """Finished requests since the last change of lengths."""
        return self._traffic.finished_count if self._digested is None else self._digested.digest.finished_seen

    @property
    def _traffic(self) -> TrafficMonitor:
        return self._records.traffic

    @property
    def configured(self) -> Thresholds:
        """The thresholds of the configuration."""
        return self._configured

    @property
    def is_cold(self) -> bool:
        """Whether too few requests have finished, so that lengths are (partly) a prior."""
        return self.finished_seen < self._settings.min_finished and self.shared is None

    @property
    def least_outputs(self) -> int:
        """Ended outputs from which lengths count as known."""
        return self._settings.min_finished

    @property
    def limits(self) -> EngineLimits:
        """Those of the engine, once it has reported."""
        assert self.telemetry is not None
        return self.telemetry.limits

    @property
    def plans_for(self) -> Hashable:
        """What a plan depends on beside the estimates and the size of the KV cache."""
        return self._settings, self._configured, replace(self.limits, kv_capacity_tokens=0)

    def propose(self) -> Proposal:
        """The thresholds for the present estimates; the configured ones while too little is known."""
        if self.telemetry is None:
            return Proposal(self._configured, None, "no telemetry yet: the configured thresholds")
        if self._configured.policy == "fluid":
            return self._propose_fluid()
        if self.finished_seen < self._settings.min_finished:
            reason = (
                f"{self.finished_seen} finished requests seen, {self._settings.min_finished} needed: "
                "the configured thresholds"
            )
            return Proposal(self._configured, None, reason)
        if not self._traffic.arrivals:
            reason = f"no arrivals in the last {self._settings.window_s:g} s: the configured thresholds"
            return Proposal(self._configured, None, reason)
        mix = self._mix()
        thresholds, equilibrium = tune_counts(
            self._configured, mix, self.time_model.time_model, self.telemetry.limits,
            overflow_probability=self._settings.overflow_probability, steps=self._records.steps,
            over_time=self._over_time(mix),
        )
        thresholds = replace(thresholds, valid_for_s=self._settings.validity_s)
        return Proposal(thresholds, equilibrium, thresholds.reason)

    def _propose_fluid(self) -> Proposal:
        """`fluid` ignores declared lengths here; before any output is seen it uses a prior."""
        estimates = self.estimates
        thresholds, plan = self._plan(estimates)
        thresholds = replace(thresholds, valid_for_s=self._settings.validity_s)
        return Proposal(thresholds, plan.equilibrium, thresholds.reason, self._forecast(plan, estimates))

    def plan_for(
        self, rate_rps: float | None = None, targets: Slo | None = None, limits: EngineLimits | None = None
    ) -> FluidPlan | None:
        """The plan of `fluid` with the present estimates and another rate, other targets or other limits of the engine
        (None: the present ones). None without telemetry. Nothing here changes."""
        if self.telemetry is None:
            return None
        return self._plan(self.estimates, rate_rps=rate_rps, targets=targets, limits=limits)[1]

    @property
    def estimates(self) -> Estimates:
        """What a plan of `fluid` is made of: what its siblings know with it, else its own; no longer requests than this
        engine can hold."""
        known = self.shared or self._own()
        return replace(known, lengths=known.lengths.within(self._longest))

    def _own(self) -> Estimates:
        assert self.telemetry is not None
        own, now_s = self._records if self._digested is None else self._digested, self.telemetry.clock_s
        lengths, samples, since_s = self._own_lengths()
        return Estimates(
            time_model=own.time_model.time_model, error=own.time_model.error,
            iteration_s=own.time_model.iteration_time_s, rates=Rates.at(self.rates, now_s), lengths=lengths,
            samples=samples, lengths_since_s=now_s - since_s if math.isfinite(since_s) else None, cold=self.is_cold,
            reuse=own.prefix_reuse, steps=own.steps, margin=own.margin(self._settings.overflow_probability),
            delivery_s=own.delay_s(self._settings.overflow_probability) or 0.0,
        )

    def _own_lengths(self) -> tuple[Lengths, float, float]:
        """The lengths of requests, the ended outputs behind them, and the time of their last change."""
        guesses = _guesses(self._longest) if self.is_cold else ()
        if self._digested is not None:
            return *self._digested.lengths(self._longest, guesses), self._digested.lengths_since_s
        rates, answers = self._traffic.rates, self._traffic.answers(guessed=guesses)
        lengths = product_limit(answers, self._longest)
        lengths = stratified(lengths, [one.prompt_tokens for one in self._traffic.arrivals], rates)
        return lengths, float(answers.ended.sum()), self._traffic.answers_since_s

    def _plan(
        self, known: Estimates, *, rate_rps: float | None = None, targets: Slo | None = None,
        limits: EngineLimits | None = None,
    ) -> tuple[Thresholds, FluidPlan]:
        assert self.telemetry is not None
        rate_rps = known.rates.total.value if rate_rps is None else rate_rps
        mix = WorkloadMix((RequestType(UNKNOWN_TYPE, max(rate_rps, LEAST_RATE_RPS), known.lengths),))
        settings = self._settings
        return tune_fluid(
            self._configured, mix, known.time_model, limits or self.telemetry.limits, targets or settings.targets,
            miss_probability=settings.overflow_probability, error=known.error, dispersion=known.rates.dispersion,
            reuse=known.reuse, steps=known.steps, realised_margin=known.margin,
            delivery_s=self._bounded(known.delivery_s), cold=known.cold,
        )

    def _forecast(self, plan: FluidPlan, known: Estimates) -> Forecast:
        rates, error, times, lengths = known.rates, known.error, known.iteration_s, known.lengths
        return Forecast(
            plan=plan, miss_probability=self._settings.overflow_probability, rate_rps=rates.total,
            rate_by_type_rps=rates.by_type, rate_since_s=rates.since_s, dispersion=rates.dispersion,
            prompt_tokens=mean_of(lengths.prompt_tokens, lengths.weights, known.samples),
            output_tokens=mean_of(lengths.output_tokens, lengths.weights, known.samples),
            survival_samples=known.samples, survival_since_s=known.lengths_since_s,
            iteration_error_std=error.std_estimate, iteration_error_correlation=error.correlation,
            iteration_s=mean_estimate(*times, error.iterations) if times else None,
            iteration_std_s=times[1] if times else None, cold=known.cold, delivery_s=self._bounded(known.delivery_s),
        )

    def _mix(self) -> WorkloadMix:
        """The arrivals by type; without `wait`, which alone looks at declared lengths, one unknown type."""
        arrivals = self._traffic.arrivals
        declared = [
            (arrival.prompt_tokens, arrival.known_output_tokens)
            for arrival in arrivals
            if arrival.known_output_tokens is not None and self._configured.policy == "wait"
        ]
        # A moment without arrivals must not lead to a rate of 0.
        rate_rps = self.rate_rps or self._traffic.rates.total.high / 2
        lengths = product_limit(self._traffic.answers(), self._longest)
        return mix_by_length(
            declared, len(arrivals) - len(declared), lengths, rate_rps=rate_rps, longest=self._longest
        )

    def _over_time(self, mix: WorkloadMix) -> tuple[Stretch, ...]:
        """The types of `mix` at the rates of each stretch while rates vary within a control period; else empty."""
        bounds = [
            (int(t.name.removeprefix("output<=")), t.name) for t in mix.types if t.name != UNKNOWN_TYPE
        ]

        def type_of(arrival: Arrival) -> str:
            length = arrival.known_output_tokens
            if length is None or not bounds:
                return UNKNOWN_TYPE
            return next((name for bound, name in bounds if length <= bound), bounds[-1][1])

        stretches = []
        for seconds, arrivals in self._traffic.stretches:
            counts = Counter(type_of(arrival) for arrival in arrivals)
            types = tuple(replace(t, rate_rps=counts[t.name] / seconds) for t in mix.types)
            stretches.append(Stretch(seconds, WorkloadMix(types)))
        return tuple(stretches)

    @property
    def _longest(self) -> int:
        assert self.telemetry is not None
        return self.telemetry.limits.longest_request


def _guesses(longest: int) -> list[tuple[int, int]]:
    """A few pairs of `cold_lengths`, in place of finished requests until there are enough."""
    lengths = cold_lengths(longest)
    prompts, outputs = np.unique(lengths.prompt_tokens), np.unique(lengths.output_tokens)
    # A step coprime to their number visits all prompts, unrelated to the outputs.
    return [(int(prompts[(7 * place) % len(prompts)]), int(output)) for place, output in enumerate(outputs)]
