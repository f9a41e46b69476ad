"""An engine on which a prompt token costs as much as a decode: a CPU, where 16 of them take half of an iteration."""

import pytest

from simulator.config import simulation_config
from simulator.run import simulate

LAW_RPS = 1.0
"""Served at ease by the CPU of the profile, slowed down to what a busy machine leaves of it."""


@pytest.mark.parametrize("load", [2, 3])
def test_beyond_capacity_prompts_do_not_take_the_time_per_token_of_those_served(load):
    summary = simulate(simulation_config({
        "lengths": "0.5:p16d16+0.5:p32d32", "rate_rps": load * LAW_RPS, "requests": 500, "policy": "fluid",
        "profile": "cpu-smollm2", "slowdown": "at=0,factor=1.4", "iteration_noise": 0.2, "slo_ttft_s": 4.0,
        "slo_tpot_s": 0.2, "async_scheduling": False, "max_num_seqs": 64, "token_budget": 512, "max_model_len": 512,
        "seed": 1,
    }))
    assert summary["served_tpot_miss_fraction"] <= 0.02
    assert summary["served_ttft_miss_fraction"] <= 0.01
    assert summary["goodput_rps"] > 1.2 * LAW_RPS
