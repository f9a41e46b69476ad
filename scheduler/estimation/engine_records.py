"""One engine's records, taken in report by report: what they say of its iterations and its traffic. No clock."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from scheduler.digest import Digest, Interval, Period
from scheduler.estimation.intervals import Estimate
from scheduler.estimation.iteration_time_online import OnlineIterationTimeModel
from scheduler.estimation.length_counts import LengthCounts
from scheduler.estimation.realised_margin import LastingQuantile, RealisedMargin
from scheduler.estimation.steps_seen import StepsSeen
from scheduler.estimation.traffic_monitor import TrafficMonitor
from scheduler.messages import Finished, Iteration, Telemetry
from scheduler.model.fluid import PrefixReuse
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.steps import Steps

SLOW_QUANTILE = 0.95


class EngineRecords:
    """Running estimates of one engine.

    prior: the iteration-time model of the whole language model, as a profile has it; of a pipeline, the estimated one
    is that of a stage. window_s: seconds of arrivals that count; least_answers: ended outputs before a change of their
    lengths counts.
    """

    def __init__(self, prior: IterationTimeModel, window_s: float, least_answers: int) -> None:
        self._profiled, self._depth = prior, 1
        self.time_model = OnlineIterationTimeModel(prior)
        self.traffic = TrafficMonitor(window_s, least_answers)
        self.steps_seen = StepsSeen(window_s)
        self._realised, self._delays = RealisedMargin(), LastingQuantile()
        self._delivered = 0
        self.cursor = 0
        self.now_s = 0.0
        self._engine_id = ""
        self._latest: tuple[list[Iteration], list[Finished], IterationTimeModel] = ([], [], prior)

    def follow(self, window_s: float, least_answers: int) -> None:
        """Another window and least number of outputs from now on; the estimates stay."""
        self.traffic.follow(window_s, least_answers)
        self.steps_seen.follow(window_s)

    def observe(self, telemetry: Telemetry) -> None:
        """Take in one report. A report seen before changes nothing; a restarted engine starts the window anew."""
        if telemetry.limits.pipeline_depth != self._depth:
            self._depth = telemetry.limits.pipeline_depth
            self.time_model = OnlineIterationTimeModel(self._profiled.of_stage(self._depth))
        if telemetry.engine_id != self._engine_id:
            self._engine_id, self.cursor, self._delivered = telemetry.engine_id, 0, 0
            self.traffic.restart(telemetry)
            self.steps_seen.restart()
        fresh = [iteration for iteration in telemetry.iterations if iteration.seq > self.cursor]
        done = [one for one in telemetry.finished if one.seq > self.cursor and not one.aborted]
        self._latest = fresh, done, self.time_model.time_model
        for iteration in fresh:
            self.time_model.update(
                iteration.prefill_tokens, iteration.decode_tokens, iteration.kv_tokens, iteration.seconds
            )
        self._observe_finished(telemetry, done)
        self.steps_seen.observe(telemetry.clock_s, telemetry.counters)
        self.traffic.observe(telemetry, self.cursor, self.steps_seen.steps.tokens)
        self.cursor = max(self.cursor, telemetry.cursor)
        self.now_s = telemetry.clock_s

    def _observe_finished(self, telemetry: Telemetry, finished: list[Finished]) -> None:
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
        for got in delivered if telemetry.delivered else finished:
            if got.tpot_s is not None:
                self._realised.observe(got.tpot_s, params.token_s)

    @property
    def steps(self) -> Steps:
        """Tokens gained and computed per step."""
        return self.steps_seen.steps

    @property
    def prefix_reuse(self) -> PrefixReuse:
        """The effect of the prefix cache on the latest finished requests."""
        return self.traffic.prefix_reuse

    def margin(self, miss_probability: float) -> float:
        """The TPOT margin that the latest requests would have needed; 0 while too little is known."""
        return self._realised.margin(miss_probability)

    def delay_s(self, miss_probability: float) -> float | None:
        """Seconds from a first token in the engine until it has left the replica, for all but this share."""
        return self._delays.of_all_but(miss_probability)

    def digest(self, miss_probability: float) -> Digest:
        """All of it, as sums."""
        traffic, steps, since_s = self.traffic, self.steps_seen.steps, self.traffic.answers_since_s
        prompts, cached, shared = traffic.reused_tokens
        return Digest(
            time_model=self.time_model.time_model, records=self.time_model.records, time_sums=self.time_model.sums.sums,
            errors=self.time_model.statistics.sums, rate_rps=_interval(traffic.rates.total),
            rates_by_type_rps={name: _interval(rate) for name, rate in traffic.rates.by_type.items()},
            rate_since_s=self.now_s - traffic.rates.since_s, dispersion=traffic.rates.dispersion,
            lengths=LengthCounts.of(traffic.answers()).written(), finished_seen=traffic.finished_count,
            lengths_since_s=self.now_s - since_s if math.isfinite(since_s) else None,
            prompt_tokens=prompts, cached_tokens=cached, shared_tokens=shared, decode_steps=self.steps_seen.number,
            tokens_step=steps.tokens, computed_step=steps.computed, tokens_step_std=steps.tokens_std,
            margin=self.margin(miss_probability) if self._realised.is_known else None,
            delay_s=self.delay_s(miss_probability), period=period_of(*self._latest),
        )


def period_of(iterations: list[Iteration], done: list[Finished], predicted_by: IterationTimeModel | None) -> Period:
    """What these records say of themselves."""
    ttfts, tpots = [one.ttft_s for one in done], [one.tpot_s for one in done]
    predicted_s = None
    if iterations and predicted_by is not None:
        prefill, decode, kv = np.array([one[3:6] for one in iterations], dtype=np.float64).T
        predicted_s = float(np.mean(predicted_by.iteration_s(prefill, decode, kv)))
    return Period(
        ttft_s=_quantile(ttfts, 0.5), ttft_slow_s=_quantile(ttfts, SLOW_QUANTILE), tpot_s=_quantile(tpots, 0.5),
        tpot_slow_s=_quantile(tpots, SLOW_QUANTILE),
        iteration_s=float(np.mean([one.seconds for one in iterations])) if iterations else None,
        predicted_s=predicted_s,
    )


def _quantile(values: Iterable[float | None], share: float) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.quantile(known, share)) if known else None


def _interval(estimate: Estimate) -> Interval:
    return estimate.value, estimate.low, estimate.high
