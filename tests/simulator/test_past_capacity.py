"""Beyond capacity the thresholds of WAIT are infeasible and unlimited: it serves as first come, first served does."""

from __future__ import annotations

import pytest

from scheduler.model.fluid import solve_fluid
from scheduler.model.profiles import load_profile
from simulator.config import simulation_config
from simulator.run import simulate
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import open_workload

PROFILE = load_profile("a100-llama2-7b")
TWO_TYPES = "0.7:p512d20+0.3:p512d50"


def capacity_rps(lengths: str) -> float:
    mix = open_workload(WorkloadConfig(lengths=lengths, rate_rps=1.0, requests=10)).mix()
    return solve_fluid(mix, PROFILE.time_model, PROFILE.kv_capacity_tokens).critical_rate_scale


def throughput_rps(lengths: str, load: float, policy: str, requests: int) -> float:
    options = {
        "lengths": lengths, "rate_rps": load * capacity_rps(lengths), "requests": requests, "policy": policy, "seed": 1,
        "solve_once": True,
    }
    return float(simulate(simulation_config(options))["throughput_rps"])


@pytest.mark.parametrize(
    ("lengths", "load", "requests"),
    [("p64d32", 1.05, 2000), ("p512d20", 1.3, 600), (TWO_TYPES, 1.05, 1200), (TWO_TYPES, 2.0, 600)],
)
def test_no_throughput_is_lost_beyond_capacity(lengths, load, requests):
    fcfs, *ours = (throughput_rps(lengths, load, policy, requests) for policy in ("fcfs", "wait", "nested-wait"))
    assert min(ours) >= 0.99 * fcfs
