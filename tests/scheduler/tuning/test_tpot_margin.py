"""The measured miss rate is the stated miss probability."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.estimation.iteration_time_error import IterationTimeError
from scheduler.model.workload import Lengths
from scheduler.tuning.tpot_margin import tpot_margin

LENGTHS = Lengths(np.full(6, 100), np.array([1, 2, 5, 20, 100, 400]), np.array([0.1, 0.1, 0.2, 0.2, 0.2, 0.2]))


def errors(generator, std, correlation, count):
    """A first-order autoregressive series with this standard deviation."""
    noise = generator.standard_normal(count) * std * np.sqrt(1 - correlation**2)
    series = np.empty(count)
    series[0] = generator.standard_normal() * std
    for step in range(1, count):
        series[step] = correlation * series[step - 1] + noise[step]
    return series


@pytest.mark.parametrize("miss", [0.01, 0.05])
@pytest.mark.parametrize(("std", "correlation"), [(0.02, 0.0), (0.1, 0.0), (0.05, 0.6), (0.05, 0.9)])
def test_noisy_iterations_miss_at_the_stated_probability(std, correlation, miss):
    """Iterations of target/(1 + margin) by the model, with errors; each request's mean is compared with the target."""
    generator = np.random.default_rng(8)
    margin = tpot_margin(LENGTHS, IterationTimeError(std=std, correlation=correlation), miss)
    means = np.concatenate([[0.0], np.cumsum(errors(generator, std, correlation, 400_000))])
    missed = 0.0
    for output, weight in zip(LENGTHS.output_tokens[1:], LENGTHS.weights[1:], strict=True):
        begins = generator.integers(0, 399_000, 20_000)
        mean = (means[begins + output - 1] - means[begins]) / (output - 1)
        missed += weight * np.mean((1 + mean) / (1 + margin) > 1)
    assert missed == pytest.approx(miss, rel=0.2)


def test_few_iterations_give_a_wider_margin():
    margins = [
        tpot_margin(LENGTHS, IterationTimeError(std=0.05, correlation=0.3, iterations=n), 0.01)
        for n in (np.inf, 500, 50)
    ]
    assert margins == sorted(set(margins))


def test_an_exact_model_needs_no_margin_and_a_slow_engine_its_delay():
    assert tpot_margin(LENGTHS, IterationTimeError(), 0.01) == 0
    assert tpot_margin(LENGTHS, IterationTimeError(mean=0.03), 0.01) == 0.03
    assert tpot_margin(LENGTHS, IterationTimeError(mean=-0.03), 0.01) == 0


def test_answers_of_one_token_have_no_time_per_token_to_miss():
    assert tpot_margin(Lengths.point(10, 1), IterationTimeError(std=0.5), 0.01) == 0


def test_longer_answers_need_less_of_a_margin():
    margins = [tpot_margin(Lengths.point(10, n), IterationTimeError(std=0.1), 0.01) for n in (2, 10, 100)]
    assert margins[0] == pytest.approx(2.326 * 0.1, rel=1e-3)
    assert margins == sorted(set(margins), reverse=True)


def test_the_spread_s_interval_covers_as_often_as_it_says():
    generator, covered = np.random.default_rng(9), []
    for _ in range(1500):
        std = float(np.std(generator.normal(0, 0.04, 300), ddof=1))
        covered.append(IterationTimeError(std=std, iterations=300).std_estimate.covers(0.04))
    assert 0.98 <= np.mean(covered) <= 0.999
