"""A replica's first minute: lengths and speed are guesses, and no request is rejected that could be served."""

import pytest

from simulator.config import simulation_config
from simulator.run import simulate

CAPACITY_RPS = 5.0
"""About what the profile's device serves of these lengths within the targets."""
TTFT_S = 3.0
NOTICED_S = 0.3
"""At most this long after its time an iteration begins in which a request can be rejected: two slow ones."""


def first_seconds(seconds, load, factor):
    """Summary of so long at so much of the capacity of a device that takes `factor` times as long as its profile."""
    rate_rps = load * CAPACITY_RPS / factor
    return simulate(simulation_config({
        "lengths": "p1000~1d210~1", "rate_rps": rate_rps, "requests": round(seconds * rate_rps), "window": (0, 1),
        "policy": "fluid", "profile": "a100-llama2-7b", "slo_ttft_s": TTFT_S, "slo_tpot_s": 0.08, "seed": 1,
        "slowdown": f"at=0,factor={factor}", "iteration_noise": 0.3,
    }))


@pytest.mark.parametrize("factor", [0.25, 0.5, 1, 2])  # an estimate may be further off than a profile
@pytest.mark.parametrize("load", [0.3, 0.7])
def test_below_capacity_no_request_is_rejected(load, factor):
    summary = first_seconds(60.0, load, factor)
    assert (summary["rejected"], summary["completed"]) == (0, summary["requests"])
    assert summary["ttft_p99_s"] <= TTFT_S


@pytest.mark.parametrize("factor", [1, 2])
def test_of_a_burst_beyond_capacity_those_rejected_hear_of_it_within_half_of_their_target(factor):
    summary = first_seconds(10.0, 2.5, factor)
    assert summary["rejected"] >= 5
    assert summary["rejection_p99_s"] <= TTFT_S / 2 + NOTICED_S
    assert summary["served_ttft_miss_fraction"] == 0
    assert summary["served_tpot_miss_fraction"] <= 0.02
