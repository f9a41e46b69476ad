"""What an operator's update means for each replica: checked whole, then planned; nothing planned on any error."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from router.admin import AdminError, ThresholdsUpdate, plan_update
from scheduler.fluid_params import FluidParams
from scheduler.messages import Counters, Gauges, Telemetry
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.survival import Survival
from scheduler.thresholds import EngineLimits, Thresholds, TypeThreshold
from scheduler.wire import OtherSchema

LIMITS = EngineLimits(
    kv_capacity_tokens=16_000, block_tokens=16, max_num_seqs=64, max_num_batched_tokens=1024, max_model_len=2048
)
IN_FORCE = Thresholds(version=7, policy="wait", max_running=20, valid_for_s=120.0, reason="solved")


def report(thresholds: Thresholds = IN_FORCE, **limits: int) -> Telemetry:
    return Telemetry(
        engine_id="engine", clock_s=1.0, cursor=0, limits=replace(LIMITS, **limits), thresholds=thresholds,
        from_config=False, gauges=Gauges(running=5, waiting=2, held=1, kv_used_tokens=4000),
        counters=Counters(preemptions=3, arrivals=14, completed=9, aborted=2, rejected=1),
    )


def update(**body: Any) -> ThresholdsUpdate:
    return ThresholdsUpdate.model_validate(body)


def rejection(body: dict[str, Any], telemetry: dict[str, Any]) -> tuple[int, str]:
    with pytest.raises(AdminError) as error:
        plan_update(update(**body), telemetry)
    return error.value.status_code, str(error.value)


def test_setting_replaces_the_whole_pins_and_counts_the_version_on() -> None:
    wanted = {"policy": "fcfs", "max_running": 8}
    planned = plan_update(update(thresholds=wanted), {"a": report(), "b": report(replace(IN_FORCE, version=11))})
    expected = Thresholds(policy="fcfs", max_running=8, pinned=True, reason="set by an operator")
    assert planned == {"a": replace(expected, version=8), "b": replace(expected, version=12)}


@pytest.mark.parametrize(("replica", "pinned"), [("a", ["a#0", "a#1"]), ("a#1", ["a#1"])])
def test_a_pin_holds_one_rank_or_all_of_a_replica(replica: str, pinned: list[str]) -> None:
    telemetry = {"a#0": report(), "a#1": report(replace(IN_FORCE, version=11)), "b#0": report()}
    planned = plan_update(update(replica=replica, pin=True), telemetry)
    assert {name: (wanted.pinned, wanted.version - telemetry[name].thresholds.version)
            for name, wanted in planned.items()} == dict.fromkeys(pinned, (True, 1))
    assert rejection({"replica": "a#2", "pin": True}, telemetry) == (
        404, "replica = 'a#2' does not exist; the replicas are a#0, a#1, b#0"
    )


def test_a_replica_of_another_release_cannot_be_set() -> None:
    status, message = rejection({"pin": True}, {"a": report(), "b": OtherSchema("the replica", 2)})
    assert status == 503
    assert message.startswith("replica b cannot be set from here: the replica speaks schema version 2")


def test_setting_without_a_policy_changes_the_named_fields_alone() -> None:
    params = FluidParams(
        time_model=IterationTimeModel(0.01, 1e-6), survival=Survival(((0, 1.0), (99, 0.0))),
        kv_limit_tokens=1000, ttft_s=3.0,
    )
    fluid = Thresholds(version=3, policy="fluid", fluid=params, valid_for_s=120.0, reason="solved", token_budget=256)
    telemetry = {"a": report(fluid), "b": report()}
    planned = plan_update(update(thresholds={"max_running": 16}), telemetry)
    set_by_operator = {"max_running": 16, "pinned": True, "valid_for_s": None, "reason": "set by an operator"}
    assert planned == {
        "a": replace(fluid, version=4, **set_by_operator), "b": replace(IN_FORCE, version=8, **set_by_operator),
    }
    back = plan_update(update(thresholds={"token_budget": None}), telemetry)
    assert (back["a"].token_budget, back["a"].policy, back["a"].fluid) == (None, "fluid", params)


def test_setting_without_a_pin_leaves_tuning_on() -> None:
    planned = plan_update(update(thresholds={"max_running": 8}, pin=False), {"a": report()})
    assert planned["a"].pinned is False


def test_a_given_version_and_reason_are_kept() -> None:
    planned = plan_update(update(thresholds={"version": 30, "reason": "rush hour"}), {"a": report()})
    assert (planned["a"].version, planned["a"].reason) == (30, "rush hour")


def test_pin_keeps_the_values_and_never_lapses() -> None:
    (planned,) = plan_update(update(pin=True), {"a": report()}).values()
    assert planned.same_rule(IN_FORCE)
    assert (planned.pinned, planned.valid_for_s, planned.version) == (True, None, 8)
    assert planned.reason == "pinned by an operator"


@pytest.mark.parametrize("body", [{"auto": True}, {"pin": False}])
def test_auto_keeps_the_values_until_the_controller_speaks(body: dict[str, Any]) -> None:
    (planned,) = plan_update(update(**body), {"a": report(replace(IN_FORCE, pinned=True))}).values()
    assert planned.same_rule(IN_FORCE)
    assert (planned.pinned, planned.version) == (False, 8)
    assert "resumed" in planned.reason


def test_one_replica_may_be_meant() -> None:
    planned = plan_update(update(replica="b", pin=True), {"a": report(), "b": report()})
    assert planned.keys() == {"b"}


def test_another_replica_s_silence_does_not_matter_then() -> None:
    planned = plan_update(update(replica="b", pin=True), {"a": RuntimeError("gone"), "b": report()})
    assert planned.keys() == {"b"}


@pytest.mark.parametrize(
    ("thresholds", "said"),
    [
        ({"max_running": 0}, "thresholds.max_running = 0"),
        ({"max_running": 65}, "max_num_seqs = 64"),
        ({"token_budget": 1025}, "max_num_batched_tokens = 1024"),
        ({"types": [{"name": "all", "n": 65}]}, "types[0].n = 65"),
        ({"policy": "lifo"}, "one of fcfs, wait, nested_wait"),
        ({"max_hold_s": -1}, "seconds from 0 to 60"),
        ({"max_hold_s": float("nan")}, "seconds from 0 to 60"),
        ({"mode": "strict"}, "serving"),
        ({"max_in_servce": 3}, "no such field"),
        ({"version": None}, "thresholds.version"),
        (
            {"segments": [{"end_output_tokens": 10, "total": 1}, {"end_output_tokens": 5, "total": 1}]},
            "an integer > 10",
        ),
    ],
)
def test_values_that_cannot_be_are_400(thresholds: dict[str, Any], said: str) -> None:
    status, message = rejection({"thresholds": thresholds}, {"a": report()})
    assert status == 400
    assert message.startswith("replica a: ")
    assert said in message


@pytest.mark.parametrize(
    "body", [{}, {"replica": "a"}, {"auto": True, "pin": True}, {"auto": True, "thresholds": {"max_running": 3}}]
)
def test_nothing_to_do_and_contradictions_are_400(body: dict[str, Any]) -> None:
    assert rejection(body, {"a": report()})[0] == 400


def test_a_typo_in_the_body_is_rejected() -> None:
    with pytest.raises(ValidationError, match="treshold"):
        update(tresholds={})


def test_an_unknown_replica_is_404_with_the_known_ones() -> None:
    status, message = rejection({"replica": "c", "pin": True}, {"a": report(), "b": report()})
    assert status == 404
    assert message == "replica = 'c' does not exist; the replicas are a, b"


@pytest.mark.parametrize("version", [0, 6, 7])
def test_an_old_version_is_409_with_the_active_version(version: int) -> None:
    status, message = rejection({"thresholds": {"version": version}}, {"a": report()})
    assert status == 409
    assert f"thresholds.version = {version} is not newer than version 7" in message


def test_a_silent_target_is_503() -> None:
    status, message = rejection({"pin": True}, {"a": report(), "b": RuntimeError("no answer within 5 s")})
    assert status == 503
    assert message == "replica b does not answer: no answer within 5 s"


def test_no_replica_at_all_is_503() -> None:
    status, message = rejection({"pin": True}, {})
    assert status == 503
    assert "/readyz" in message


def test_what_does_not_fit_one_target_is_planned_for_none() -> None:
    status, message = rejection({"thresholds": {"max_running": 50}}, {"a": report(), "b": report(max_num_seqs=40)})
    assert status == 400
    assert message.startswith("replica b: ")


def test_a_replica_s_state_is_plain_json_with_its_use_of_memory() -> None:
    thresholds = replace(IN_FORCE, types=(TypeThreshold(name="short", n=3, max_output_tokens=50),))
    state = report(thresholds).shown()
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    assert state["kv_used_fraction"] == 0.25
    assert (state["running"], state["waiting"], state["held"], state["preemptions"]) == (5, 2, 1, 3)
    ways = ("completed", "aborted", "rejected", "in_flight")
    assert [state["counters"][name] for name in ("arrivals", *ways)] == [14, 9, 2, 1, 2]
    assert state["thresholds"]["types"] == [
        {"name": "short", "n": 3, "max_prompt_tokens": None, "max_output_tokens": 50}
    ]
    assert state["limits"]["max_num_seqs"] == 64
