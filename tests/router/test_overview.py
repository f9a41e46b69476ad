"""The state in plain sentences: each question answered for each condition that an operator may find."""

from __future__ import annotations

from typing import Any

import pytest
from fake_dashboard import MODEL, PLAN, Made, change

from router.dashboard.changed import change_in_words
from router.dashboard.overview import overview


@pytest.fixture
def made() -> Made:
    """Two replicas at half of their capacity."""
    made = Made()
    made.cycles(30)
    made.now = dict(PLAN, offered_rps=4.0, goodput_rps=4.0, bottleneck="nothing", load=0.5)
    made.more = dict(made.now, replicas=3, capacity_rps=12.2)
    made.less = dict(made.now, replicas=1, capacity_rps=4.05, goodput_rps=3.5)
    return made


def health(made: Made) -> tuple[str, str, str]:
    found = overview(made.state())["health"]
    return found["level"], found["title"], "\n".join(found["sentences"])


def of_model(made: Made) -> dict[str, Any]:
    return overview(made.state())["models"][MODEL]  # type: ignore[no-any-return]


def test_a_healthy_cluster_says_so_with_the_share_in_time(made: Made) -> None:
    assert health(made) == (
        "ok", "Healthy", "All 2 replicas answer; 100% of the requests that finished lately were in time."
    )
    model = of_model(made)
    assert model["load"]["headline"] == "49% of capacity"
    assert model["load"]["sentence"] == "4 requests/s arrive; 8.1 can be served within the targets."
    assert model["limit"]["sentence"] == "The first limit will be the KV cache, at about 8.1 requests/s."
    assert (model["limit"]["reached"], model["limit"]["headline"]) == (False, "nothing yet")
    assert model["one_more"]["headline"] == "nothing now"
    assert model["one_more"]["sentence"] == (
        "Every request offered is expected in time as it is. "
        "Capacity would be 12.2 requests/s instead of 8.1 requests/s."
    )


def test_overload_names_the_limit_and_what_one_more_replica_would_buy(made: Made) -> None:
    made.now = dict(PLAN)
    made.more = dict(PLAN, replicas=3, capacity_rps=12.2, goodput_rps=9.35)
    level, title, said = health(made)
    assert (level, title) == ("warning", "Overloaded") and "9.4 requests/s arrive; 8.1 can be served" in said
    model = of_model(made)
    assert model["load"]["headline"] == "1.2 × capacity" and "rejected at once" in model["load"]["sentence"]
    assert model["limit"]["reached"] and model["limit"]["sentence"].startswith("It is full before anything else")
    assert model["one_more"]["headline"] == "+1.3 good requests/s"
    assert model["one_more"]["sentence"] == (
        "8 of the 9.4 requests/s offered are expected in time; with 3 replicas, 9.35."
    )


def test_how_many_replicas_are_wanted_and_why(made: Made) -> None:
    assert of_model(made)["wanted"] == {
        "replicas": 3, "headline": "3",
        "sentence": "9.4 requests/s are offered, rejected ones included: 3 needed.",
    }
    made.scaling[MODEL] |= {"replicas": 2}
    assert of_model(made)["wanted"]["headline"] == "2, as now"
    made.scaling[MODEL] |= {"decided": False, "reason": "how much is asked for is not known yet: as many as there are"}
    assert of_model(made)["wanted"]["headline"] == "no change"


def test_a_number_that_is_not_decided_says_why(made: Made) -> None:
    made.scaling = {}
    assert of_model(made)["wanted"]["sentence"] == "Not known: only under the policy fluid, after the first pass."
    made.alive = False
    assert of_model(made)["wanted"]["sentence"] == "Not known: the controller does not answer."


@pytest.mark.parametrize("limit", ["memory", "slots", "token budget", "TPOT target", "TTFT target", "latency target"])
def test_every_limit_of_the_fluid_plan_has_words_and_a_remedy(made: Made, limit: str) -> None:
    made.now = dict(PLAN, bottleneck=limit)
    found = of_model(made)["limit"]
    assert found["name"] == limit and found["sentence"].endswith("would help.")


def test_a_cluster_with_a_replica_to_spare_says_so(made: Made) -> None:
    made.less = dict(made.less, goodput_rps=4.0)
    assert of_model(made)["one_more"]["sentence"].endswith(" 1 would carry it too.")


def test_targets_that_no_replica_can_help_are_said(made: Made) -> None:
    made.now = dict(PLAN, capacity_rps=20.0, goodput_rps=4.7, bottleneck="TTFT target", in_time=0.5)
    made.more = made.now
    assert "50% of the requests cannot meet the targets" in of_model(made)["one_more"]["sentence"]
    made.now = dict(PLAN, reason="one request alone takes 90.0 ms a token, more than the TPOT target")
    assert of_model(made)["load"]["level"] == "bad"
    assert "The TPOT target cannot be met: one request alone takes 90.0 ms a token" in health(made)[2]


