"""How far running requests are ahead of their TPOT target, and what a long prefill may take of it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.policies.tpot_slack import TpotSlack

TOKEN_S = 0.1


def never_ends(stages, tokens):
    return np.ones(len(stages))


def may_end(stages, tokens):
    """One token in a hundred is the last one, whatever the age."""
    return 0.99**tokens


def spare(slack, tokens, elapsed_s, *, wanted_s=10.0, gain_s=0.0, misses=0.0, now_s=100.0):
    stages = np.asarray(tokens, dtype=np.int64)
    since_s = now_s - np.asarray(elapsed_s, dtype=np.float64)
    return slack.spare_s(stages, since_s, now_s, wanted_s, gain_s=gain_s, misses=misses)


def test_the_smallest_slack_decides():
    # 12 tokens, one of them under way: ten intervals of 0.1 s were due, 0.4 s have passed.
    assert spare(TpotSlack(TOKEN_S, never_ends), [12], [0.4]) == pytest.approx(0.6)
    assert spare(TpotSlack(TOKEN_S, never_ends), [12, 4], [0.4, 0.08]) == pytest.approx(0.12)


def test_a_request_that_has_just_begun_has_no_slack():
    assert spare(TpotSlack(TOKEN_S, never_ends), [12, 1], [0.4, math.nan]) == 0.0


def test_slack_used_by_the_iteration_under_way_is_not_used_again():
    slack = TpotSlack(TOKEN_S, never_ends)
    first = spare(slack, [12], [0.4])
    assert spare(slack, [13], [0.4]) == pytest.approx(0.1)
    assert first == pytest.approx(0.6)


def test_prefills_alone_have_all_the_time_they_want():
    assert spare(TpotSlack(TOKEN_S, never_ends), [0, 0], [math.nan] * 2, wanted_s=3.0) == 3.0


def test_requests_that_catch_up_before_they_end_allow_more_than_their_slack():
    """Ten running requests regain 50 ms a token: a prefill of 0.2 s puts each behind for four tokens."""
    def most(survives, misses):
        return spare(
            TpotSlack(TOKEN_S, survives), [2] * 10, [0.0] * 10, wanted_s=0.2, gain_s=0.05, misses=misses
        )

    assert most(never_ends, 0.0) == pytest.approx(0.2)
    assert most(may_end, 0.5) == pytest.approx(0.2)  # 10 · (1 − 0.99^4) = 0.39 requests end too early
    assert most(may_end, 0.3) == 0.0


def test_at_capacity_no_more_than_the_slack_is_used():
    """Where later tokens regain nothing, a request that falls behind stays behind: the onset of an overload."""
    assert spare(TpotSlack(TOKEN_S, never_ends), [2], [0.0], wanted_s=0.2, gain_s=0.0, misses=1.0) == 0.0


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.integers(2, 300), min_size=1, max_size=20), relative_s=st.floats(0.3, 1.0),
    wanted_s=st.floats(0.01, 5.0),
)
def test_without_gain_no_request_falls_behind(tokens: list[int], relative_s: float, wanted_s: float):
    elapsed_s = [(count - 2) * TOKEN_S * relative_s for count in tokens]
    lent_s = spare(TpotSlack(TOKEN_S, never_ends), tokens, elapsed_s, wanted_s=wanted_s)
    for count, so_far_s in zip(tokens, elapsed_s, strict=True):
        # The token under way and the next one, each at its planned time, and the slack used.
        assert so_far_s + 2 * TOKEN_S + lent_s <= count * TOKEN_S + 1e-9
