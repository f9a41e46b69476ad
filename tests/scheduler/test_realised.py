"""The margin that requests would have needed."""

import pytest

from scheduler.realised import RealisedMargin


def after(ratios, planned_s=0.05):
    realised = RealisedMargin()
    for ratio in ratios:
        realised.observe(ratio * planned_s, planned_s)
    return realised


def test_few_requests_say_nothing():
    assert after([1.5] * 99).margin(0.01) == 0.0


def test_all_but_the_promised_share_are_covered():
    """Of 500 requests 20 were 3 % slower than planned and 5 were 10 % slower."""
    ratios = [0.98] * 475 + [1.03] * 20 + [1.1] * 5
    assert after(ratios).margin(0.02) == pytest.approx(0.03)
    assert after(ratios).margin(0.005) == pytest.approx(0.1)
    assert after(ratios).margin(0.1) == 0.0


def test_a_wider_margin_does_not_change_what_was_needed():
    """Requests are measured against the plan in force, so the loop settles at once instead of swinging."""
    assert after([1.05] * 200, planned_s=0.05).margin(0.01) == pytest.approx(
        after([1.05] * 200, planned_s=0.04).margin(0.01)
    )


def test_it_is_bounded_and_can_be_forgotten():
    realised = after([3.0] * 200)
    assert realised.margin(0.01) == 0.25
    realised.forget()
    assert realised.margin(0.01) == 0.0
