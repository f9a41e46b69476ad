"""Replicas of one kind share plans: few are made, each holds where it is used, and one replica is planned for alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from pool_engines import LAW, KnownEngine
from synthetic_engine import LIMITS

from scheduler.model.iteration_time import IterationTimeModel
from scheduler.thresholds import Thresholds
from scheduler.tuning import siblings as siblings_module
from scheduler.tuning.replica_model import Proposal, ReplicaModel
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.siblings import Siblings, in_turn
from scheduler.tuning.slo import Slo

SETTINGS = TuningSettings(targets=Slo(ttft_s=3.0, tpot_s=0.08))
FLUID = Thresholds(policy="fluid")
TARGETS_OF_ANOTHER = replace(SETTINGS, targets=Slo(ttft_s=1.0, tpot_s=0.05))


class Fleet:
    """Models of known engines that learn together. made: the plans made in the latest pass, by replica."""

    def __init__(self, engines: Sequence[KnownEngine], monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines = list(engines)
        self.models = {one.name: self.model() for one in engines}
        self.together, self.made = Siblings(LIMITS.max_model_len), list[str]()
        propose = ReplicaModel.propose

        def counted(model: ReplicaModel) -> Proposal:
            self.made += [name for name, one in self.models.items() if one is model]
            return propose(model)

        monkeypatch.setattr(ReplicaModel, "propose", counted)

    def model(self, law: IterationTimeModel = LAW) -> ReplicaModel:
        return ReplicaModel(SETTINGS, law, FLUID)

    def run(self, periods: int, seconds: float = 5.0, **changed: object) -> dict[str, Proposal]:
        for _ in range(periods):
            for engine in self.engines:
                model = self.models[engine.name]
                model.observe(engine.period(seconds, **changed))
                self.together.take(engine.name, model, engine.now_s)
            self.together.settle(self.engines[0].now_s)
            self.made.clear()
            found = {name: self.together.propose(name, self.models[name]) for name in self.models}
        return found


def test_one_plan_serves_all_equal_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet([KnownEngine(seed) for seed in range(10)], monkeypatch)
    plans = fleet.run(5)
    assert len(fleet.made) == 1
    assert len({id(plan) for plan in plans.values()}) == 1


def test_a_slow_replica_gets_one_more_plan_with_the_capacity_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet([KnownEngine(seed, slow=2.0 if seed == 3 else 1.0) for seed in range(8)], monkeypatch)
    plans = fleet.run(5)
    assert len(fleet.made) == 2 and "r3" in fleet.made
    assert set(fleet.together.deviations) == {"r3"}
    slow, usual = (plans[name].thresholds.fluid for name in ("r3", "r0"))
    assert slow is not None and usual is not None
    assert slow.capacity_rps < 0.65 * usual.capacity_rps


def test_a_single_replica_is_planned_for_as_if_there_were_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, alone = Fleet([KnownEngine(1)], monkeypatch), ReplicaModel(SETTINGS, LAW, FLUID)
    engine = KnownEngine(1)
    for _ in range(5):
        plans = fleet.run(1)
        alone.observe(engine.period())
        assert plans["r1"] == alone.propose(), "to the last digit"


def test_a_new_replica_is_planned_for_as_its_siblings_are_from_its_first_report_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = Fleet([KnownEngine(seed) for seed in range(5)], monkeypatch)
    fleet.run(5)
    new = KnownEngine(50)
    fleet.engines.append(new)
    fleet.models["r50"] = fleet.model(LAW.faster(1.4))
    plans = fleet.run(1, seconds=0.1, iterations=(), arrivals=(), finished=(), running=())
    own, siblings = plans["r50"].thresholds.fluid, plans["r0"].thresholds.fluid
    assert own == siblings and own is not None
    assert not own.cold, "measured knowledge, not a guess"
    assert plans["r50"].forecast is not None and plans["r50"].forecast.survival_samples > 100
    alone = fleet.models["r50"]
    alone.shared = None
    guess = alone.propose().thresholds.fluid
    assert guess is not None and guess.cold, "without siblings it is"


def test_replicas_with_other_targets_or_memory_do_not_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet([KnownEngine(seed) for seed in range(6)], monkeypatch)
    fleet.models["r1"].follow(TARGETS_OF_ANOTHER, FLUID)
    plans = fleet.run(4)
    assert sorted(fleet.made) == ["r0", "r1"]
    strict = plans["r1"].thresholds.fluid
    assert strict is not None and strict.tpot_s == 0.05

    less = replace(LIMITS, kv_capacity_tokens=LIMITS.kv_capacity_tokens // 2)
    fleet.models["r2"].observe(fleet.engines[2].period(limits=less))
    plans = {name: fleet.together.propose(name, fleet.models[name]) for name in fleet.models}
    half = plans["r2"].thresholds.fluid
    assert half is not None and half.kv_limit_tokens < less.kv_capacity_tokens


def test_a_plan_holds_for_the_smallest_memory_of_those_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal accelerators have a few blocks more or less."""
    fleet = Fleet([KnownEngine(seed) for seed in range(4)], monkeypatch)
    fleet.run(3)
    for number, engine in enumerate(fleet.engines):
        limits = replace(LIMITS, kv_capacity_tokens=LIMITS.kv_capacity_tokens - 16 * number)
        fleet.models[engine.name].observe(engine.period(limits=limits))
    fleet.made.clear()
    fleet.together.settle(fleet.engines[0].now_s)
    for name in reversed(list(fleet.models)):
        params = fleet.together.propose(name, fleet.models[name]).thresholds.fluid
        assert params is not None
        assert params.kv_limit_tokens < fleet.models[name].limits.kv_capacity_tokens
    assert len(fleet.made) == 1, "the smallest came first"


