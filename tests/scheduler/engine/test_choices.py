"""The choices of a request with several, after a sibling was released or rejected."""

import pytest

from scheduler.engine import choices as choices_module
from scheduler.engine.choices import Choices, family_of, parent_of
from scheduler.rejection import Rejection

BUSY = Rejection("busy", 7)


@pytest.fixture
def choices():
    return Choices()


def held(choices, *names):
    for name in names:
        choices.hold(name)
    return choices


@pytest.mark.parametrize(
    ("request_id", "parent"),
    [
        ("0_cmpl-1-0-ab", "cmpl-1-0-ab"), ("17_a_b", "a_b"), ("cmpl-1_0", None), ("chatcmpl-0_x", None), ("r1", None),
        ("_x", None), ("3_", None), ("", None), ("²_x", None),
    ],
)
def test_a_choice_is_recognised_by_its_id(request_id, parent):
    assert parent_of(request_id) == parent


@pytest.mark.parametrize(
    ("request_id", "family"),
    [
        ("cmpl-x-0-0a1b2c3d", "cmpl-x"), ("cmpl-x-17-0a1b2c3d", "cmpl-x"), ("2_cmpl-x-1-0a1b2c3d", "cmpl-x"),
        ("chatcmpl-x-0a1b2c3d", None), ("1_chatcmpl-x-0a1b2c3d", "chatcmpl-x-0a1b2c3d"), ("cmpl-x-0", None),
        ("transcribe-x-3-0a1b2c3d", "transcribe-x"), ("embd-x-0-0a1b2c3d", None), ("r1", None), ("", None),
    ],
)
def test_the_requests_of_one_completion_are_recognised_by_their_ids(request_id, family):
    assert family_of(request_id) == family


def test_all_that_wait_are_rejected_with_one_of_them(choices):
    held(choices, "0_a", "1_a", "0_b", "alone", "2_a")
    assert choices.reject("1_a", BUSY) == ["0_a", "1_a", "2_a"]
    assert choices.reject("alone", BUSY) == ["alone"]
    assert choices.rejection_of("0_b") is None and choices.rejection_of("alone") is None


def test_siblings_of_one_let_through_are_committed_whenever_they_come(choices):
    held(choices, "0_a", "1_a", "0_b")
    choices.let_through("0_a")
    assert choices.committed == {"1_a"}
    held(choices, "2_a")
    assert choices.committed == {"1_a", "2_a"}
    choices.let_through("1_a")
    choices.leave("2_a")
    assert not choices.committed
    held(choices, "3_a")
    assert choices.committed == {"3_a"}, "though none of its siblings waited when it came"


def test_later_siblings_of_a_rejected_request_get_its_rejection(choices):
    held(choices, "0_a", "1_a")
    for name in choices.reject("0_a", BUSY):
        choices.leave(name)
    held(choices, "2_a", "0_b")
    assert choices.rejection_of("2_a") == BUSY and choices.rejection_of("0_b") is None


def test_what_is_remembered_is_bounded(choices, monkeypatch):
    monkeypatch.setattr(choices_module, "_REMEMBERED", 10)
    for number in range(1000):
        held(choices, f"0_{number}", f"r{number}")
        choices.let_through(f"0_{number}")
        choices.let_through(f"r{number}")
    held(choices, "0_gone")
    choices.leave("0_gone")
    assert len(choices._settled) == 10 and not choices._waiting and not choices.committed
    held(choices, "1_999", "1_0")
    assert choices.committed == {"1_999"}


def test_a_cancelled_request_leaves_nothing_behind(choices):
    held(choices, "0_a", "1_a")
    choices.leave("0_a")
    choices.leave("1_a")
    assert not choices._waiting and not choices._settled
