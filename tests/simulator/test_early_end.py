"""Runs that end once their measured requests are decided, and what a run keeps of its controller."""

import numpy as np
import pytest

from simulator.config import SimulationError, simulation_config
from simulator.output.run_files import read_run
from simulator.run import simulate

PLAIN = {"lengths": "p40d12", "rate_rps": 30.0, "requests": 120}
HURRIED = {"lengths": "0.5:p100d20+0.5:p400d60", "requests": 500, "seed": 4, "slo_ttft_s": 1.0, "slo_tpot_s": 0.05}


def run_of(options, folder):
    """The run of these options as it lies on disk."""
    simulate(simulation_config(options), folder=folder)
    return read_run(folder)


@pytest.mark.parametrize(
    "more",
    [
        {"policy": "vllm"}, {"policy": "llm-d"}, {"policy": "vllm", "replicas": 2},
        {"policy": "fluid", "period_s": 2.0}, {"policy": "wait", "mode": "strict"},
    ],
    ids=str,
)
@pytest.mark.parametrize("rate_rps", [20.0, 60.0])
def test_a_run_that_ends_once_decided_has_the_goodput_of_the_whole_run(more, rate_rps):
    options = HURRIED | more | {"rate_rps": rate_rps, "window": [0.3, 1.0]}  # the last arrivals are the last decided
    whole = simulate(simulation_config(options))
    ended = simulate(simulation_config(options | {"until_decided": True}))
    assert (whole["unfinished"], ended["stranded"]) == (0, 0)
    assert ended["completed"] + ended["rejected"] + ended["unfinished"] == ended["requests"] == 500
    if not whole["stranded"]:
        assert ended["goodput_rps"] == whole["goodput_rps"]
        assert ended["virtual_s"] <= whole["virtual_s"]


def test_a_hopeless_run_ends_soon_after_its_last_arrival(tmp_path):
    options = HURRIED | {"policy": "vllm", "rate_rps": 200.0}
    run = run_of(options | {"until_decided": True}, tmp_path)
    rows = run.requests().to_pylist()
    latest_s = max(row["arrival_s"] for row in rows)
    # One second for the first token, 59 further tokens of 0.05 s, one look a second.
    assert run.summary["virtual_s"] <= latest_s + 1 + 59 * 0.05 + 1
    assert run.summary["virtual_s"] < 0.7 * simulate(simulation_config(options))["virtual_s"]
    left = [row for row in rows if row["outcome"] == "unfinished"]
    assert len(left) == run.summary["unfinished"] > 50
    assert {row["finished_s"] for row in left} == {None}
    assert sorted(row["index"] for row in rows) == list(range(500))


def test_without_targets_nothing_ends_a_run_early():
    with pytest.raises(SimulationError, match="until_decided needs slo_ttft_s and slo_tpot_s, or slo_latency_s"):
        simulation_config(PLAIN | {"until_decided": True, "slo_ttft_s": 1.0})
    simulation_config(PLAIN | {"until_decided": True, "slo_latency_s": 1.0})


def test_the_history_says_what_the_controller_pushed_and_when(tmp_path):
    options = HURRIED | {"policy": "fluid", "period_s": 2.0, "rate_rps": 40.0, "replicas": 2}
    history = run_of(options, tmp_path).control().to_pylist()
    one = [row for row in history if row["replica"] == 1]
    assert len(one) == len(history) / 2 > 5
    times = [row["at_s"] for row in one]
    assert all(abs(at_s - 2.0 * place) < 0.2 for place, at_s in enumerate(times))
    assert [row["version"] for row in one] == list(np.cumsum([row["applied"] for row in one]))
    assert one[0]["applied"]
    assert one[0]["mean_output_tokens"] < 20, "a prior, which rejects nothing"
    assert one[-1]["mean_output_tokens"] == pytest.approx(40, rel=0.1)
    assert one[-1]["rate_rps"] == pytest.approx(20, rel=0.2)
    assert one[-1]["iteration_s"] == pytest.approx(0.05, rel=0.01)
    assert "possible" in one[-1]["reason"]


def test_without_a_controller_there_is_no_history(tmp_path):
    run_of(HURRIED | {"policy": "fluid", "period_s": 2.0, "rate_rps": 20.0}, tmp_path)
    assert (tmp_path / "control.parquet").is_file()
    run = run_of(HURRIED | {"policy": "fluid", "rate_rps": 20.0, "solve_once": True}, tmp_path)
    assert run.control().num_rows == 0
    assert not (tmp_path / "control.parquet").is_file(), "an older run's must not stay"
