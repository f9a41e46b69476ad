"""A refusal as one line of text, and back."""

import math

import pytest

from scheduler.refusal import Refusal


def test_the_line_gives_the_refusal_back_wherever_it_stands():
    refusal = Refusal("as many wait; retry in vain", 7)
    assert Refusal.from_text(refusal.text) == refusal
    assert Refusal.from_text(f"Message: {refusal.text} (Request ID: x)") == refusal


@pytest.mark.parametrize("text", [None, 3, "", "stop", "refused: no seconds"])
def test_other_texts_hold_none(text):
    assert Refusal.from_text(text) is None


@pytest.mark.parametrize(("drain_s", "told_s"), [(0.0, 1), (0.2, 1), (1.2, 2), (7, 7), (1e9, 60), (math.nan, 1)])
def test_clients_wait_whole_seconds_from_one_to_sixty(drain_s, told_s):
    assert Refusal.for_drain_time("busy", drain_s).retry_after_s == told_s
