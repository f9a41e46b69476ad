"""New targets, miss probability and configured thresholds for an engine that is serving."""

from __future__ import annotations

from typing import Any

import pytest
from engine_harness import Engine, add_many, fluid_params, telemetry, wait

from scheduler.messages import Ack, Configure

PROFILE = "a100-llama2-7b-paper"


def configure(engine: Engine, revision: int, **settings: Any) -> Ack:
    """What the channel's thread does with settings that arrive."""
    return engine.scheduler.in_force.configure(Configure(settings=settings, revision=revision))


def served(**settings: Any) -> Engine:
    return Engine(settings={"profile": PROFILE} | settings)


def active(engine: Engine) -> Any:
    return engine.scheduler.active.current()


def test_new_targets_are_in_force_with_the_next_iteration() -> None:
    engine = served(targets={"ttft_s": 5.0, "tpot_s": 0.5})
    add_many(engine, 4, output=40)
    engine.steps(3)
    ack = configure(engine, 1, profile=PROFILE, targets={"ttft_s": 0.5, "tpot_s": 0.05})
    assert (ack.accepted, ack.active_version) == (True, 1)
    engine.step()
    obeyed = engine.scheduler._obeyed
    assert (obeyed.thresholds.fluid.ttft_s, obeyed.thresholds.fluid.tpot_s) == (0.5, 0.05)
    assert obeyed.from_config and obeyed.lapses_at_s is None
    assert telemetry(engine).settings["targets"]["tpot_s"] == 0.05
    engine.run()
    assert len(engine.finished) == 4, "no running request was touched"


def test_the_rejection_rule_follows_the_new_targets() -> None:
    engine = served(targets={"ttft_s": 60.0}, audit_share=0.0)
    add_many(engine, 60, prompt=500, output=400)
    engine.step()
    assert engine.scheduler.recorder.totals.rejected == 0
    configure(engine, 1, profile=PROFILE, targets={"ttft_s": 0.1})
    engine.steps(20)
    assert engine.scheduler.recorder.totals.rejected > 0


def test_the_miss_counters_follow_the_new_targets() -> None:
    engine = served(targets={"latency_s": 60.0})
    engine.add("before", output=20)
    engine.run()
    configure(engine, 1, profile=PROFILE, targets={"tpot_s": 0.009})  # an iteration of the harness takes 10 ms
    engine.apply({"version": 0, "policy": "fcfs"}, automatic=False)  # whatever the active policy is
    engine.add("after", output=20)
    engine.run()
    counters = telemetry(engine).counters
    assert (counters.completed, counters.latency_misses, counters.tpot_misses, counters.ttft_misses) == (2, 0, 1, 0)


def test_tuned_thresholds_give_way_and_a_push_under_way_is_stale() -> None:
    engine = served(targets={"tpot_s": 0.5})
    assert engine.apply({"version": 7, "fluid": fluid_params(tpot_s=0.5), "valid_for_s": 120.0}).accepted
    assert configure(engine, 1, profile=PROFILE, targets={"tpot_s": 0.05}).active_version == 8
    assert active(engine).thresholds.fluid.tpot_s == 0.05
    late = engine.apply({"version": 8, "fluid": fluid_params(tpot_s=0.5), "valid_for_s": 120.0})
    assert (late.accepted, late.code) == (False, "stale")
    assert engine.apply({"version": 9, "fluid": fluid_params(tpot_s=0.05)}).accepted


def test_counts_that_no_target_enters_stay_tuned() -> None:
    engine = served(thresholds=wait(4), targets={"tpot_s": 0.5})
    engine.apply(wait(6, version=3, valid_for_s=120.0))
    assert configure(engine, 1, profile=PROFILE, thresholds=wait(4), targets={"tpot_s": 0.05}).accepted
    assert active(engine).thresholds.version == 3 and active(engine).thresholds.types[0].n == 6


