"""The useful length of a queue, against simulated chains."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model.queue_limit import FullReplica, queue_limit, waits_in_line, waits_longer

REPLICA = FullReplica(capacity_rps=10.0, running=20.0, fixed_share=0.1, admitted_per_iteration=0.5)
MOST_REQUESTS = 60.0


def queue(rate_rps, *, miss_probability=0.01, most_requests=MOST_REQUESTS, **changes):
    replica = replace(REPLICA, **changes)
    return queue_limit(replica, rate_rps, miss_probability=miss_probability, most_requests=most_requests)


@given(st.floats(10.01, 40), st.floats(1.0, 4.0))
def test_more_arrivals_need_less_of_a_queue_beyond_capacity(rate_rps, factor):
    assert 1 <= queue(rate_rps * factor) <= queue(rate_rps) <= MOST_REQUESTS


@given(st.floats(0.01, 10.0))
def test_up_to_capacity_only_the_target_limits_the_queue(rate_rps):
    assert queue(rate_rps) == 60


def test_a_smaller_chance_of_a_miss_needs_a_longer_queue():
    lengths = [queue(10.5, miss_probability=p, most_requests=1000.0) for p in (0.1, 0.01, 0.001)]
    assert lengths == sorted(set(lengths))


def test_an_iteration_s_admissions_are_always_there():
    assert queue(40.0, admitted_per_iteration=2.0) >= 5  # P(Poisson(2) > 5) is 1.7 %
    assert queue(40.0, admitted_per_iteration=2.0, most_requests=3.0) == 3


def test_bursts_need_a_longer_queue():
    assert queue(11.0, variability=3.0, most_requests=1000.0) > 2 * queue(11.0, most_requests=1000.0)


@pytest.mark.parametrize("rate_rps", [10.2, 11.0, 13.0])
def test_a_simulated_replica_delivers_the_planned_share_of_capacity(rate_rps):
    """A chain of arrivals and ends, played event by event, under the queue limit."""
    miss, fixed, slots = 0.02, 0.3, 10
    places = queue(
        rate_rps, miss_probability=miss, fixed_share=fixed, running=slots, most_requests=1e4,
        admitted_per_iteration=1e-6,
    )

    def delivered(places):
        generator = np.random.default_rng(7)
        inside, served, time_s = slots, 0, 0.0
        draws, kinds = generator.standard_exponential(400_000), generator.random(400_000)
        for gap, kind in zip(draws.tolist(), kinds.tolist(), strict=True):
            share = min(inside / slots, 1.0)
            serve_rps = 10.0 * share / (fixed + (1 - fixed) * share)
            total = rate_rps + serve_rps
            time_s += gap / total
            if kind < serve_rps / total:
                inside, served = inside - 1, served + 1
            elif inside < slots + places:
                inside += 1
        return served / time_s / 10.0

    assert delivered(places) == pytest.approx(1 - miss, abs=0.006)
    assert places == 0 or delivered(places // 3) < 1 - miss + 0.003


def simulated_waits(replica, rate_rps, within_s, *, arrivals=200_000, seed=3):
    """The share of the chain's arrivals that wait longer than each of `within_s`; first come, first served."""
    rng = np.random.default_rng(seed)
    running = round(replica.running)
    now_s, present, waiting, waits = 0.0, 0, [], []
    while len(waits) < arrivals:
        served = replica.delivered_rps(min(present, running)) if present else 0.0
        now_s += rng.exponential(1 / (rate_rps + served))
        if rng.random() * (rate_rps + served) < rate_rps:
            present += 1
            if present > running:
                waiting.append(now_s)
            else:
                waits.append(0.0)
        else:
            present -= 1
            if waiting:
                waits.append(now_s - waiting.pop(0))
    return [float(np.mean(np.array(waits) > t)) for t in within_s]