@pytest.mark.parametrize(("state", "name", "level", "said"), [
    ({"reachable": False, "reason": "gone", "last_answer_age_s": 42.0}, "silent", "warning",
     "is silent: it does not answer; its last answer came 42 s ago."),
    ({"still_s": 30.0}, "frozen", "bad",
     "is frozen: it has 52 running requests and no iteration for 30 s; it is replaced after 10 s."),
    ({"time_model": {"d0_s": 0.05, "d1_s_per_kv_token": 6e-7}}, "slow", "warning",
     "is slow: its iterations take 2.4 times as long as others'."),
    ({"time_model": {"d0_s": 0.02, "d1_s_per_kv_token": 3e-7, "mape": 0.6}}, "poor fit", "warning",
     "is hard to predict: its iteration times are 60% off the model's."),
    ({"time_model": {"d0_s": 0.02, "d1_s_per_kv_token": 3e-7, "mape": 0.4}}, "poor fit", "note",
     "is hard to predict"),
    ({"decision": "not tuned: boom"}, "not tuned", "warning", "(not tuned: boom)"),
    ({"draining": True}, "draining", "note", "is draining: it finishes its requests"),
    ({"forecast": {"cold": True, "miss_probability": 0.01}, "finished_seen": 1}, "cold", "note",
     "is cold: 1 request finished so far: output lengths are guessed."),
])
def test_each_oddity_of_a_replica_is_named(
    made: Made, state: dict[str, Any], name: str, level: str, said: str
) -> None:
    made.extra["8f2kq1zw"] = state
    assert said in health(made)[2]
    assert health(made)[0] == level
    rows = overview(made.state())["replicas"]
    assert [one["name"] for one in rows["8f2kq1zw"]["oddities"]] == [name]
    assert rows["m3x9c0ad"]["oddities"] == []


def test_a_pin_is_named_with_who_and_why(made: Made) -> None:
    thresholds = made.state()["replicas"]["8f2kq1zw"]["thresholds"] | {"pinned": True}
    made.extra["8f2kq1zw"] = {"thresholds": thresholds, "pin": {"by": "anna", "reason": "rush hour"}}
    assert "is pinned: its thresholds are pinned by anna (rush hour)" in health(made)[2]
    assert health(made)[:2] == ("note", "Healthy"), "an operator's wish is no trouble"


def test_without_an_answering_replica_nothing_is_served(made: Made) -> None:
    for name in made.names:
        made.extra[name] = {"reachable": False, "reason": "gone"}
    assert health(made) == ("bad", "In trouble", "No replica answers: nothing is served.")
    made.names = ()
    assert health(made)[2].startswith("There is no replica: nothing is served.")


def test_a_model_without_a_replica_is_named(made: Made) -> None:
    state = made.state()
    state["models"]["other"] = {}
    found = overview(state)
    assert "No replica of other answers: its requests fail." in found["health"]["sentences"]
    assert found["models"]["other"]["load"]["headline"] == "not known"


def test_without_a_controller_the_page_still_answers(made: Made) -> None:
    made.alive = False
    level, _, said = health(made)
    assert level == "warning" and "The controller does not answer. Requests are served" in said
    assert of_model(made)["load"]["sentence"] == "Not known: the controller does not answer."
    assert overview(made.state())["changes"] == []


def test_missed_targets_count_beyond_what_is_accepted(made: Made) -> None:
    recent = {"seconds": 60.0, "completed": 100, "good": 98}
    for name in made.names:
        made.extra[name] = {"recent": recent}
    assert health(made)[0] == "ok", "2% of 200, twice the accepted share, may well be chance"
    for name in made.names:
        made.extra[name] = {"recent": recent | {"good": 80}}
    assert f"20% of the requests of {MODEL} that finished lately missed a target; 1% is accepted." in health(made)[2]


def test_the_audit_gives_two_error_rates(made: Made) -> None:
    recent = {"completed": 50, "good": 36, "audited": 10, "audited_met": 4}
    made.extra = {name: {"recent": recent} for name in made.names}
    assert of_model(made)["audit"] == {"audited": 20, "wrong_rejections": 0.4, "wrong_admissions": pytest.approx(0.2)}
    made.extra = {}
    assert of_model(made)["audit"]["wrong_rejections"] is None


@pytest.mark.parametrize(("event", "headline", "said"), [
    ({}, "thresholds", "The controller changed the thresholds of replica 8f2kq1zw: longest queue none → 9, longest "
                       "iteration 75.4 ms → 71.2 ms. Reason: "),
    ({"kind": "pin", "by": "anna", "reason": "noon"}, "pinned",
     "anna pinned the thresholds of replica 8f2kq1zw. Reason: noon."),
    ({"kind": "release", "replica": "", "model": "m", "reason": ""}, "pin released",
     "an operator resumed automatic tuning of m."),
    ({"kind": "settings", "replica": "", "model": "m", "by": "anna", "reason": "targets.tpot_s 1 -> 2"}, "settings",
     "anna changed settings of m: targets.tpot_s 1 -> 2."),
    ({"accepted": False, "reason": "stale"}, "thresholds: not taken",
     "A change of replica 8f2kq1zw was not taken: stale."),
    ({"old": {"fluid": None}}, "thresholds", "replica 8f2kq1zw: the first ones from the fluid model."),
])
def test_a_change_says_what_where_and_why(event: dict[str, Any], headline: str, said: str) -> None:
    one = change(**event)
    found = change_in_words(one, one["at_unix_s"] + 12.0)
    assert found["headline"] == headline and said in found["sentence"] and found["age_s"] == pytest.approx(12.0)
