"""One engine under a controller: measured where no profile is known, tuned, and told apart from renewals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from synthetic_engine import LIMITS, PAPER, SyntheticEngine

from scheduler.messages import Ack, Apply
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.thresholds import Thresholds
from scheduler.tuning.engine_tuner import Change, EngineTuner
from scheduler.tuning.next_push import NextPush
from scheduler.tuning.replica_model import ReplicaModel
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo
from scheduler.tuning.solve import cold_thresholds

SETTINGS = TuningSettings(targets=Slo(ttft_s=3.0, tpot_s=0.08), min_finished=5, validity_s=10.0)
FLUID = Thresholds(policy="fluid")


def tuner(time_model: IterationTimeModel | None = None) -> EngineTuner:
    return EngineTuner(SETTINGS, time_model, FLUID)


def iterate(engine: SyntheticEngine, count: int) -> None:
    for number in range(count):
        engine.now_s += 0.02
        batch = (58 if number % 4 == 0 else 0, 10 + number % 7, 1000 + 100 * number)
        engine.iterate(*batch, PAPER.iteration_s(*map(float, batch)))


def test_without_a_profile_nothing_is_proposed_until_the_engine_has_been_measured() -> None:
    engine, tuned = SyntheticEngine(FLUID), tuner()
    iterate(engine, 20)
    proposal = tuned.learn(engine.report(tuned.cursor))
    push = tuned.next_push(engine.report(), proposal, now_s=0.0)
    assert tuned.is_measuring and tuned.cursor == 0, "the records are read again, with those that follow"
    assert push.thresholds is None and "19 iterations measured, 32 needed" in tuned.note
    assert tuned.shown["time_model"] is None and set(tuned.shown) == set(tuner(PAPER).shown)
    iterate(engine, 20)
    report = engine.report(tuned.cursor)
    push = tuned.next_push(report, tuned.learn(report), now_s=0.5)
    assert not tuned.is_measuring and tuned.cursor == report.cursor
    assert push.thresholds is not None and push.thresholds.version == 1 and push.thresholds.fluid is not None
    assert push.thresholds.fluid.cold, "lengths are guessed so far"
    assert tuned.shown["time_model"]["records"] == 40, "the records of the measurement count"


def test_a_measured_engine_is_tuned_as_one_with_its_profile() -> None:
    plans = {}
    for name, time_model in (("measured", None), ("profiled", PAPER)):
        engine, tuned = SyntheticEngine(FLUID), tuner(time_model)
        iterate(engine, 400)
        engine.traffic([(58, 100), (120, 200)], every_s=0.05, seconds=60.0)
        tuned.learn(engine.report(tuned.cursor))
        plans[name] = tuned.shown["forecast"]
    assert plans["measured"]["capacity_rps"] == pytest.approx(plans["profiled"]["capacity_rps"], rel=0.05)
    assert plans["measured"]["bottleneck"] == plans["profiled"]["bottleneck"]


def test_without_a_profile_the_engine_s_own_estimate_is_the_first_model() -> None:
    """Its first thresholds carry it, as do those of an earlier controller; a wrong one is refined as a profile is."""
    guess = PAPER.faster(1.5)
    configured = cold_thresholds(FLUID, guess, LIMITS, SETTINGS.targets, overflow_probability=0.01)
    engine, tuned = SyntheticEngine(configured), tuner()
    first = tuned.learn(engine.report())
    assert not tuned.is_measuring and tuned.time_model == guess
    assert first.thresholds.fluid is not None and first.thresholds.fluid.cold
    iterate(engine, 400)
    tuned.learn(engine.report(tuned.cursor))
    assert tuned.time_model is not None
    for batch in ((0.0, 12.0, 5000.0), (58.0, 14.0, 20_000.0)):
        assert tuned.time_model.iteration_s(*batch) == pytest.approx(PAPER.iteration_s(*batch), rel=0.05)


def test_in_a_pipeline_the_measured_model_is_a_stage_s() -> None:
    engine, tuned = SyntheticEngine(FLUID), tuner()
    engine.limits = replace(engine.limits, pipeline_depth=2)
    iterate(engine, 60)
    tuned.learn(engine.report())
    base = tuned.shown["time_model"]
    assert base["d0_s"] == pytest.approx(PAPER.d0_s, rel=0.1), "iterations are a stage's already"


def test_a_change_is_told_from_a_renewal_and_a_rejection() -> None:
    tuned = tuner(PAPER)
    new = Thresholds(version=4, policy="fluid", reason="because")
    accepted, stale = Ack(accepted=True, active_version=4), Ack(accepted=False, active_version=7, reason="not newer")
    changed, renewed = NextPush(new, "because", changed=True), NextPush(new, "because")
    change = tuned.answered(FLUID, changed, accepted, now_s=1.0)
    assert change == Change(FLUID, new, True, "because")
    assert tuned.answered(FLUID, renewed, accepted, now_s=1.0) is None
    refused = tuned.answered(FLUID, renewed, stale, now_s=1.0)
    assert refused is not None and not refused.accepted and tuned.note == "rejected: not newer"


def test_thresholds_are_renewed_when_half_their_validity_is_over() -> None:
    engine, tuned = SyntheticEngine(FLUID), tuner(PAPER)
    iterate(engine, 40)

    def pushed_at(now_s: float) -> NextPush:
        report = engine.report(tuned.cursor)
        return tuned.next_push(report, tuned.learn(report), now_s)

    first = pushed_at(100.0)
    assert first.thresholds is not None and first.changed
    ack = engine.active.offer(Apply(thresholds=first.thresholds))
    tuned.answered(FLUID, first, ack, now_s=100.0)
    assert pushed_at(104.0).thresholds is None
    renewal = pushed_at(106.0)
    assert renewal.thresholds is not None and not renewal.changed and renewal.thresholds.version == 2


def test_a_model_that_fails_is_made_anew_after_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, tuned = SyntheticEngine(FLUID), tuner(PAPER)
    iterate(engine, 40)
    observe = ReplicaModel.observe

    def failing(self: ReplicaModel, telemetry: object) -> None:
        raise RuntimeError("bad record")

    monkeypatch.setattr(ReplicaModel, "observe", failing)
    with pytest.raises(RuntimeError, match="bad record"):
        tuned.learn(engine.report(tuned.cursor))
    monkeypatch.setattr(ReplicaModel, "observe", observe)
    assert tuned.cursor == engine.report().cursor, "the bad records are not read again"
    iterate(engine, 3)
    tuned.learn(engine.report(tuned.cursor))
    assert tuned.shown["time_model"]["records"] == 3
