"""Arrival processes."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.workload.arrivals import parse_arrivals

SPECS = ["poisson", "uniform", "gamma:cv=3", "onoff:on=10,off=20", "diurnal:period=100,amplitude=0.8"]
STEPS = ["step:at=60,factor=3", "step:at=60,until=120,factor=3"]


def arrivals(spec, rate_rps=10.0, blocks=25, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate(list(islice(parse_arrivals(spec).blocks(rate_rps, rng), blocks)))


def rate_between(times_s, from_s, to_s):
    return np.count_nonzero((times_s >= from_s) & (times_s < to_s)) / (to_s - from_s)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rate_rps", [0.5, 40.0])
def test_mean_rate(spec, rate_rps):
    times_s = arrivals(spec, rate_rps)
    assert times_s.size / times_s[-1] == pytest.approx(rate_rps, rel=0.02)


@pytest.mark.parametrize("spec", SPECS + STEPS)
def test_times_ascend_from_zero_and_repeat_with_the_seed(spec):
    times_s = arrivals(spec)
    assert times_s[0] >= 0
    assert np.all(np.diff(times_s) >= 0)
    assert np.array_equal(times_s, arrivals(spec))
    assert spec == "uniform" or not np.array_equal(times_s, arrivals(spec, seed=1))


@pytest.mark.parametrize("spec", SPECS[:3])
def test_another_rate_stretches_the_same_arrivals(spec):
    np.testing.assert_allclose(arrivals(spec, 5.0), 2 * arrivals(spec, 10.0))


@pytest.mark.parametrize(("spec", "cv"), [("poisson", 1), ("gamma:cv=3", 3), ("gamma:cv=0.5", 0.5), ("uniform", 0)])
def test_variation_of_the_gaps(spec, cv):
    gaps_s = np.diff(arrivals(spec))
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.03, abs=1e-6)


def test_onoff_is_silent_when_off_and_poisson_when_on():
    times_s = arrivals("onoff:on=10,off=20", 4.0)
    within_s = times_s % 30
    assert within_s.max() <= 10
    counts = np.bincount((times_s // 30).astype(int))[:-1]
    assert counts.mean() == pytest.approx(120, rel=0.02)
    assert counts.var() == pytest.approx(120, rel=0.15)


def test_onoff_without_off_is_poisson():
    np.testing.assert_allclose(arrivals("onoff:on=10,off=0"), arrivals("poisson"))


def test_diurnal_follows_the_sine():
    phase = arrivals("diurnal:period=100,amplitude=0.8", 50.0) % 100 / 100
    counts, edges = np.histogram(phase, 20, (0, 1))
    expected = 1 + 0.8 * np.sin(np.pi * (edges[:-1] + edges[1:]))
    assert counts / counts.mean() == pytest.approx(expected, abs=0.06)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.floats(0.01, 1e4), st.floats(0, 1), st.floats(0, 1e5))
def test_diurnal_reaches_each_time_when_its_integrated_rate_says(period_s, amplitude, even_s):
    time_s = parse_arrivals(f"diurnal:period={period_s!r},amplitude={amplitude!r}").warp(np.array([even_s]))[0]
    wave_s = amplitude * period_s / (2 * np.pi) * (1 - np.cos(2 * np.pi * time_s / period_s))
    assert time_s + wave_s == pytest.approx(even_s, rel=1e-9, abs=1e-9)


def test_step_multiplies_the_rate_from_its_time_on():
    times_s = arrivals("step:at=60,factor=3", 40.0)
    assert rate_between(times_s, 0, 60) == pytest.approx(40, rel=0.05)
    assert rate_between(times_s, 60, 600) == pytest.approx(120, rel=0.03)


def test_step_ends():
    times_s = arrivals("step:at=60,until=120,factor=3", 40.0)
    assert rate_between(times_s, 0, 60) == pytest.approx(40, rel=0.05)
    assert rate_between(times_s, 60, 120) == pytest.approx(120, rel=0.05)
    assert rate_between(times_s, 120, 1000) == pytest.approx(40, rel=0.03)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("poison", "'poison'; the processes are: poisson, uniform, gamma:cv=…, .*step:at=…,factor=…,.until=….$"),
        ("gamma", "cv missing; write gamma:cv=…"),
        ("gamma:cv", "at 'cv': write|cv is ''"),
        ("gamma:cv=big", "cv is 'big'; it must be a number"),
        ("gamma:cv=0", "cv is 0.0; it must be between"),
        ("gamma:cv=nan", "cv is nan"),
        ("gamma:shape=2", "at 'shape=2': write gamma:cv=…"),
        ("gamma:cv=1,cv=2", "at 'cv=2': .*each key once"),
        ("poisson:rate=2", "at 'rate=2': write poisson"),
        ("onoff:on=0,off=1", "on is 0.0"),
        ("onoff:on=1,off=-1", "off is -1.0"),
        ("diurnal:period=0,amplitude=0.5", "period is 0.0"),
        ("diurnal:period=10,amplitude=1.5", "amplitude is 1.5; it must be between 0 and 1"),
        ("step:at=-1,factor=2", "at is -1.0"),
        ("step:at=1,factor=0", "factor is 0.0"),
        ("step:at=5,factor=2,until=5", "until is 5.0; it must be > at"),
    ],
)
def test_a_wrong_spec_says_what_exists(text, message):
    with pytest.raises(ValueError, match=message):
        parse_arrivals(text)


@pytest.mark.parametrize("rate_rps", [0, -1, float("inf"), float("nan")])
def test_a_rate_that_cannot_be(rate_rps):
    with pytest.raises(ValueError, match="rate_rps is"):
        next(parse_arrivals("poisson").blocks(rate_rps, np.random.default_rng(0)))
