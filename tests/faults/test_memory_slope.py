"""The slope of a process's memory, with its interval."""

import os

import numpy as np
import psutil
import pytest

from benchmarks.faults.memory import MIB, MemoryLog, sample, slope_of


def test_a_straight_line_has_its_slope():
    at_s = np.arange(0, 1800, 60)
    slope = slope_of(at_s, (100 + 12 * at_s / 3600) * MIB)
    assert slope.mib_per_hour == pytest.approx(12) and slope.low == pytest.approx(12) and slope.grows
    assert slope.minutes == pytest.approx(29)


def test_noise_around_a_level_does_not_grow():
    rng = np.random.default_rng(3)
    at_s = np.arange(0, 1800, 10)
    slope = slope_of(at_s, (100 + rng.normal(0, 2, at_s.size)) * MIB)
    assert slope.low < 0 < slope.high and not slope.grows
    assert slope.mean_mib == pytest.approx(100, abs=1)


def test_growth_shows_through_noise():
    rng = np.random.default_rng(3)
    at_s = np.arange(0, 1800, 10)
    slope = slope_of(at_s, (100 + 30 * at_s / 3600 + rng.normal(0, 2, at_s.size)) * MIB)
    assert slope.low < 30 < slope.high and slope.grows


@pytest.mark.parametrize("at_s", [range(9), [5.0] * 20])
def test_too_little_makes_no_slope(at_s):
    with pytest.raises(ValueError, match="samples"):
        slope_of(list(at_s), [MIB] * len(at_s))


def test_a_log_leaves_out_the_warm_up_and_processes_that_lived_too_briefly():
    log = MemoryLog(warm_s=100)
    for at_s in range(0, 400, 10):
        log.add(at_s, {"old 1": (50 + max(0, 100 - at_s)) * MIB})
        if at_s >= 300:
            log.add(at_s, {"young 2": 10 * MIB})
        if at_s >= 230:
            log.add(at_s, {"watched for a minute 3": (10 + at_s / 100) * MIB})
    assert set(log.slopes()) == {"old 1"}
    assert log.slopes()["old 1"].mib_per_hour == pytest.approx(0)


def test_this_process_uses_memory():
    (used,) = sample([("test", psutil.Process())]).values()
    assert used > MIB
    gone = psutil.Process(os.getpid())
    assert list(sample([("test", gone)])) == [f"test {gone.pid}"]
