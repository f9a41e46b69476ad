"""The controller's model of one replica, and the thresholds that follow from it. No Ray, no vLLM, no clock.

From telemetry it keeps the iteration-time model (refined online from the profile's) and a `TrafficMonitor` of arrivals
and outputs; on request it solves the fluid model and proposes thresholds with a reason.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from scheduler.estimation.arrival_rates import ArrivalRates
from scheduler.estimation.intervals import mean_estimate
from scheduler.estimation.iteration_time_online import OnlineIterationTimeModel
from scheduler.estimation.output_lengths import cold_lengths, mean_of, product_limit
from scheduler.estimation.realised_margin import LastingQuantile, RealisedMargin
from scheduler.estimation.steps_seen import StepsSeen
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
    """Running estimates of one replica under the configured policy.

    time_model: of the whole language model, as a profile has it; of a pipeline, the estimated one is that of a stage.
    """

    def __init__(self, settings: TuningSettings, time_model: IterationTimeModel, configured: Thresholds) -> None:
        self._settings = settings
        self._configured = configured
        self._traffic = TrafficMonitor(settings.window_s, settings.min_finished)
        self._profiled, self._depth = time_model, 1
        self.time_model = OnlineIterationTimeModel(time_model)
        self._realised, self._delays = RealisedMargin(), LastingQuantile()
        self._steps = StepsSeen(settings.window_s)
        self._delivered = 0
        self.cursor = 0
        self.telemetry: Telemetry | None = None
        self._engine_id = ""

    def follow(self, settings: TuningSettings, configured: Thresholds) -> None:
        """Other settings and configured thresholds from now on; the estimates stay."""
        if settings != self._settings:
            self._traffic.follow(settings.window_s, settings.min_finished)
            self._steps.follow(settings.window_s)
        self._settings, self._configured = settings, configured

    def observe(self, telemetry: Telemetry) -> None:
        """Take in one report. A report seen before changes nothing; a restarted engine starts the window anew."""
        if telemetry.limits.pipeline_depth != self._depth:
            self._depth = telemetry.limits.pipeline_depth
            self.time_model = OnlineIterationTimeModel(self._profiled.of_stage(self._depth))
        if telemetry.engine_id != self._engine_id:
            self._engine_id, self.cursor, self._delivered = telemetry.engine_id, 0, 0
            self._traffic.restart(telemetry)
            self._steps.restart()
        for iteration in telemetry.iterations:
            if iteration.seq > self.cursor:
                self.time_model.update(
                    iteration.prefill_tokens, iteration.decode_tokens, iteration.kv_tokens, iteration.seconds
                )
        self._observe_finished(telemetry)
        self._steps.observe(telemetry.clock_s, telemetry.counters)
        self._traffic.observe(telemetry, self.cursor, self._steps.steps.tokens)
        self.cursor = max(self.cursor, telemetry.cursor)
        self.telemetry = telemetry

    def _observe_finished(self, telemetry: Telemetry) -> None:
        """Compare the TPOT of finished requests with the plan; a cold plan is not compared.

        Uses the times at which outputs left the replica where it reports them.
        """
        delivered = [done for done in telemetry.delivered if done.seq > self._delivered]
        for done in delivered:
            if done.delay_s is not None:
                self._delays.observe(done.delay_s)
        self._delivered = max([self._delivered, *(done.seq for done in delivered)])
        params = telemetry.thresholds.fluid
        if params is None or params.token_s is None or params.cold:
            return
        finished = [done for done in telemetry.finished if done.seq > self.cursor and not done.aborted]
        for got in delivered if telemetry.delivered else finished:
            if got.tpot_s is not None:
                self._realised.observe(got.tpot_s, params.token_s)

    @property
    def delivery_s(self) -> float:
        """Seconds from a first token in the engine until it has left the replica, for all but the accepted share; 0
        while too little is known, and at most half of what the targets leave."""
        targets = self._settings.targets
        most_s = min((t for t in (targets.ttft_s, targets.latency_s) if t is not None), default=0.0) / 2
        return min(self._delays.of_all_but(self._settings.overflow_probability) or 0.0, most_s)

    @property
    def rates(self) -> ArrivalRates:
        """Arrival rates, in all and by type, with intervals."""
        return self._traffic.rates

    @property
    def rate_rps(self) -> float:
        """Arrivals per second since the last change, at most over the window."""
        return self._traffic.rates.total.value if self.telemetry else 0.0

    @property
    def miss_probability(self) -> float:
        """The accepted share of requests that miss a target."""
        return self._settings.overflow_probability

    @property
    def finished_seen(self) -> int:
        """Finished requests since the last change of lengths."""
        return self._traffic.finished_count

    @property
    def configured(self) -> Thresholds:
        """The thresholds of the configuration."""
        return self._configured

    @property
    def is_cold(self) -> bool:
        """Whether too few requests have finished, so that lengths are (partly) a prior."""
        return self.finished_seen < self._settings.min_finished

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
            overflow_probability=self._settings.overflow_probability, steps=self._steps.steps,
            over_time=self._over_time(mix),
        )
        thresholds = replace(thresholds, valid_for_s=self._settings.validity_s)
        return Proposal(thresholds, equilibrium, thresholds.reason)

    def _propose_fluid(self) -> Proposal:
        """`fluid` ignores declared lengths here; before any output is seen it uses a prior."""
        lengths, samples, cold = self._lengths()
        thresholds, plan = self._plan(lengths, cold=cold)
        thresholds = replace(thresholds, valid_for_s=self._settings.validity_s)
        forecast = self._forecast(plan, lengths, samples, cold=cold)
        return Proposal(thresholds, plan.equilibrium, thresholds.reason, forecast)

    def plan_for(
        self, rate_rps: float | None = None, targets: Slo | None = None, limits: EngineLimits | None = None
    ) -> FluidPlan | None:
        """The plan of `fluid` with the present estimates and another rate, other targets or other limits of the engine
        (None: the present ones). None without telemetry. Nothing here changes."""
        if self.telemetry is None:
            return None
        lengths, _, cold = self._lengths()
        return self._plan(lengths, cold=cold, rate_rps=rate_rps, targets=targets, limits=limits)[1]

    def _lengths(self) -> tuple[Lengths, float, bool]:
        """The lengths of requests, the ended outputs behind them, and whether they are (partly) a prior."""
        rates, cold = self._traffic.rates, self.is_cold
        answers = self._traffic.answers(guessed=_guesses(self._longest) if cold else ())
        lengths = product_limit(answers, self._longest)
        samples = float(answers.ended.sum())
        return stratified(lengths, [one.prompt_tokens for one in self._traffic.arrivals], rates), samples, cold

    def _plan(
        self, lengths: Lengths, *, cold: bool, rate_rps: float | None = None, targets: Slo | None = None,
        limits: EngineLimits | None = None,
    ) -> tuple[Thresholds, FluidPlan]:
        assert self.telemetry is not None
        rate_rps = self.rate_rps if rate_rps is None else rate_rps
        mix = WorkloadMix((RequestType(UNKNOWN_TYPE, max(rate_rps, LEAST_RATE_RPS), lengths),))
        settings = self._settings
        return tune_fluid(
            self._configured, mix, self.time_model.time_model, limits or self.telemetry.limits,
            targets or settings.targets, miss_probability=settings.overflow_probability, error=self.time_model.error,
            dispersion=self._traffic.rates.dispersion, reuse=self._traffic.prefix_reuse, steps=self._steps.steps,
            realised_margin=self._realised.margin(settings.overflow_probability), delivery_s=self.delivery_s, cold=cold,
        )

    def _forecast(self, plan: FluidPlan, lengths: Lengths, samples: float, *, cold: bool) -> Forecast:
        assert self.telemetry is not None
        rates, error, now_s = self._traffic.rates, self.time_model.error, self.telemetry.clock_s
        times, since_s = self.time_model.iteration_time_s, self._traffic.answers_since_s
        return Forecast(
            plan=plan, miss_probability=self._settings.overflow_probability, rate_rps=rates.total,
            rate_by_type_rps=rates.by_type, rate_since_s=now_s - rates.since_s, dispersion=rates.dispersion,
            prompt_tokens=mean_of(lengths.prompt_tokens, lengths.weights, samples),
            output_tokens=mean_of(lengths.output_tokens, lengths.weights, samples), survival_samples=samples,
            survival_since_s=now_s - since_s if math.isfinite(since_s) else None,
            iteration_error_std=error.std_estimate, iteration_error_correlation=error.correlation,
            iteration_s=mean_estimate(*times, error.iterations) if times else None,
            iteration_std_s=times[1] if times else None, cold=cold, delivery_s=self.delivery_s,
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
        return self.telemetry.limits.max_model_len


def _guesses(longest: int) -> list[tuple[int, int]]:
    """A few pairs of `cold_lengths`, in place of finished requests until there are enough."""
    lengths = cold_lengths(longest)
    prompts, outputs = np.unique(lengths.prompt_tokens), np.unique(lengths.output_tokens)
    # A step coprime to their number visits all prompts, unrelated to the outputs.
    return [(int(prompts[(7 * place) % len(prompts)]), int(output)) for place, output in enumerate(outputs)]
