"""Worst windows of arrivals that move, by brute force and in the solver."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.varying_rates import Stretch, WorstWindows
from scheduler.model.wait_thresholds import NestedWaitSolution, WaitSolution, nested_wait_thresholds, wait_thresholds
from scheduler.model.workload import Lengths, RequestType, WorkloadMix

TIME_MODEL = IterationTimeModel(0.01, 1e-6)
SHORT, LONG = Lengths.from_pairs([(20, 5)]), Lengths.from_pairs([(20, 10)])


def stretch(seconds, short_rps, long_rps):
    return Stretch(seconds, WorkloadMix((RequestType("short", short_rps, SHORT), RequestType("long", long_rps, LONG))))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(1, 12),
)
def test_worst_window_and_ratio_are_those_of_brute_force(stretches, window_s):
    worst = WorstWindows([stretch(*one) for one in stretches])
    seconds = [one for one in stretches for _ in range(one[0])]  # whole seconds, so that windows begin at whole ones
    seconds = [seconds[0]] * 12 + seconds + [seconds[-1]] * 12
    counts = [sum(s + long for _, s, long in seconds[at : at + window_s]) for at in range(len(seconds) - window_s + 1)]
    assert worst.arrivals(float(window_s)) == pytest.approx(max(counts))
    of_long = [sum(long for _, _, long in seconds[at : at + window_s]) for at in range(len(seconds) - window_s + 1)]
    assert worst.arrivals(float(window_s), "long") == pytest.approx(max(of_long))
    ratios = [long / (short + long) for _, short, long in stretches]
    assert worst.survival(0, 5) == pytest.approx(max(ratios))


def test_thresholds_meet_the_conditions_in_every_window():
    stretches = (stretch(10.0, 300.0, 100.0), stretch(2.0, 100.0, 900.0), stretch(10.0, 300.0, 100.0))
    mean = WorkloadMix((RequestType("short", 280.0, SHORT), RequestType("long", 170.0, LONG)))
    worst = WorstWindows(stretches)
    wait = wait_thresholds(mean, TIME_MODEL, 10**6, over_time=stretches)
    assert isinstance(wait, WaitSolution)
    for name, n in zip(("short", "long"), wait.n, strict=True):
        assert worst.arrivals(wait.iteration_s, name) <= n
    assert wait.n[1] > wait_thresholds(mean, TIME_MODEL, 10**6).n[1]
    for whole in (True, False):
        given_ = {"boundaries": (5, 10), "whole": whole}
        nested = nested_wait_thresholds(mean, TIME_MODEL, 10**6, over_time=stretches, **given_)
        assert isinstance(nested, NestedWaitSolution)
        assert worst.arrivals(nested.iteration_s) < nested.n[0]
        assert nested.survival == (pytest.approx(0.9),), "while the long ones come"
        assert 0.9 < nested.n[1] / nested.n[0] < 1
        plain = nested_wait_thresholds(mean, TIME_MODEL, 10**6, **given_)
        assert plain.survival == (pytest.approx(170 / 450),)
        assert plain.n[0] < nested.n[0]


def test_one_stretch_is_no_change():
    mix = WorkloadMix((RequestType("short", 280.0, SHORT), RequestType("long", 170.0, LONG)))
    for solve in (wait_thresholds, nested_wait_thresholds):
        assert solve(mix, TIME_MODEL, 10**6, over_time=(Stretch(5.0, mix),)) == solve(mix, TIME_MODEL, 10**6)


def test_nonsense_is_an_error():
    with pytest.raises(ValueError, match="stretches is empty"):
        WorstWindows(())
    with pytest.raises(ValueError, match="seconds is 0"):
        stretch(0.0, 1.0, 1.0)
    assert np.isfinite(WorstWindows([stretch(1.0, 0.0, 1.0)]).arrivals(3.0))