def test_plans_of_a_pass_are_bounded_and_every_replica_gets_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings_module, "_MOST_PLANS", 2)
    fleet = Fleet([KnownEngine(seed, slow=1.0 + 0.3 * seed) for seed in range(6)], monkeypatch)
    fleet.run(3)
    assert set(fleet.made) == set(fleet.models) or len(fleet.made) == 2, "first plans are always made"
    planned = set()
    for number in range(3):
        for engine in fleet.engines:
            fleet.models[engine.name].observe(engine.period())
        fleet.together.settle(fleet.engines[0].now_s)
        fleet.made.clear()
        for name in in_turn(fleet.models, number):
            fleet.together.propose(name, fleet.models[name])
        assert len(fleet.made) <= 2
        planned |= set(fleet.made)
    assert planned == set(fleet.models)


def test_no_plan_for_other_targets_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings_module, "_MOST_PLANS", 3)
    fleet = Fleet([KnownEngine(seed, slow=1 + 0.2 * seed) for seed in range(8)], monkeypatch)
    fleet.run(4)
    for model in fleet.models.values():
        model.follow(TARGETS_OF_ANOTHER, FLUID)
    targets = [plan.thresholds.fluid.tpot_s for plan in fleet.run(1).values() if plan.thresholds.fluid]
    assert targets == [0.05] * 8


def test_a_model_from_digests_plans_as_one_from_records() -> None:
    """The digest is what crosses the wire; rounding lengths into buckets changes little."""
    from_records, from_digests = ReplicaModel(SETTINGS, LAW, FLUID), ReplicaModel(SETTINGS, LAW, FLUID)
    engine = KnownEngine(4)
    for _ in range(12):
        report = engine.period()
        from_records.observe(report)
        nothing: dict[str, tuple[()]] = {"iterations": (), "arrivals": (), "finished": (), "running": ()}
        from_digests.observe(replace(report, digest=from_records.digest(), **nothing))  # type: ignore[arg-type]
    exact, rounded = from_records.propose().forecast, from_digests.propose().forecast
    assert exact is not None and rounded is not None
    assert rounded.plan.capacity_rps == pytest.approx(exact.plan.capacity_rps, rel=0.02)
    assert rounded.output_tokens.value == pytest.approx(exact.output_tokens.value, rel=0.02)
    assert rounded.rate_rps == exact.rate_rps and rounded.iteration_error_std == exact.iteration_error_std
    assert from_digests.finished_seen == from_records.finished_seen and not from_digests.is_cold
    assert from_digests.time_model.time_model == from_records.time_model.time_model


def test_before_any_output_a_digest_is_completed_by_the_same_guess() -> None:
    from_records, from_digests = ReplicaModel(SETTINGS, LAW, FLUID), ReplicaModel(SETTINGS, LAW, FLUID)
    report = KnownEngine(4).period(0.2, arrivals=(), finished=(), running=())
    from_records.observe(report)
    from_digests.observe(replace(report, digest=from_records.digest()))
    exact, rounded = (one.propose().thresholds.fluid for one in (from_records, from_digests))
    assert exact is not None and rounded is not None and exact.cold and rounded.cold
    assert rounded.survival.mean == pytest.approx(exact.survival.mean, rel=0.1)
