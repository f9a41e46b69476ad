"""Simulations in which the number of replicas changes."""

from __future__ import annotations

from typing import Any

import pytest

from simulator.config import SimulationError, simulation_config
from simulator.run import simulate

OPTIONS: dict[str, Any] = {
    "lengths": "p64d16", "profile": "cpu-smollm2", "rate_rps": 1.0, "requests": 500, "policy": "fluid",
    "slo_ttft_s": 3.0, "slo_tpot_s": 0.25, "window": (0.0, 1.0), "replicas": 1, "start_up_s": 20.0,
}


def run(**options: Any) -> dict[str, Any]:
    return simulate(simulation_config(OPTIONS | options))


def in_time(summary: dict[str, Any]) -> float:
    seconds = summary["window_to_s"] - summary["window_from_s"]
    return float(summary["goodput_rps"] * seconds / summary["window_requests"])


def test_a_fixed_number_of_replicas_takes_its_hours() -> None:
    summary = run(replicas=2, requests=100)
    assert summary["replica_hours"] == pytest.approx(2 * summary["window_to_s"] / 3600)


def test_more_are_started_for_what_is_rejected_and_they_go_again() -> None:
    """Behind the gate one replica would stay full and in time; what it rejects is load too."""
    step = {"arrivals": "step:at=120,until=300,factor=6", "requests": 1400}
    fixed, scaled = run(**step), run(**step, autoscale="fluid")
    assert fixed["rejected"] > 3 * scaled["rejected"]
    assert in_time(scaled) > in_time(fixed) + 0.2
    most = 6 * scaled["window_to_s"] / 3600
    assert fixed["replica_hours"] < scaled["replica_hours"] < 0.8 * most
    assert scaled["completed"] + scaled["rejected"] == 1400 and scaled["stranded"] == 0


def test_nobody_is_left_out_when_there_is_no_replica() -> None:
    """Ten minutes of silence, and then requests: the first ones wait until a replica has come up."""
    summary = run(
        arrivals="onoff:on=60,off=600", requests=200, rate_rps=0.1, autoscale="fluid", min_replicas=0, max_replicas=2,
    )
    assert summary["completed"] + summary["rejected"] == 200 and summary["completed"] > 150
    assert summary["replica_hours"] < 0.5 * summary["window_to_s"] / 3600


def test_the_same_seed_gives_the_same_summary() -> None:
    once, again = (run(autoscale="fluid", arrivals="step:at=60,factor=3") for _ in range(2))
    assert {**once, "wall_s": 0} == {**again, "wall_s": 0}


@pytest.mark.parametrize("rule", ["ongoing-requests:target=8,up=5,down=30", "slo-keda", "oracle"])
def test_the_other_rules_stay_within_the_bounds(rule: str) -> None:
    summary = run(arrivals="step:at=60,factor=4", autoscale=rule, max_replicas=2, requests=600)
    hours = summary["window_to_s"] / 3600
    assert hours < summary["replica_hours"] <= 2.1 * hours
    assert summary["completed"] + summary["rejected"] == 600


@pytest.mark.parametrize(("options", "said"), [
    ({"autoscale": "hpa"}, "the rules are"), ({"policy": "vllm"}, "needs the policy fluid"),
    ({"min_replicas": 5, "max_replicas": 4}, "at most max_replicas"), ({"router": "round-robin"}, "it may be fluid"),
])
def test_what_cannot_be_scaled_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SimulationError, match=said):
        simulation_config(OPTIONS | {"autoscale": "fluid"} | options)