def test_a_lapse_falls_back_to_the_new_settings() -> None:
    engine = served()
    configure(engine, 1, profile=PROFILE, targets={"tpot_s": 0.05})
    engine.apply({"version": 5, "policy": "fcfs", "valid_for_s": 1.0})
    engine.now_s += 2.0
    assert (active(engine).thresholds.version, active(engine).thresholds.fluid.tpot_s) == (5, 0.05)


def test_another_policy_takes_over_and_every_waiting_request_is_served() -> None:
    engine = served()
    add_many(engine, 3, output=60)
    engine.steps(2)
    assert configure(engine, 1, profile=PROFILE, thresholds=wait(8, max_hold_s=0.05)).accepted
    add_many(engine, 3, prefix="later", output=10)
    engine.run()
    assert len(engine.finished) == 6 and engine.scheduler._obeyed.policy.name == "wait"


def test_a_pin_outlasts_new_settings() -> None:
    engine = served(targets={"tpot_s": 0.5})
    pinned = {"version": 3, "pinned": True, "fluid": fluid_params(tpot_s=0.5)}
    engine.apply(pinned, automatic=False)
    before = active(engine)
    ack = configure(engine, 1, profile=PROFILE, targets={"tpot_s": 0.05})
    assert (ack.accepted, ack.active_version) == (True, 3)
    assert active(engine) is before
    assert telemetry(engine).settings["targets"]["tpot_s"] == 0.05, "in force for all that the pin does not hold"
    engine.apply(pinned | {"version": 4, "pinned": False, "valid_for_s": 1.0}, automatic=False)
    engine.now_s += 2.0
    assert active(engine).thresholds.fluid.tpot_s == 0.05


def test_a_pin_of_the_configuration_goes_with_the_configuration() -> None:
    engine = served(thresholds={"policy": "fcfs", "max_running": 3, "pinned": True})
    assert configure(engine, 1, profile=PROFILE, thresholds={"policy": "fcfs", "max_running": 3}).accepted
    assert not active(engine).thresholds.pinned
    assert engine.apply({"version": 2, "policy": "fcfs", "max_running": 9}).accepted, "tuning goes on"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"thresholds": {"max_running": 65}}, "max_running = 65"),
        ({"thresholds": {"mode": "strict"}}, "strict mode may starve"),
        ({"profile": "no such"}, "profile 'no such' is not known"),
        ({"thresholds": {"policy": "wait_cp"}}, "speculative decoding is not supported with policy wait_cp"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_sentence_and_changes_nothing(settings: dict[str, Any], says: str) -> None:
    engine = Engine(
        settings={"profile": PROFILE, "targets": {"tpot_s": 0.5}}, drafts=2,
        speculative_config={"method": "ngram", "num_speculative_tokens": 2}, async_scheduling=False,
    )
    before, settings_before = active(engine), engine.scheduler.in_force.settings
    ack = configure(engine, 1, **({"profile": PROFILE} | settings))
    assert (ack.accepted, ack.code, ack.active_version) == (False, "invalid", 0) and says in ack.reason
    assert active(engine) is before and engine.scheduler.in_force.settings is settings_before
    assert configure(engine, 1, profile=PROFILE, targets={"tpot_s": 0.4}).accepted, "the revision was not used up"


def test_settings_that_come_twice_or_late_do_no_harm() -> None:
    engine = served()
    first, second = {"targets": {"tpot_s": 0.5}}, {"targets": {"tpot_s": 0.05}}
    assert configure(engine, 1, profile=PROFILE, **first).accepted
    assert configure(engine, 2, profile=PROFILE, **second).accepted
    now = active(engine)
    assert configure(engine, 2, profile=PROFILE, **second).accepted, "twice"
    assert active(engine) is now
    late = configure(engine, 1, profile=PROFILE, **first)
    assert (late.accepted, late.code) == (False, "stale") and "revision 1 is not newer than revision 2" in late.reason
    assert configure(engine, 2, profile=PROFILE, **first).code == "stale", "another change under the same revision"
    assert active(engine) is now
    assert configure(engine, 3, profile=PROFILE, **second).accepted, "the same settings anew"
    assert active(engine) is now
