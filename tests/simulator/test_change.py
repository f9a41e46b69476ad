"""`fluid` follows change: its parameters settle within 3 periods of the evidence, do not cycle, and goodput returns.

What it can know: an arrival rate once its window is full of the new one, lengths once requests of the new kind have
finished, a device's speed at once. The parameters compared are those of `benchmarks.evidence.settling`.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks.evidence.settling import PARAMETERS, SETTLED, settling
from scheduler.model.profiles import load_profile
from scheduler.thresholds import EngineLimits
from scheduler.tuning.fluid_plan import solve_fluid_params
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo
from simulator.config import simulation_config
from simulator.output.metrics import good_requests
from simulator.output.run_files import read_run
from simulator.run import simulate
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import open_workload

PERIOD_S, PERIODS = 5.0, 3
TTFT_S, TPOT_S = 2.0, 0.05
FROM_S, TO_S, END_S = 60.0, 160.0, 260.0
SERVICE_S = 7.0
"""Upper bound of a request's running time: 100 tokens of 0.05 s, and its prompt."""
SHORT, LONG = "0.5:p300d60+0.5:p900d100", "0.5:p900d60+0.5:p1800d100"


def capacity_rps(lengths):
    limits = EngineLimits(
        kv_capacity_tokens=137_000, block_tokens=16, max_num_seqs=512, max_num_batched_tokens=2048, max_model_len=4096
    )
    mix = open_workload(WorkloadConfig(lengths=lengths, requests=1, rate_rps=1.0)).mix()
    time_model = load_profile("a100-llama2-7b").time_model
    return solve_fluid_params(mix, time_model, limits, Slo(TTFT_S, TPOT_S)).capacity_rps


class Followed(NamedTuple):
    """A run's control history and, per request, its arrival and whether it was good."""

    history: list
    arrival_s: np.ndarray
    good: np.ndarray

    def goodput_rps(self, from_s, to_s):
        return float(self.good[(self.arrival_s >= from_s) & (self.arrival_s < to_s)].sum() / (to_s - from_s))

    def offered_rps(self, from_s, to_s):
        return float(((self.arrival_s >= from_s) & (self.arrival_s < to_s)).sum() / (to_s - from_s))


@cache
def followed(scenario):
    capacity = capacity_rps(SHORT)
    options = {
        "step": {
            "lengths": SHORT, "rate_rps": 0.5 * capacity, "arrivals": f"step:at={FROM_S},until={TO_S},factor=3",
            "requests": round(0.5 * capacity * (END_S + 2 * (TO_S - FROM_S))),
        },
        "mix": {
            "lengths": f"{SHORT}; {FROM_S:g}s: {LONG}; {TO_S:g}s: {SHORT}", "rate_rps": 0.9 * capacity,
            "requests": round(0.9 * capacity * END_S),
        },
        "slow": {
            "lengths": SHORT, "rate_rps": 0.9 * capacity, "slowdown": f"at={FROM_S},until={TO_S},factor=2",
            "requests": round(0.9 * capacity * END_S),
        },
    }[scenario]
    options |= {"policy": "fluid", "period_s": PERIOD_S, "slo_ttft_s": TTFT_S, "slo_tpot_s": TPOT_S, "seed": 1}
    with TemporaryDirectory() as folder:
        simulate(simulation_config(options), folder=Path(folder))
        run = read_run(Path(folder))
        history, table = run.control().to_pylist(), run.requests()
    good = good_requests(table, (0.0, 1.0), Slo(TTFT_S, TPOT_S))
    return Followed(history, table["arrival_s"].to_numpy(), np.isin(table["index"].to_numpy(), list(good)))


ONCE_KNOWN = {"step": TuningSettings().window_s, "mix": SERVICE_S, "slow": 0.0}
# As the rate after a shift of the mix is known better, a queue of five becomes one of three, once and much later.
SETTLING = {"step": PARAMETERS, "mix": PARAMETERS[:2], "slow": PARAMETERS}


@pytest.mark.parametrize("scenario", ["step", "mix", "slow"])
@pytest.mark.parametrize(("from_s", "to_s"), [(FROM_S, TO_S), (TO_S, END_S)], ids=["there", "and back"])
def test_the_pace_settles_within_three_periods_of_what_it_can_know_and_does_not_cycle(scenario, from_s, to_s):
    known_s = from_s + ONCE_KNOWN[scenario]
    settled = settling(followed(scenario).history, known_s, to_s, SETTLING[scenario])
    assert settled.passes <= PERIODS
    assert settled.swing <= SETTLED


@pytest.mark.parametrize(("from_s", "to_s"), [(FROM_S, TO_S), (TO_S, END_S)], ids=["there", "and back"])
def test_a_step_of_the_rate_is_followed_within_three_periods(from_s, to_s):
    assert settling(followed("step").history, from_s, to_s).passes <= PERIODS


def test_a_step_to_thrice_the_rate_costs_no_goodput_beyond_capacity():
    run, capacity = followed("step"), capacity_rps(SHORT)
    assert run.offered_rps(FROM_S, TO_S) > 1.4 * capacity
    for begin in np.arange(FROM_S, TO_S, 20):
        assert run.goodput_rps(begin, begin + 20) > 0.9 * capacity


@pytest.mark.parametrize(("scenario", "left"), [("mix", LONG), ("slow", None)])
def test_goodput_is_what_the_new_capacity_allows_after_three_periods(scenario, left):
    run = followed(scenario)
    capacity = capacity_rps(left) if left else 0.45 * capacity_rps(SHORT)  # twice the fixed part of an iteration too
    assert run.offered_rps(FROM_S, TO_S) > 1.2 * capacity
    assert run.goodput_rps(FROM_S + PERIODS * PERIOD_S, TO_S - PERIOD_S) > 0.9 * capacity


@pytest.mark.parametrize("scenario", ["step", "mix", "slow"])
def test_goodput_is_back_within_three_periods_after_the_load_has_gone(scenario):
    run = followed(scenario)
    begin = TO_S + PERIODS * PERIOD_S
    assert run.goodput_rps(begin, END_S) > 0.97 * run.offered_rps(begin, END_S)
