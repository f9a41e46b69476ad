"""What the controller knows of one replica, and the thresholds that follow from it. No Ray, no vLLM, no clock.

Fed with telemetry, it keeps the service-time law (refined online from the profile's) and a `TrafficMonitor` of
arrivals and answers; asked, it solves the fluid model and says what it would put in force, and why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from scheduler.estimation.arrival_rates import ArrivalRates
from scheduler.estimation.intervals import mean_estimate
from scheduler.estimation.iteration_time_online import OnlineIterationTimeModel
from scheduler.estimation.output_lengths import cold_lengths, mean_of, product_limit
from scheduler.estimation.realised_margin import LastingQuantile, RealisedMargin
from scheduler.estimation.steps_seen import StepsSeen
from scheduler.estimation.traffic_monitor import TrafficMonitor, stratified
from scheduler.fluid_params import FluidParams
from scheduler.messages import Arrival, Telemetry
from scheduler.model.fluid import FluidEquilibrium
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.varying_rates import Stretch
from scheduler.model.workload import Lengths, RequestType, WorkloadMix
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds
from scheduler.tuning.fluid_plan import FluidPlan
from scheduler.tuning.forecast import Forecast
from scheduler.tuning.slo import Slo
from scheduler.tuning.solve import LEAST_RATE_RPS, mix_by_length, tune

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
FLUID_TOLERANCES: Mapping[str, Tolerance] = {
    # What an operator or an engine sets, and what follows from that alone.
    **dict.fromkeys(("kv_limit_tokens", "block_tokens", "overflow_z", "miss_probability"), _EXACT),
    **dict.fromkeys(("tpot_s", "ttft_s", "latency_s", "pipeline_depth", "cold"), _EXACT),
    # What the engine's iterations are held to. The law is compared by the iteration times it gives.
    **dict.fromkeys(("time_model", "iteration_s", "tokens_per_step", "computed_per_step"), _TIME),
    "survival": Tolerance(least=0.05),
    # What follows from estimates of arrivals, and so moves most.
    **dict.fromkeys(("prompt_flow_tokens", "capacity_rps", "steady_s", "variability"), _ESTIMATE),
    "first_token_within_s": _ESTIMATE,
    "queue_limit": Tolerance(_SETTLED, 1.0),
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
    def targets(self) -> Slo: ...


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

    def __init__(self, config: Tuning, time_model: IterationTimeModel, configured: Thresholds) -> None:
        self._config = config
        self._configured = configured
        self._watch = TrafficMonitor(config.window_s, config.min_finished)
        self._profiled, self._depth = time_model, 1
        self.time_model = OnlineIterationTimeModel(time_model)
        self._realised, self._delays = RealisedMargin(), LastingQuantile()
        self._steps = StepsSeen(config.window_s)
        self._delivered = 0
        self.cursor = 0
        self.telemetry: Telemetry | None = None
        self._engine_id = ""

    def observe(self, telemetry: Telemetry) -> None:
        """Take in one report. A report seen before changes nothing; a restarted engine starts the window anew."""
        if telemetry.limits.pipeline_depth != self._depth:
            self._depth = telemetry.limits.pipeline_depth
            self.time_model = OnlineIterationTimeModel(self._profiled.of_stage(self._depth))
        if telemetry.engine_id != self._engine_id:
            self._engine_id, self.cursor, self._delivered = telemetry.engine_id, 0, 0
            self._watch.restart(telemetry)
            self._steps.restart()
        for iteration in telemetry.iterations:
            if iteration.seq > self.cursor:
                self.time_model.update(
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
        params = telemetry.thresholds.fluid
        if params is None or params.token_s is None or params.cold:
            return
        finished = [done for done in telemetry.finished if done.seq > self.cursor and not done.aborted]
        for got in delivered if telemetry.delivered else finished:
            if got.tpot_s is not None:
                self._realised.observe(got.tpot_s, params.token_s)

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
        mix = self._mix()
        tuned = tune(
            self._configured, mix, self.time_model.time_model, self.telemetry.limits,
            overflow_probability=self._config.overflow_probability, steps=self._steps.steps,
            over_time=self._over_time(mix),
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
            self.time_model.time_model, self.telemetry.limits, overflow_probability=self._config.overflow_probability,
            targets=self._config.targets, fluctuation=self.time_model.fluctuation, dispersion=rates.dispersion,
            cold=cold, reuse=self._watch.prefix_reuse, steps=self._steps.steps,
            realised_margin=self._realised.margin(self._config.overflow_probability), delivery_s=self.delivery_s,
        )
        assert tuned.plan is not None
        thresholds = replace(tuned.thresholds, valid_for_s=self._config.validity_s)
        forecast = self._forecast(tuned.plan, lengths, samples, cold=cold)
        return Proposal(thresholds, tuned.equilibrium, thresholds.reason, forecast)

    def _forecast(self, plan: FluidPlan, lengths: Lengths, samples: float, *, cold: bool) -> Forecast:
        assert self.telemetry is not None
        rates, strays, now_s = self._watch.rates, self.time_model.fluctuation, self.telemetry.clock_s
        times, since_s = self.time_model.iteration_time_s, self._watch.answers_since_s
        return Forecast(
            bottleneck=plan.bottleneck, goodput_rps=plan.goodput_rps, capacity_rps=plan.capacity_rps,
            load=plan.load, miss_probability=self._config.overflow_probability, in_time=plan.in_time,
            tpot_margin=plan.tpot_margin, tpot_s=plan.tpot_s, ttft_s=plan.fluid.first_token_limit_s,
            queue_limit=plan.fluid.queue_limit, rate_rps=rates.total, rate_by_type_rps=rates.by_type,
            rate_since_s=now_s - rates.since_s, dispersion=rates.dispersion,
            prompt_tokens=mean_of(lengths.prompt_tokens, lengths.weights, samples),
            output_tokens=mean_of(lengths.output_tokens, lengths.weights, samples), survival_samples=samples,
            survival_since_s=now_s - since_s if math.isfinite(since_s) else None,
            iteration_error_std=strays.std_estimate, iteration_error_correlation=strays.correlation,
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

    def _over_time(self, mix: WorkloadMix) -> tuple[Stretch, ...]:
        """The types of `mix` at the rates of each stretch while rates move within a period; nothing otherwise."""
        bounds = [
            (int(t.name.removeprefix("output<=")), t.name) for t in mix.types if t.name != UNKNOWN_TYPE
        ]

        def type_of(arrival: Arrival) -> str:
            length = arrival.known_output_tokens
            if length is None or not bounds:
                return UNKNOWN_TYPE
            return next((name for bound, name in bounds if length <= bound), bounds[-1][1])

        stretches = []
        for seconds, arrivals in self._watch.stretches:
            counts = Counter(type_of(arrival) for arrival in arrivals)
            types = tuple(replace(t, rate_rps=counts[t.name] / seconds) for t in mix.types)
            stretches.append(Stretch(seconds, WorkloadMix(types)))
        return tuple(stretches)

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


def materially_different(proposed: Thresholds, active: Thresholds) -> bool:
    """False when a change would be noise: the same rule, or every count within a tenth (or one) of what it is."""
    if proposed.same_rule(active):
        return False
    if proposed.fluid and active.fluid:
        return not _same_params(proposed.fluid, active.fluid)
    counts, current = _counts(proposed), _counts(active)
    last = _last_end(proposed, active)
    without_counts = _without_counts(proposed, last).same_rule(_without_counts(active, last))
    if not without_counts or len(counts) != len(current):
        return True
    return any(abs(new - old) > max(1.0, _SETTLED * old) for new, old in zip(counts, current, strict=True))


def _same_params(new: FluidParams, old: FluidParams) -> bool:
    """True when new parameters would change little; a field that `FLUID_TOLERANCES` leaves out may not change."""
    return all(
        FLUID_TOLERANCES.get(field.name, Tolerance()).covers(getattr(new, field.name), getattr(old, field.name))
        for field in fields(FluidParams) if field.name not in ("time_model", "survival")
    ) and _same_time_model(new, old) and _same_survival(new, old)


def _same_time_model(new: FluidParams, old: FluidParams) -> bool:
    """Iterations of a full batch, with prompts and without, within a twentieth."""
    prompts = old.prompt_flow_tokens or _PROMPT_TOKENS
    loads = ((0.0, 100.0, float(old.kv_limit_tokens)), (prompts, 100.0, float(old.kv_limit_tokens)))
    return all(
        FLUID_TOLERANCES["time_model"].covers(new.time_model.iteration_s(*load), old.time_model.iteration_s(*load))
        for load in loads
    )


def _same_survival(new: FluidParams, old: FluidParams) -> bool:
    at = [x for x, _ in (*new.survival, *old.survival)]
    return float(np.max(np.abs(_survival_at(new, at) - _survival_at(old, at)))) <= FLUID_TOLERANCES["survival"].least


def _survival_at(params: FluidParams, at: list[int]) -> NDArray[np.float64]:
    lengths, survival = zip(*params.survival, strict=True)
    return np.asarray(np.interp(at, lengths, survival, right=0.0), dtype=np.float64)


def _counts(thresholds: Thresholds) -> list[int]:
    counts = [entry.n or 0 for entry in thresholds.types] + [segment.total for segment in thresholds.segments]
    return [*counts, thresholds.max_running or 0]


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
        max_running=None if thresholds.max_running is None else 1,
    )
