"""The statistics of prediction errors and the test for a change of speed, each by itself."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.estimation.error_statistics import ErrorStatistics
from scheduler.estimation.iteration_time_online import SpeedChange

PREDICTED_S = np.array([0.010, 0.012, 0.011, 0.020, 0.015])
ERRORS = np.array([0.10, -0.05, 0.00, 0.20, -0.10])


def of_all(forgetting: float = 1.0) -> ErrorStatistics:
    statistics = ErrorStatistics()
    for predicted_s, error in zip(PREDICTED_S.tolist(), ERRORS.tolist(), strict=True):
        statistics = statistics.with_prediction(predicted_s, error, forgetting)
    return statistics


def test_without_forgetting_they_are_the_plain_statistics():
    measured_s, statistics = PREDICTED_S * (1 + ERRORS), of_all()
    assert statistics.error.mean == pytest.approx(ERRORS.mean())
    assert statistics.error.std == pytest.approx(ERRORS.std())
    assert statistics.error.iterations == len(ERRORS)
    lagged = float(ERRORS[1:] @ ERRORS[:-1]) / len(ERRORS)
    assert statistics.error.correlation == pytest.approx((lagged - ERRORS.mean() ** 2) / ERRORS.var())
    assert statistics.mape == pytest.approx(np.mean(np.abs(measured_s - PREDICTED_S) / measured_s))
    assert statistics.iteration_time_s == pytest.approx((measured_s.mean(), measured_s.std()))
    unexplained = np.sum((measured_s - PREDICTED_S) ** 2) / np.sum((measured_s - measured_s.mean()) ** 2)
    assert statistics.r2 == pytest.approx(1 - unexplained)


def test_older_predictions_weigh_less():
    weights = 0.5 ** np.arange(len(ERRORS))[::-1]
    assert of_all(0.5).weight == pytest.approx(weights.sum())
    assert of_all(0.5).error.mean == pytest.approx(np.average(ERRORS, weights=weights))


def test_longer_iterations_change_the_times_and_no_relative_error():
    before = of_all()
    after = before.with_times_scaled(2.0, last_error=before.last_error)
    assert after.iteration_time_s == pytest.approx(tuple(2 * seconds for seconds in before.iteration_time_s))
    assert (after.error, after.mape) == (before.error, before.mape)
    assert after.r2 == pytest.approx(before.r2)


def test_a_lasting_change_of_speed_is_found_with_its_factor():
    change = SpeedChange()
    assert not any(change.observe(1.0, 0.02) for _ in range(200))
    found = [change.observe(1.5, 0.02) for _ in range(9)]
    assert found == [None] * 8 + [pytest.approx(1.5)]
    assert change.is_quiet, "the next change starts from here"


def test_a_hiccup_is_no_change_and_a_huge_change_is_followed_in_steps():
    change = SpeedChange()
    assert [change.observe(ratio, 0.02) for ratio in [100.0] * 6 + [1.0] * 50] == [None] * 56
    assert change.is_quiet
    assert [change.observe(50.0, 0.02) for _ in range(9)][-1] == 3.0
