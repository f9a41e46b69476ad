"""Runs with retries, the audit of rejections by replay, and which runs have a controller."""

import json
from itertools import pairwise

import pytest

from simulator.config import simulation_config
from simulator.output.run_files import read_run
from simulator.run import simulate
from simulator.workload import clients
from simulator.workload.clients import IMPATIENT_PAUSE_S, IMPATIENT_RETRIES

OVERLOADED = {
    "lengths": "p400d40", "rate_rps": 60.0, "requests": 400, "seed": 2, "policy": "fluid", "slo_ttft_s": 1.0,
    "slo_tpot_s": 0.05,
}


def run_of(folder, **more):
    simulate(simulation_config(OVERLOADED | more), folder=folder)
    run = read_run(folder)
    return run, sorted(run.requests().to_pylist(), key=lambda row: row["index"])


def test_without_retries_there_is_one_attempt(tmp_path):
    run, rows = run_of(tmp_path)
    assert (run.summary["retry_attempts"], run.summary["returned_admitted_fraction"]) == (None, None)
    rejected = [row for row in rows if row["outcome"] == "rejected"]
    assert len(rejected) == run.summary["rejected"] > 50
    assert {(row["attempts"], row["returned_s"]) for row in rows} == {(1, None)}
    assert all(row["arrival_s"] <= row["rejected_s"] < row["arrival_s"] + 1.5 for row in rejected)
    assert all(row["rejected_s"] is None for row in rows if row["outcome"] != "rejected")
    assert 0 < run.summary["rejection_p50_s"] <= run.summary["rejection_p99_s"]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("retries", ["openai", "impatient"])
def test_every_request_has_one_row_whatever_its_attempts(tmp_path, retries, replicas):
    more = {"retries": retries, "replicas": replicas, "rate_rps": 60.0 * replicas}
    run, rows = run_of(tmp_path / "once", **more)
    assert [row["index"] for row in rows] == list(range(400))
    assert run.summary["completed"] + run.summary["rejected"] == 400
    most = 1 + {"openai": clients.OPENAI_RETRIES, "impatient": IMPATIENT_RETRIES}[retries]
    assert max(row["attempts"] for row in rows) <= most
    assert run.summary["retry_attempts"] == sum(row["attempts"] - 1 for row in rows) > 20
    shortest_s = 1.0 if retries == "openai" else IMPATIENT_PAUSE_S
    for row in rows:
        assert (row["returned_s"] is None) == (row["attempts"] == 1)
        if row["returned_s"] is not None:
            assert row["returned_s"] >= row["arrival_s"] + shortest_s * (row["attempts"] - 1)
        since_s = row["returned_s"] or row["arrival_s"]
        if row["outcome"] == "completed":
            assert row["first_token_s"] > since_s
        else:
            assert (row["outcome"], row["attempts"]) == ("rejected", most)
            assert row["rejected_s"] >= since_s
    assert any(row["attempts"] > 1 and row["outcome"] == "completed" for row in rows)
    fraction = run.summary["returned_admitted_fraction"]
    assert (fraction is None) if retries == "impatient" else (0 < fraction <= 1)
    again, _ = run_of(tmp_path / "again", **more)
    assert again.requests().sort_by("index").equals(run.requests().sort_by("index"))


def test_clients_of_a_rule_at_the_door_come_back_too(tmp_path):
    run, rows = run_of(tmp_path, policy="llm-d", retries="openai")
    assert run.summary["retry_attempts"] > 0
    assert run.summary["returned_admitted_fraction"] is None, "no Retry-After was given"
    assert all(row["rejected_s"] == (row["returned_s"] or row["arrival_s"]) for row in rows if row["rejected_s"])


def test_a_run_that_ends_once_decided_keeps_every_request(tmp_path):
    _, rows = run_of(tmp_path, retries="openai", until_decided=True)
    assert [row["index"] for row in rows] == list(range(400))


def test_the_audit_is_the_run_again_with_some_of_the_rejected(tmp_path):
    short = {"requests": 150, "audit": 3}
    run, _ = run_of(tmp_path, **short)
    summary = run.summary
    assert 0 <= summary["rejected_individually_servable_fraction"] <= 1
    low, high = summary["wrong_rejection_low"], summary["wrong_rejection_high"]
    assert 0 <= low <= summary["wrong_rejection_fraction"] <= high <= 1
    again = simulate(simulation_config(OVERLOADED | short))
    assert {**again, "wall_s": 0} == {**summary, "wall_s": 0}
    assert json.loads(json.dumps(again, allow_nan=False)) == again
    without = simulate(simulation_config(OVERLOADED | short | {"audit": 0}))
    assert (without["wrong_rejection_fraction"], without["rejected_individually_servable_fraction"]) == (None, None)
    assert without["goodput_rps"] == summary["goodput_rps"], "an audit changes nothing"
    once = simulate(simulation_config(OVERLOADED | short | {"audit": 1}))
    assert (once["wrong_rejection_low"], once["wrong_rejection_high"]) == (None, None)


