"""What the counts of requests say of the load ahead."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scheduler.estimation.offered_counts import OfferedCounts
from scheduler.estimation.offered_load import OfferedLoad, RateAhead
from scheduler.messages import Counters

BIN_S, HORIZON_S = 5.0, 60.0


def fed(counts: list[float], horizon_s: float = HORIZON_S) -> OfferedLoad:
    load = OfferedLoad(horizon_s)
    for count in counts:
        load.observe(BIN_S, count)
    return load


def seen(load: OfferedLoad) -> RateAhead:
    ahead = load.ahead()
    assert ahead is not None
    return ahead


def poisson(rates: list[float], seed: int = 1) -> list[float]:
    return np.random.default_rng(seed).poisson(np.array(rates) * BIN_S).astype(float).tolist()


def test_nothing_is_said_before_anything_is_counted() -> None:
    assert OfferedLoad(HORIZON_S).ahead() is None


def test_a_steady_load_is_expected_to_go_on_and_is_as_sure_as_its_own_fluctuation() -> None:
    ahead = seen(fed(poisson([20.0] * 400)))
    assert ahead.mean_rps == pytest.approx(20, rel=0.03)
    poisson_std = math.sqrt(20 / HORIZON_S)
    assert poisson_std <= ahead.std_rps < 2 * poisson_std
    assert ahead.quantile(0.99) > ahead.mean_rps > ahead.quantile(0.01)


def test_a_rising_load_is_followed_to_where_it_will_be() -> None:
    slope = 0.02
    rates = [10 + slope * BIN_S * number for number in range(200)]
    ahead = seen(fed(poisson(rates)))
    assert ahead.now_rps == pytest.approx(rates[-1], rel=0.05)
    assert ahead.mean_rps == pytest.approx(rates[-1] + slope * HORIZON_S, rel=0.05)


def test_noise_is_no_trend() -> None:
    """Over many runs of a steady load, what is expected a horizon ahead strays little more than the level itself."""
    means = [seen(fed(poisson([20.0] * 100, seed))).mean_rps for seed in range(30)]
    assert np.std(means) < 1.0 and np.mean(means) == pytest.approx(20, rel=0.02)


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_step_is_known_from_two_counts_and_widens_nothing_for_long(factor: float) -> None:
    counts = poisson([20.0] * 200 + [20.0 * factor] * 100)
    after = seen(fed(counts[:202]))
    assert after.mean_rps == pytest.approx(20 * factor, rel=0.25)
    later = seen(fed(counts))
    assert later.mean_rps == pytest.approx(20 * factor, rel=0.1)
    assert later.dispersion < 6, "the change itself is no error of the forecast"


def test_bursts_are_fluctuation_and_no_change() -> None:
    """Ten seconds of requests, twenty of none: the mean is kept, and the headroom is larger than Poisson's."""
    rates = [30.0 if number % 6 < 2 else 0.0 for number in range(400)]
    bursty = seen(fed(poisson(rates)))
    assert bursty.mean_rps == pytest.approx(10, rel=0.35)
    assert bursty.std_rps > 2 * math.sqrt(10 / HORIZON_S)


def test_counts_are_gathered_until_they_say_something_of_a_long_horizon() -> None:
    long = fed(poisson([20.0] * 300), horizon_s=1800.0)
    assert len(long._bins) == 300 * BIN_S / (1800 / 24)
    assert seen(long).mean_rps == pytest.approx(20, rel=0.05)


def test_no_request_at_all_is_a_load_of_nothing() -> None:
    ahead = seen(fed([0.0] * 100))
    assert ahead.mean_rps == 0 and 0 < ahead.std_rps < 0.05


def test_another_horizon_forgets_the_errors_of_the_old_one_and_no_counts() -> None:
    load = fed(poisson([20.0] * 200))
    load.follow(120.0)
    assert seen(load).mean_rps == pytest.approx(20, rel=0.1)
    load.observe(BIN_S, 100)
    assert load.ahead() is not None


def counters(arrivals: int, recalled: int = 0) -> Counters:
    return Counters(arrivals=arrivals, recalled=recalled)


def test_only_what_is_new_since_counting_began_is_counted() -> None:
    counts = OfferedCounts()
    counts.begin({"a", "late"})
    assert counts.since_last({"a": ("1", counters(1000))}) == 0, "a watcher that starts anew"
    assert counts.since_last({"a": ("1", counters(1010)), "b": ("1", counters(5))}) == 15, "b came afterwards"
    assert counts.since_last({"b": ("1", counters(9))}) == 4, "a says nothing"
    assert counts.since_last({"a": ("1", counters(1030)), "b": ("1", counters(9))}) == 20, "and is counted when it does"
    assert counts.since_last({"late": ("1", counters(500))}) == 0, "it was there before"


def test_a_restarted_engine_and_requests_that_go_elsewhere_are_not_counted_twice() -> None:
    counts = OfferedCounts()
    counts.begin({"a", "b"})
    counts.since_last({"a": ("1", counters(100)), "b": ("1", counters(0))})
    assert counts.since_last({"a": ("2", counters(7)), "b": ("1", counters(0))}) == 7
    assert counts.since_last({"a": ("2", counters(10, recalled=3)), "b": ("1", counters(3))}) == 3
    counts.keep({"b"})
    assert counts.since_last({"a": ("2", counters(50))}) == 43, "it was only not listed for a while"
