"""A replica that is slow for a while."""

import numpy as np
import pytest

from simulator.config import SimulationError, simulation_config
from simulator.output.run_files import read_run
from simulator.run import simulate
from simulator.scenario.slowdown import Slowdown, parse_slowdown

OPTIONS = {"lengths": "p40d12", "rate_rps": 30.0, "requests": 300, "policy": "fcfs"}


def test_it_lasts_from_its_beginning_until_just_before_its_end():
    slow = parse_slowdown("at=60, until=180, factor=2.5")
    assert slow == Slowdown(60.0, 2.5, 180.0)
    assert [slow.factor_at(now_s) for now_s in (0, 59.9, 60, 179.9, 180)] == [1, 1, 2.5, 2.5, 1]
    assert parse_slowdown("factor=2,at=0").factor_at(1e9) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("at=60", "factor missing"),
        ("at=60,factor=0", "factor is 0.0; it must be a finite number > 0"),
        ("at=-1,factor=2", "at is -1.0"),
        ("at=60,factor=2,until=60", "until is 60.0; it must be > at"),
        ("at=60,factor=2,unitl=70", "at 'unitl=70'"),
        ("at=x,factor=2", "at is 'x'; it must be a number"),
    ],
)
def test_what_is_wrong_is_named(text, said):
    with pytest.raises(SimulationError, match=said):
        simulation_config(OPTIONS | {"slowdown": text})


def seconds_and_time_model(run, replica):
    rows = [row for row in run.iterations().to_pylist() if row["replica"] == replica]
    starts, seconds = np.array([(row["start_s"], row["seconds"]) for row in rows]).T
    return starts, seconds


def test_the_law_s_seconds_are_multiplied_on_the_first_replica_only(tmp_path):
    options = OPTIONS | {"replicas": 2, "rate_rps": 60.0}
    simulate(simulation_config(options | {"slowdown": "at=2,until=4,factor=3"}), folder=tmp_path)
    run = read_run(tmp_path)
    starts, seconds = seconds_and_time_model(run, 0)
    inside = (starts >= 2) & (starts < 4)
    assert inside.sum() > 20
    # Iterations of this small a batch lie at the time model's floor or a little above.
    assert seconds[inside].min() > 2.9 * seconds[~inside].min()
    assert seconds[~inside].max() < seconds[inside].min()
    starts, seconds = seconds_and_time_model(run, 1)
    assert seconds.max() < 2 * seconds.min()