def moody_audit(monkeypatch, *, rate_rps, turned_away, audit):
    """A door that turns away so many requests in a row, whatever the load."""
    from simulator.scenario.baselines import BASELINES, Baseline

    def days(number):
        return [True] * 30 + [False] * number + [True] * 10

    # One in twenty is let in, and then the door is not asked.
    lets_in = iter(days(turned_away) + audit * days(turned_away - max(1, round(turned_away / 20))))
    moody = Baseline("moody", BASELINES["vllm"].scheduler, rule=lambda _load: next(lets_in))
    monkeypatch.setitem(BASELINES, "moody", moody)
    options = OVERLOADED | {
        "policy": "moody", "rate_rps": rate_rps, "requests": 40 + turned_away, "audit": audit, "window": [0, 1],
    }
    summary = simulate(simulation_config(options))
    assert (summary["rejected"], next(lets_in, None)) == (turned_away, None)
    return summary


def test_a_rule_that_turns_away_without_need_is_found_out(monkeypatch):
    summary = moody_audit(monkeypatch, rate_rps=5.0, turned_away=40, audit=4)
    assert summary["wrong_rejection_fraction"] == summary["rejected_individually_servable_fraction"] == 1.0


def test_a_request_served_in_the_place_of_another_was_rejected_rightly(monkeypatch):
    """Where all that are let in meet their targets but as many others no longer do, nothing was wrong."""
    from simulator import audit

    config = simulation_config(OVERLOADED | {"audit": 2})
    monkeypatch.setattr(audit, "rejected_requests", lambda *_: list(range(100)))
    monkeypatch.setattr(audit, "good_requests", lambda *_: frozenset(range(100, 200)))
    found = audit.audit_rejections(
        None, config, lambda drawn: frozenset(drawn) | frozenset(range(100, 200 - len(drawn)))
    )
    assert found["wrong_rejection_fraction"] == found["wrong_rejection_high"] == 0.0
    assert found["rejected_individually_servable_fraction"] == 1.0


def test_nothing_rejected_is_nothing_wrong():
    summary = simulate(simulation_config(OVERLOADED | {"rate_rps": 2.0, "requests": 30, "audit": 5}))
    assert (summary["rejected"], summary["wrong_rejection_fraction"]) == (0, None)
    assert summary["wrong_admission_fraction"] == 0


@pytest.mark.parametrize(
    ("options", "controller"),
    [
        ({"policy": "fluid"}, True),
        ({"policy": "wait"}, True),
        ({"policy": "nested-wait", "max_hold_s": 0.2}, True),
        ({"policy": "vllm"}, False),
        ({"policy": "fcfs"}, False),
        ({"policy": "fluid", "solve_once": True}, False),
        ({"policy": "fluid", "cap": 50}, False),
        ({"policy": "wait", "types": [{"name": "all", "n": 2}]}, False),
        ({"policy": "wait", "max_running": 20}, False),
        ({"policy": "wait", "counts": "by_cap", "cap": 20}, False),
    ],
)
def test_a_policy_that_is_solved_has_a_controller_unless_told_otherwise(options, controller, tmp_path):
    small = {"lengths": "p40d12", "rate_rps": 10.0, "requests": 60, "slo_ttft_s": 3.0, "slo_tpot_s": 0.1}
    summary = simulate(simulation_config(small | options), folder=tmp_path)
    assert summary["controller"] is controller
    history = read_run(tmp_path).control().to_pylist()
    assert bool(history) is controller
    assert {later["at_s"] - earlier["at_s"] for earlier, later in pairwise(history)} <= {5.0} or any(
        abs(later["at_s"] - earlier["at_s"] - 5.0) < 0.2 for earlier, later in pairwise(history)
    )


def test_given_thresholds_beside_the_counts_stay_active_under_the_controller(tmp_path):
    options = {"policy": "wait", "max_hold_s": 0.125, "lengths": "p40d12", "rate_rps": 20.0, "requests": 400}
    simulate(simulation_config(options), folder=tmp_path)
    run = read_run(tmp_path)
    assert run.config["thresholds_in_force"]["max_hold_s"] == 0.125
    assert run.control().to_pylist()[-1]["version"] > 0
