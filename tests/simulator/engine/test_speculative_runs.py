"""Speculative decoding in the simulator: vLLM's real scheduler with drafts of which a stated share is accepted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.model.profiles import load_profile
from scheduler.model.steps import Steps
from scheduler.tuning.fluid_plan import solve_fluid_params
from simulator.config import SimulationError, simulation_config
from simulator.engine.fleet import limits_of
from simulator.output.run_files import read_run
from simulator.run import simulate
from simulator.scenario.speculation import Speculation
from simulator.workload.requests import open_workload

SMALL = {
    "lengths": "0.5:p40d30+0.5:p90d60", "rate_rps": 20.0, "requests": 120, "seed": 3, "speculative_tokens": 3,
    "acceptance_rate": 0.7,
}


def summary_of(**options):
    return simulate(simulation_config(SMALL | options))


def test_a_request_accepts_a_geometric_prefix_and_the_same_one_again():
    def gains(seed):
        speculation = Speculation(3, 0.7, seed)
        return [speculation.gained_tokens(f"{number % 50}", 3) for number in range(20_000)]

    seen = gains(1)
    assert seen == gains(1) != gains(2)
    assert sum(seen) / len(seen) == pytest.approx(1 + 0.7 + 0.7**2 + 0.7**3, rel=0.01)
    assert {Speculation(3, 1.0).gained_tokens("r", 2), Speculation(3, 0.0).gained_tokens("r", 3)} == {3, 1}


@pytest.mark.parametrize(
    ("policy", "asynchronous"),
    [("vllm", False), ("vllm", True), ("fluid", False), ("fluid", True), ("nested-wait", True), ("wait", False)],
)
def test_every_request_has_its_tokens_in_fewer_iterations(policy, asynchronous):
    summary = summary_of(policy=policy, async_scheduling=asynchronous)
    plain = summary_of(policy=policy, async_scheduling=asynchronous, speculative_tokens=None, acceptance_rate=None)
    assert (summary["completed"], summary["stranded"], plain["tokens_per_step"]) == (120, 0, None)
    # What the last step of an answer gains beyond its end counts for none.
    assert summary["tokens_per_step"] == pytest.approx(2.45, abs=0.1)
    assert summary["tpot_mean_s"] < 0.6 * plain["tpot_mean_s"]


def test_lengths_are_as_without(tmp_path):
    for name, options in {"with": {}, "without": {"speculative_tokens": None, "acceptance_rate": None}}.items():
        simulate(simulation_config(SMALL | options), folder=tmp_path / name)
    tables = [read_run(tmp_path / name).requests().to_pylist() for name in ("with", "without")]
    lengths = [{row["index"]: row["output_tokens"] for row in table} for table in tables]
    assert lengths[0] == lengths[1] and len(lengths[0]) == 120


def test_drafts_that_are_never_accepted_cost_time(tmp_path):
    rejected = summary_of(acceptance_rate=0.0)
    plain = summary_of(speculative_tokens=None, acceptance_rate=None)
    assert rejected["tokens_per_step"] == 1.0
    assert rejected["tpot_mean_s"] > plain["tpot_mean_s"]
    simulate(simulation_config(SMALL | {"acceptance_rate": 0.0}), folder=tmp_path / "run")
    table = read_run(tmp_path / "run").iterations(("decode_tokens", "batch_size", "prefill_tokens"))
    decodes = [row for row in table.to_pylist() if not row["prefill_tokens"]]
    assert {row["decode_tokens"] / row["batch_size"] for row in decodes} == {4.0}, "the time model counts drafts too"


def test_beyond_capacity_fluid_serves_what_the_model_with_drafts_says_is_possible():
    """The controller gets neither acceptance nor drafts: it measures them."""
    config = simulation_config({
        "lengths": "p500~0.8d200~0.8", "rate_rps": 16.0, "requests": 2500, "policy": "fluid", "slo_ttft_s": 3.0,
        "slo_tpot_s": 0.025, "speculative_tokens": 3, "acceptance_rate": 0.7, "seed": 1,
    })
    mix, time_model = open_workload(config.workload).mix(), load_profile(config.profile).time_model
    steps = replace(Steps.of_acceptance(0.7, 3), tokens_std=0.0)
    bound = solve_fluid_params(mix, time_model, limits_of(config), config.slo, steps=steps)
    without = solve_fluid_params(mix, time_model, limits_of(config), config.slo)
    summary = simulate(config)
    assert 1.2 * without.capacity_rps < bound.capacity_rps < 16.0
    assert summary["goodput_rps"] >= 0.95 * bound.capacity_rps
    assert summary["served_tpot_miss_fraction"] <= 0.02
    assert summary["served_ttft_miss_fraction"] <= 0.01
    assert summary["preemptions"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"acceptance_rate": None}, "speculative_tokens and acceptance_rate go together"),
        ({"speculative_tokens": None}, "speculative_tokens and acceptance_rate go together"),
        ({"acceptance_rate": 1.5}, "acceptance_rate"), ({"speculative_tokens": 0}, "speculative_tokens"),
        ({"policy": "nested-wait", "mode": "strict"}, "strict, which counts one token an iteration"),
    ],
    ids=str,
)
def test_impossible_options_are_rejected_in_a_sentence(options, said):
    with pytest.raises(SimulationError, match=said):
        simulation_config(SMALL | options)
