"""Who is how far ahead of their pace, and what a long prompt may take of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.headway import Headway

PROMISED_S = 0.1


def after(*durations_s):
    """Iterations of these durations have run; the next one is about to be composed."""
    headway, now_s = Headway(PROMISED_S), 0.0
    headway.started(now_s)
    for duration_s in durations_s:
        now_s += duration_s
        headway.started(now_s)
    return headway


def spare(headway, *stages, wanted_s=10.0):
    return headway.spare_s(np.array(stages, dtype=np.int64), wanted_s)


def test_whoever_is_least_ahead_decides():
    headway = after(*[0.04] * 10)
    assert spare(headway, 12) == pytest.approx(0.6)  # ten iterations done, one runs
    assert spare(after(*[0.04] * 10), 12, 4) == pytest.approx(0.12)


def test_who_has_just_begun_lends_nothing():
    assert spare(after(*[0.04] * 10), 12, 1) == 0.0


def test_what_was_lent_to_the_iteration_that_runs_is_not_lent_again():
    headway = after(*[0.04] * 10)
    first = spare(headway, 12)
    headway.started(0.44)
    assert spare(headway, 13) == pytest.approx(max(0.0, 0.66 - first))


def test_nobody_decodes_or_nothing_is_wanted():
    assert spare(after(), 0, 0, wanted_s=3.0) == 3.0
    assert spare(after(0.04, 0.04), 4, wanted_s=0.01) == 0.01


def test_in_a_replica_that_keeps_the_promise_exactly_nobody_has_time_over():
    assert spare(after(*[PROMISED_S] * 50), 3, 20, 40) == pytest.approx(0.0, abs=1e-9)
    assert spare(after(*[2 * PROMISED_S] * 50), 3, 20, 40) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, PROMISED_S), st.floats(0, 1)), min_size=20, max_size=200))
def test_lending_never_makes_anybody_miss_the_promise(steps):
    """Requests that begin at any iteration: with what was lent spent, none is ever behind by more than the iteration
    that runs."""
    headway, now_s = Headway(PROMISED_S), 0.0
    headway.started(now_s)
    begun_s, lent_s = [], 0.0
    for own_s, wanted_s in steps:
        ends_s = now_s + own_s + lent_s
        stages = [len(begun_s) - place + 1 for place in range(len(begun_s))]
        lent_s = spare(headway, *stages, wanted_s=wanted_s) if stages else 0.0
        now_s = ends_s
        headway.started(now_s)
        begun_s.append(now_s)
        for place, at_s in enumerate(begun_s):
            assert now_s - at_s <= (len(begun_s) - 1 - place) * PROMISED_S + PROMISED_S + 1e-9


def test_memory_is_bounded():
    headway = Headway(PROMISED_S)
    for number in range(20_000):
        headway.started(0.04 * number)
    assert 0.06 * 4095 <= spare(headway, 30_000, wanted_s=1e6) <= 0.06 * 8192
