"""The margin that requests would have needed."""

import pytest

from scheduler.estimation.realised_margin import LastingQuantile, RealisedMargin


def after(ratios, planned_s=0.05):
    realised = RealisedMargin()
    for ratio in ratios:
        realised.observe(ratio * planned_s, planned_s)
    return realised


def test_few_requests_say_nothing():
    assert after([1.5] * 299).margin(0.01) == 0.0
    assert after([1.5] * 300).margin(0.01) == pytest.approx(0.5)


def test_all_but_the_accepted_share_are_covered():
    """Of every 100 requests 4 were 3 % slower than planned and one was 10 % slower."""
    ratios = ([0.98] * 95 + [1.03] * 4 + [1.1]) * 5
    assert after(ratios).margin(0.02) == pytest.approx(0.03)
    assert after(ratios).margin(0.005) == pytest.approx(0.1)
    assert after(ratios).margin(0.1) == 0.0


def test_requests_that_a_change_catches_unprepared_do_not_count():
    """150 requests of the latest 500 were late together; before and after, none was."""
    assert after([0.98] * 200 + [1.8] * 150 + [0.98] * 150).margin(0.01) == 0.0


def test_a_wider_margin_does_not_change_what_was_needed():
    """Requests are compared with the active plan, so the loop settles at once instead of oscillating."""
    assert after([1.05] * 400, planned_s=0.05).margin(0.01) == pytest.approx(
        after([1.05] * 400, planned_s=0.04).margin(0.01)
    )


def test_it_is_bounded():
    assert after([3.0] * 400).margin(0.01) == 0.5


def test_a_lasting_quantile_is_that_of_the_median_block():
    """The largest of every 100 is 5; in two blocks of the latest five much more."""
    values, blocks = LastingQuantile(), [5, 90, 5, 70, 5]
    for largest in blocks:
        for value in [1.0] * 99 + [float(largest)]:
            values.observe(value)
    assert values.of_all_but(0.005) == 5.0
    assert values.of_all_but(0.02) == 1.0
