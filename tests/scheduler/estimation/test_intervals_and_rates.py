"""Intervals, rates and the test for a change, against processes of known rates."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.estimation.arrival_rates import arrival_rates
from scheduler.estimation.intervals import CONFIDENCE, mean_estimate, rate_estimate

WINDOW_S = 60.0


def poisson(generator, rate_rps, from_s, to_s):
    return np.sort(generator.uniform(from_s, to_s, generator.poisson(rate_rps * (to_s - from_s)))).tolist()


def rates_of(at_s, *, now_s=WINDOW_S, types=None):
    return arrival_rates(at_s, types or ["all"] * len(at_s), 0.0, now_s)


@pytest.mark.parametrize("expected", [0.5, 3.0, 40.0])
def test_the_rate_s_interval_covers_as_often_as_it_says(expected):
    counts = np.random.default_rng(1).poisson(expected, 4000)
    covered = [rate_estimate(int(count), 1.0).covers(expected) for count in counts]
    assert np.mean(covered) >= CONFIDENCE - 0.004


def test_bursts_widen_the_interval():
    calm, bursty = rate_estimate(100, 10.0), rate_estimate(100, 10.0, dispersion=4.0)
    assert bursty.high - bursty.low == pytest.approx(2 * (calm.high - calm.low), rel=0.1)


def test_a_mean_s_interval_covers_as_often_as_it_says():
    samples = np.random.default_rng(2).exponential(5.0, (3000, 200))
    covered = [mean_estimate(row.mean(), row.std(), 200).covers(5.0) for row in samples]
    assert np.mean(covered) >= CONFIDENCE - 0.01


@pytest.mark.parametrize("rate_rps", [1.0, 5.0, 40.0])
def test_steady_arrivals_are_not_taken_for_a_change(rate_rps):
    generator = np.random.default_rng(3)
    alarms = sum(rates_of(poisson(generator, rate_rps, 0, WINDOW_S)).since_s > 0 for _ in range(500))
    assert alarms <= 3


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_step_is_followed_within_three_periods(factor):
    generator, found = np.random.default_rng(4), []
    for _ in range(50):
        at_s = poisson(generator, 6.0, 0, 45) + poisson(generator, 6.0 * factor, 45, WINDOW_S)
        rates = rates_of(at_s)
        found.append(rates.since_s)
        assert abs(rates.total.value - 6.0 * factor) < abs(rates.total.value - 6.0)
    assert np.mean(np.abs(np.array(found) - 45) < 4) > 0.85


def test_bursty_arrivals_alarm_less_than_a_poisson_test_would():
    generator, alarms = np.random.default_rng(5), 0
    for _ in range(200):
        at_s = np.cumsum(generator.gamma(1 / 9, 9 / 5.0, 2000))
        at_s = at_s[at_s < WINDOW_S]
        rates = rates_of(at_s.tolist())
        assert rates.dispersion > 1.5
        alarms += rates.since_s > 0
    assert alarms < 40


def test_a_shift_of_the_mix_at_the_same_rate_is_a_change():
    at_s = np.arange(0, WINDOW_S, 0.1).tolist()
    types = ["short" if at < 50 else "long" for at in at_s]
    rates = rates_of(at_s, types=types)
    assert rates.since_s == pytest.approx(50, abs=1.1)
    assert set(rates.by_type) == {"long"}


def test_rates_hold_until_something_speaks_against_them():
    generator = np.random.default_rng(6)
    first = rates_of(poisson(generator, 10, 0, WINDOW_S))
    same = [first.still_holds(rates_of(poisson(generator, first.total.value, 0, WINDOW_S))) for _ in range(100)]
    other = [first.still_holds(rates_of(poisson(generator, 20, 0, WINDOW_S))) for _ in range(20)]
    assert np.mean(same) > 0.6
    assert not any(other)


def test_nothing_seen_is_no_rate_with_an_upper_bound():
    rates = rates_of([])
    assert rates.total.value == rates.total.low == 0
    assert 0 < rates.total.high < 0.2
