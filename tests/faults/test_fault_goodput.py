"""Seconds to 90 % of the goodput before a fault."""

import pytest

from benchmarks.faults.goodput import WINDOW_S, goodput_before, goodput_by_second, seconds_to, share_kept
from benchmarks.faults.outcomes import Outcome, Seen


def test_goodput_counts_good_requests_in_the_second_they_arrive():
    def seen(arrival_s, good=True):
        return Seen(arrival_s, arrival_s + 2, Outcome.COMPLETE, good)

    assert goodput_by_second([seen(0.0), seen(0.9), seen(1.0), seen(1.5, good=False), seen(7.0)], 3) == [2, 1, 0]


def test_before_leaves_out_the_filling_and_what_the_fault_catches():
    assert goodput_before([9, 9, 4, 2, 0, 7], fill_s=2, fault_s=5, settle_s=1) == 3.0
    with pytest.raises(ValueError, match="no second"):
        goodput_before([1, 1], fill_s=2, fault_s=2, settle_s=1)


STEADY = [4] * 10


@pytest.mark.parametrize(("after", "seconds"), [
    ([4] * 20, 0),
    ([3] + [4] * 19, 0),
    ([0] * 7 + [4] * 20, 6),
    ([0] * 30, None),
    ([4] * (WINDOW_S - 1), None),
])
def test_seconds_to_ninety_per_cent(after, seconds):
    assert seconds_to(STEADY + after, 4.0, len(STEADY)) == seconds


def test_without_goodput_before_there_is_none_to_come_back():
    assert seconds_to([0] * 40, 0.0, 10) is None
    assert share_kept([0] * 40, 0.0, 10) is None


def test_share_kept():
    assert share_kept([4, 4, 2, 4], 4.0, 2) == 0.75