@pytest.mark.parametrize("rate_rps", [7.0, 9.0, 9.5])
@pytest.mark.parametrize(("running", "fixed_share"), [(4.0, 0.1), (20.0, 0.5)])
def test_waits_of_a_simulated_chain(rate_rps, running, fixed_share):
    replica = replace(REPLICA, running=running, fixed_share=fixed_share)
    within_s = np.array([0.0, 0.2, 1.0])
    found = waits_longer(replica, rate_rps, within_s)
    assert found == pytest.approx(simulated_waits(replica, rate_rps, within_s), rel=0.15, abs=0.01)


def test_waits_grow_with_load_and_bursts_and_shrink_with_time():
    within_s = np.array([0.0, 1.0, 5.0])
    some, more = waits_longer(REPLICA, 8.0, within_s), waits_longer(REPLICA, 9.5, within_s)
    bursty = waits_longer(replace(REPLICA, dispersion=5.0, variability=3.0), 8.0, within_s)
    assert all(some < more) and all(some < bursty)
    assert all(np.diff(some) < 0)
    assert list(waits_longer(REPLICA, 10.0, within_s)) == [1.0, 1.0, 1.0]
    assert max(waits_longer(replace(REPLICA, running=5000.0), 0.01, within_s)) == 0.0


@pytest.mark.parametrize("rate_rps", [7.0, 8.5, 9.5])
@pytest.mark.parametrize(("long_s", "share"), [(2.0, 0.0), (21.0, 0.05), (201.0, 0.005)])
def test_work_that_varies_changes_how_long_requests_wait_and_hardly_how_many(rate_rps, long_s, share):
    """M/G/20, played: all take 2 s, or most take 1 s and a few so much longer that the mean is 2 s."""
    rng, within_s = np.random.default_rng(5), np.array([0.0, 1.0, 5.0])
    arrivals = np.cumsum(rng.exponential(1 / rate_rps, 200_000))
    work_s = np.where(rng.random(arrivals.size) < share, long_s, (2 - share * long_s) / (1 - share))
    free_s, waits = [0.0] * 20, []
    for at_s, seconds in zip(arrivals.tolist(), work_s.tolist(), strict=True):
        begun_s = max(at_s, free_s[0])
        heapq.heapreplace(free_s, begun_s + seconds)
        waits.append(begun_s - at_s)
    variation = float(np.var(work_s)) / 4
    replica = replace(REPLICA, fixed_share=1.0, variability=(rate_rps + 10 * variation) / (rate_rps + 10))
    found = waits_longer(replica, rate_rps, within_s)
    seen = np.array([np.mean(np.array(waits) > t) for t in within_s])
    assert found[0] == pytest.approx(seen[0], rel=0.15)
    assert not variation or all(found > 0.85 * seen), "no fewer are foreseen to wait long than do"


@pytest.mark.parametrize(
    ("scale", "rate_rps"), [("exponential", 0.5), ("exponential", 0.8), ("fixed", 0.7), ("two", 0.6)]
)
def test_waits_in_line_of_a_simulated_server(scale, rate_rps):
    """Lindley's recursion: Poisson arrivals, services of mean 1 s."""
    rng = np.random.default_rng(7)
    gaps = rng.exponential(1 / rate_rps, 200_000)
    kinds, weights = np.array([0.5, 3.0]), np.array([0.8, 0.2])
    if scale == "exponential":  # as quantiles of it
        kinds = -np.log(1 - (np.arange(2000) + 0.5) / 2000)
        weights = np.full(2000, 1 / 2000)
    elif scale == "fixed":
        kinds, weights = np.array([1.0]), np.array([1.0])
    services = rng.choice(kinds, size=gaps.size, p=weights)
    wait, waits = 0.0, np.empty(gaps.size)
    for number, (gap, service) in enumerate(zip(gaps, services, strict=True)):
        waits[number] = wait
        wait = max(0.0, wait + service - gap)
    within_s = np.array([0.0, 1.0, 3.0])
    found = waits_in_line(within_s, rate_rps, kinds, weights)
    assert found == pytest.approx([float(np.mean(waits > t)) for t in within_s], rel=0.2, abs=0.01)
    assert list(waits_in_line(within_s, 1.0 / float(weights @ kinds), kinds, weights)) == [1.0, 1.0, 1.0]
