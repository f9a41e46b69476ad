"""The simulator's pipeline stages, by hand; and `fluid` under a TPOT target on them."""

import pytest
from test_virtual_replica import BOTH_WAYS, PREFILL_64_S, decode_s, replica_of, run, times

from scheduler.vllm_scheduler import HeadraceScheduler
from simulator.config import SimulationError, simulation_config
from simulator.run import simulate


def piped(asynchronous):
    return replica_of(HeadraceScheduler, asynchronous=asynchronous, pipeline_parallel_size=2)


@BOTH_WAYS
def test_a_request_alone_passes_all_stages_for_each_token(asynchronous):
    rows, iterations, stranded = run(piped(asynchronous), (2.5, 64, 3))
    first_token_s = 2.5 + PREFILL_64_S
    assert times(rows[0]) == (first_token_s, first_token_s + decode_s(65) + decode_s(66))
    assert [iteration.seconds for iteration in iterations] == [PREFILL_64_S / 2, decode_s(65) / 2, decode_s(66) / 2]
    assert not stranded


@BOTH_WAYS
def test_a_second_batch_fills_the_stage_that_the_first_has_left(asynchronous):
    """Both prompts fill a batch of their own: the second one enters when the first leaves the first stage."""
    replica = replica_of(
        HeadraceScheduler, asynchronous=asynchronous, pipeline_parallel_size=2, max_num_batched_tokens=64
    )
    rows, iterations, _ = run(replica, (0.0, 64, 1), (0.0, 64, 1))
    half_s = PREFILL_64_S / 2
    assert [iteration.start_s for iteration in iterations] == [0.0, half_s]
    assert [rows[number].first_token_s for number in (0, 1)] == [2 * half_s, 3 * half_s]


def test_pipeline_stages_without_asynchronous_scheduling_are_for_our_policies():
    options = {"lengths": "p64d4", "rate_rps": 1.0, "requests": 2, "pipeline_parallel": 2, "async_scheduling": False}
    with pytest.raises(SimulationError, match="async_scheduling"):
        simulate(simulation_config(options))
    assert simulate(simulation_config(options | {"policy": "fcfs"}))["stranded"] == 0


@pytest.mark.timeout(300)
def test_fluid_keeps_a_tpot_target_in_a_pipeline_at_twice_its_capacity():
    """The fluid model's capacity with two stages: 38.3 requests/s (38.2: the whole model at 50 ms, 19.1, twice)."""
    summary = simulate(simulation_config({
        "lengths": "p512d50", "rate_rps": 76.0, "requests": 1000, "policy": "fluid", "pipeline_parallel": 2,
        "slo_ttft_s": 3.0, "slo_tpot_s": 0.05, "period_s": 2.0,
    }))
    assert summary["served_tpot_miss_fraction"] <= 0.02
    assert summary["goodput_rps"] >= 0.85 * 38.3
    assert summary["tpot_p50_s"] > 0.045, "the plan counts both stages, and uses the target"
