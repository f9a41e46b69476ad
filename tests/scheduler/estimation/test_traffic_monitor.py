"""A replica's model under `fluid`: cold at first, then certain, and quick to follow a change."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic_engine import LIMITS, SyntheticEngine

from scheduler.estimation.arrival_rates import arrival_rates
from scheduler.estimation.traffic_monitor import TrafficMonitor, length_classes, stratified
from scheduler.messages import RunningLengths
from scheduler.model.profiles import load_profile
from scheduler.model.workload import Lengths
from scheduler.thresholds import Thresholds
from scheduler.tuning.difference import materially_different
from scheduler.tuning.replica_model import ReplicaModel
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo
from scheduler.tuning.solve import cold_thresholds

TIME_MODEL = load_profile("a100-llama2-7b").time_model
TARGETS = Slo(ttft_s=3.0, tpot_s=0.08)
SETTINGS = TuningSettings(targets=TARGETS)
PERIOD_S, ITERATION_S = 5.0, 0.05


class Replica:
    """A synthetic engine with Poisson arrivals, whose outputs gain a token per iteration."""

    def __init__(self, seed: int = 1) -> None:
        self.engine = SyntheticEngine()
        self.model = ReplicaModel(SETTINGS, TIME_MODEL, Thresholds(policy="fluid"))
        self._random = np.random.default_rng(seed)
        self._running: list[list[int]] = []

    def period(self, rate_rps, prompt=300, output=100, slowdown=1.0, noise=0.01):
        """One controller period; outputs are geometric. Returns what the model then proposes."""
        for _ in range(round(PERIOD_S / ITERATION_S)):
            self.engine.now_s += ITERATION_S
            for _ in range(self._random.poisson(rate_rps * ITERATION_S)):
                self.engine.arrive(prompt)
                self._running.append([prompt, 0, int(self._random.geometric(1 / output))])
            for one in self._running:
                one[1] += 1
                if one[1] == one[2]:
                    self.engine.finish(one[0], one[1])
            self._running = [one for one in self._running if one[1] < one[2]]
            batch = (int(self._random.integers(0, 500)), len(self._running), 300 * len(self._running))
            seconds = slowdown * TIME_MODEL.iteration_s(*batch) * (1 + noise * self._random.standard_normal())
            self.engine.iterate(*batch, seconds)
        report = self.engine.report(self.model.cursor)
        running = tuple(RunningLengths(prompt, done) for prompt, done, _ in self._running)
        self.model.observe(replace(report, running=running))
        return self.model.propose()


def test_before_anything_is_seen_the_proposal_is_as_careful_as_the_engine_s_own_start():
    replica = Replica()
    replica.model.observe(replica.engine.report())
    proposal = replica.model.propose()
    cold = cold_thresholds(Thresholds(policy="fluid"), TIME_MODEL, LIMITS, TARGETS, overflow_probability=0.01)
    assert proposal.forecast.cold
    assert proposal.thresholds.fluid.iteration_s == pytest.approx(cold.fluid.iteration_s, rel=0.05)


def test_the_forecast_covers_the_truth_and_is_json():
    replica = Replica()
    for _ in range(14):
        proposal = replica.period(8.0)
    forecast = proposal.forecast
    assert not forecast.cold
    assert forecast.rate_rps.covers(8.0)
    assert forecast.output_tokens.covers(100)
    assert forecast.prompt_tokens.covers(300)
    assert forecast.iteration_error_std.covers(0.01)
    assert forecast.survival_samples == replica.model.finished_seen > 300
    assert forecast.plan.bottleneck == "nothing"
    assert forecast.plan.goodput_rps == pytest.approx(forecast.rate_rps.value)
    data = json.loads(json.dumps(forecast.as_dict(), allow_nan=False))
    assert set(data["rate_rps"]) == {"value", "low", "high"}
    assert list(data["rate_by_type_rps"]) == ["prompt<=1024"]
    assert "bottleneck: nothing" in proposal.reason


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
@pytest.mark.slow
def test_a_step_in_rate_settles_within_three_periods_and_stays(factor):
    replica = Replica(seed=2)
    for _ in range(14):
        replica.period(6.0)
    for _ in range(3):
        settled = replica.period(6.0 * factor)
    assert settled.forecast.rate_rps.value == pytest.approx(6.0 * factor, rel=0.3)
    pushed, pushes = settled.thresholds, 0
    for _ in range(10):
        proposed = replica.period(6.0 * factor).thresholds
        if materially_different(proposed, pushed):
            pushed, pushes = proposed, pushes + 1
    assert pushes <= 1  # the estimate gets better; it does not swing
    assert replica.model.rates.total.covers(6.0 * factor)


def test_steady_traffic_leaves_the_thresholds_alone():
    replica = Replica(seed=3)
    for _ in range(20):
        settled = replica.period(6.0)
    different = [materially_different(replica.period(6.0).thresholds, settled.thresholds) for _ in range(12)]
    assert not any(different)


def test_longer_answers_are_noticed_before_many_have_ended():
    replica = Replica(seed=4)
    for _ in range(20):
        before = replica.period(6.0, output=60)
    for _ in range(4):
        after = replica.period(6.0, output=400)
    assert after.forecast.survival_since_s < 25
    assert before.forecast.output_tokens.value == pytest.approx(60, rel=0.15)
    assert after.forecast.output_tokens.value > 180


def test_longer_prompts_are_noticed_in_the_arrivals():
    replica = Replica(seed=5)
    for _ in range(14):
        before = replica.period(6.0, prompt=100)
    for _ in range(2):
        after = replica.period(6.0, prompt=2000)
    assert after.forecast.prompt_tokens.value > 1500
    assert after.forecast.plan.capacity_rps < 0.5 * before.forecast.plan.capacity_rps


def test_a_replica_at_half_its_speed_is_followed_within_three_periods():
    replica = Replica(seed=6)
    for _ in range(14):
        before = replica.period(6.0)
    for _ in range(3):
        after = replica.period(6.0, slowdown=2.0)
    assert after.thresholds.fluid.time_model.iteration_s(200, 80, 40_000) == pytest.approx(
        2 * TIME_MODEL.iteration_s(200, 80, 40_000), rel=0.1
    )
    assert after.forecast.plan.tpot_margin < 2 * before.forecast.plan.tpot_margin + 0.01
    for _ in range(3):
        again = replica.period(6.0)
    assert again.forecast.plan.capacity_rps == pytest.approx(before.forecast.plan.capacity_rps, rel=0.15)


def test_classes_of_lengths():
    assert length_classes([1, 2, 4, 5, 16, 17, 1024, 1025]).tolist() == [1, 4, 4, 16, 16, 64, 1024, 4096]


def test_strata_are_as_frequent_as_they_arrive():
    lengths = Lengths(np.array([50, 3000]), np.array([10, 200]), np.array([0.9, 0.1]))
    rates = arrival_rates([float(x) for x in range(20)], ["prompt<=4096"] * 20, 0.0, 20.0)
    assert stratified(lengths, [3000] * 20, rates) == Lengths.point(3000, 200)
    new = stratified(Lengths.point(50, 10), [3000] * 20, rates)
    assert new == Lengths.point(3000, 10)
    assert stratified(lengths, [], arrival_rates([], [], 0.0, 20.0)) == lengths


def test_no_request_has_an_entry_where_no_progress_is_known():
    engine, traffic = SyntheticEngine(), TrafficMonitor(60.0, 20)
    engine.traffic([(50, 100)], every_s=0.1, seconds=30)
    report = engine.report()
    traffic.restart(report)
    traffic.observe(report, 0)
    assert traffic.finished_count == 300
    assert math.isinf(traffic.answers_since_s)


def test_outputs_are_truncated_and_censored_to_the_interval():
    """The example of `TrafficMonitor.answers_between`, from 100 s until 120 s with one token a second."""
    engine, monitor = SyntheticEngine(), TrafficMonitor(window_s=60.0, least_answers=20)
    ends = {90: (1, 50), 110: (2, 30), 125: (3, 30), 130: (4, 8)}
    for second in range(1, 131):
        engine.now_s = float(second)
        engine.iterate(0, 1, 100, 1.0)
        if second in ends:
            engine.finish(*ends[second])
    monitor.observe(replace(engine.report(), running=(RunningLengths(5, 12),)), cursor=0)
    seen = monitor.answers_between(100.0, 120.0)
    columns = (seen.prompt_tokens, seen.entry, seen.output_tokens, seen.ended)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == [
        (2, 20.0, 30, True), (3, 5.0, 25, False), (5, 0.0, 2, False),
    ]
