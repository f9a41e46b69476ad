"""How fast a history of thresholds settles."""

import pytest

from benchmarks.evidence.settling import settling


def history(*values, name="iteration_s"):
    rest = {"iteration_s": 0.05, "prompt_flow_tokens": 100.0, "queue_limit": 20}
    return [{"at_s": 5.0 * place, **rest, name: value} for place, value in enumerate(values)]


def test_passes_count_from_the_change_until_all_stay_close_to_the_last():
    rows = history(1.0, 1.0, 0.6, 0.56, 0.49, 0.5, 0.5, 9.0)
    assert settling(rows, 5, 35) == (3, pytest.approx(0.01 / 0.49))  # it passes at 10, 15, 20 …
    assert settling(rows, 0, 5.1).passes == 1


def test_a_return_counts_as_unsettled():
    assert settling(history(1.0, 0.5, 0.5, 0.8, 0.5), 0, 99).passes == 4


def test_a_cycle_within_the_band_shows_in_the_swing():
    settled = settling(history(1.0, 1.04, 0.96, 1.04, 1.0), 0, 99)
    assert settled.passes == 1
    assert settled.swing == pytest.approx(0.08 / 0.96)


def test_one_request_more_or_less_is_rounding_two_are_not():
    assert settling(history(9, 4, 5, 4, 5, name="queue_limit"), 0, 99) == (1, 0.0)
    assert settling(history(9, 4, 6, 4, name="queue_limit"), 0, 99).passes == 3


def test_a_limit_that_comes_and_goes_is_no_rounding():
    assert settling(history(None, None, 3, 3, name="queue_limit"), 0, 99).passes == 2
    assert settling(history(None, None, None, name="queue_limit"), 0, 99) == (1, 0.0)


def test_no_pass_is_an_error():
    with pytest.raises(ValueError, match="not passed between 50 and 60 s"):
        settling(history(1.0, 1.0), 50, 60)
