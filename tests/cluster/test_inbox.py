"""Reports wait for the next pass; replicas are told when to send the next one."""

from __future__ import annotations

import math

import pytest

from cluster.inbox import LARGEST_REPORT_BYTES, Inbox, next_report_s


def test_the_latest_report_of_each_engine_is_read_once() -> None:
    inbox = Inbox()
    inbox.take({"a": b"1", "b": b"1"}, 10.0)
    inbox.take({"a": b"2"}, 11.0)
    assert inbox.fresh(["b", "a", "c"]) == {"a": b"2", "b": b"1"}
    assert inbox.fresh(["a", "b"]) == {}
    assert inbox.heard_s("a") == 11.0 and inbox.heard_s("c") == -math.inf


def test_a_new_replica_may_report_before_it_is_listed_and_strangers_are_forgotten() -> None:
    inbox = Inbox()
    inbox.take({"new": b"1", "a": b"1"}, 10.0)
    inbox.keep_only(["a"], 12.0)
    assert inbox.fresh(["new"]) == {"new": b"1"}
    inbox.take({"new": b"2"}, 12.0)
    inbox.keep_only(["a"], 100.0)
    assert inbox.fresh(["new", "a"]) == {"a": b"1"} and inbox.heard_s("new") == -math.inf


def test_what_is_too_large_to_be_a_report_is_not_kept() -> None:
    inbox = Inbox()
    inbox.take({"a": b"0" * (LARGEST_REPORT_BYTES + 1)}, 10.0)
    assert inbox.fresh(["a"]) == {}


@pytest.mark.parametrize("replicas", [1, 100, 10_000])
def test_reports_come_shortly_before_a_pass_and_not_all_at_once(replicas: int) -> None:
    """Whenever a replica has just reported, its next report is for the pass after, and half a period old at most."""
    early = []
    for number in range(200):
        for until_pass_s in (0.05, 0.4, 2.5, 4.9):
            wait_s = next_report_s(f"r{number}", 5.0, replicas, until_pass_s)
            assert wait_s > 1.0
            before_s = (until_pass_s - wait_s) % 5.0
            assert 0.0 < before_s <= 2.5
        early.append(before_s)
    spread = max(early) - min(early)
    assert spread == pytest.approx(min(2.4, 200 / 200 * replicas / 500), rel=0.1, abs=0.01)
