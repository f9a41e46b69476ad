"""What those in service will grow into, against exact growth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.law import ServiceTimeLaw
from scheduler.mix import Lengths
from scheduler.pace import Pace
from scheduler.projection import Projection
from scheduler.targets import survival_of

LAW = ServiceTimeLaw(0.004, 4e-7, 6e-5, 6e-5, 0.011)
BLOCK = 16


def pace_of(lengths: Lengths, *, memory: int, iteration_s: float | None = None) -> Pace:
    return Pace(
        law=LAW, survival=survival_of(lengths), kv_limit_tokens=memory, block_tokens=BLOCK, iteration_s=iteration_s
    )


def admit_all_that_fit(projection: Projection, prompt: int) -> int:
    admitted = 0
    while projection.fits(prompt):
        projection.add(prompt)
        admitted += 1
    return admitted


@settings(max_examples=60, deadline=None)
@given(
    output=st.integers(2, 700), prompt=st.integers(1, 900), memory=st.integers(2_000, 60_000),
    ages=st.lists(st.floats(0, 0.999), max_size=20),
)
def test_whoever_is_admitted_never_overflows_the_memory(output: int, prompt: int, memory: int, ages: list[float]):
    """With answers of one length the growth is certain: block by block it must stay within the limit."""
    projection = Projection(pace_of(Lengths.point(prompt, output), memory=memory))
    stages = np.array([int(age * output) for age in ages], dtype=int)
    projection.reset(stages, stages + float(prompt))
    admitted = admit_all_that_fit(projection, prompt)
    everybody = np.concatenate([stages, np.zeros(admitted, dtype=int)])

    def blocks_after(ahead: int) -> int:
        there = everybody[everybody + ahead < output]
        return int(np.sum(np.ceil((prompt + there + ahead) / BLOCK))) * BLOCK

    if admitted:
        assert max(blocks_after(ahead) for ahead in range(output)) <= memory


@settings(max_examples=40, deadline=None)
@given(output=st.integers(2, 400), prompt=st.integers(1, 900), iteration_s=st.floats(0.015, 0.2))
def test_whoever_is_admitted_together_never_exceeds_the_iteration(output: int, prompt: int, iteration_s: float):
    projection = Projection(pace_of(Lengths.point(prompt, output), memory=10**9, iteration_s=iteration_s))
    admitted = admit_all_that_fit(projection, prompt)
    longest_s = LAW.iteration_s(0.0, float(admitted), float(admitted * (prompt + output)))
    assert longest_s <= iteration_s * 1.02 or admitted == 0
    one_more_s = LAW.iteration_s(0.0, admitted + 1.0, (admitted + 1.0) * (prompt + output))
    assert one_more_s > iteration_s * 0.98


def test_old_requests_count_for_what_they_have_left():
    lengths = Lengths.point(100, 500)
    young, old = (Projection(pace_of(lengths, memory=60_000)) for _ in range(2))
    young.reset(np.zeros(50, dtype=int), np.full(50, 100.0))
    old.reset(np.full(50, 450), np.full(50, 550.0))
    assert admit_all_that_fit(old, 100) > admit_all_that_fit(young, 100)


def test_unknown_lengths_count_by_their_survival():
    """Nine of ten answers are short: many more fit than if all were long."""
    short_mostly = Lengths.from_pairs([(50, 10)] * 9 + [(50, 1000)])
    all_long = Lengths.point(50, 1000)
    by_survival, by_worst = (Projection(pace_of(lengths, memory=50_000)) for lengths in (short_mostly, all_long))
    assert admit_all_that_fit(by_survival, 50) > 3 * admit_all_that_fit(by_worst, 50)


def test_more_risk_of_overflow_lets_more_in():
    lengths = Lengths.from_pairs([(50, 10), (50, 1000)])
    counts = []
    for z in (0.0, 2.0, 4.0):
        pace = Pace(law=LAW, survival=survival_of(lengths), kv_limit_tokens=40_000, overflow_z=z)
        counts.append(admit_all_that_fit(Projection(pace), 50))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


def test_whoever_outlives_every_length_seen_still_counts_now():
    projection = Projection(pace_of(Lengths.point(10, 20), memory=1000))
    projection.reset(np.array([500]), np.array([900.0]))
    assert not projection.fits(90)
    projection.reset(np.array([], dtype=int), np.array([]))
    assert projection.fits(90)


def test_nothing_seen_yet_is_an_error_in_words():
    with pytest.raises(ValueError, match="survival"):
        Pace(law=LAW, survival=(), kv_limit_tokens=1000)
