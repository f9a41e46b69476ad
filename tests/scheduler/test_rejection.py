"""A rejection as marked JSON and back, and when a client may come again."""

import json
import math
from collections import Counter

import pytest

from scheduler.rejection import REJECTION_KEY, Kind, Rejection

IDS = [f"chatcmpl-{place}" for place in range(2000)]


def retry_after_s_of(drain_s):
    return [Rejection.for_drain_time("busy", drain_s, request_id).retry_after_s for request_id in IDS]


def test_the_marked_object_gives_the_rejection_back():
    for kind in Kind:
        rejection = Rejection('as many wait; "retry in 9 s" – in vain', 7, kind)
        assert Rejection.from_json(rejection.as_json()) == rejection
        fields = {"reason": rejection.reason, "retry_after_s": 7, "kind": kind.value}
        assert json.loads(rejection.as_json()) == {REJECTION_KEY: fields}


def test_only_what_is_over_for_good_is_the_client_s_to_slow_down():
    assert {kind.value: kind.http_status.value for kind in Kind} == {"rejected": 429, "recalled": 503, "ended": 503}
    assert Rejection("the replica is stopping", 5, Kind.RECALLED).text == (
        "recalled: the replica is stopping; retry in 5 s"
    )


@pytest.mark.parametrize(
    "text",
    [
        None, 3, "", "stop", "rejected: x; retry in 60 s", "{}", "[]", "null", f'"{REJECTION_KEY}"',
        f'["{REJECTION_KEY}"]', f'{{"{REJECTION_KEY}": 1}}', f'{{"{REJECTION_KEY}": {{"reason": "x"}}}}',
        f'{{"{REJECTION_KEY}": {{"reason": "x", "retry_after_s": null}}}}',
        Rejection("x", 1).as_json().replace('"rejected"', '"lost"'), Rejection("x", 1).as_json() + " END",
    ],
)
def test_other_texts_are_none(text):
    assert Rejection.from_json(text) is None


@pytest.mark.parametrize("finish_reason", ["stop", "length", "error", None])
def test_an_answer_that_was_not_aborted_is_none_whatever_its_stop_reason(finish_reason):
    assert Rejection.of_answer(finish_reason, Rejection("x", 1).as_json()) is None


def test_an_aborted_output_is_a_rejection_only_with_the_marker():
    assert Rejection.of_answer("abort", Rejection("x", 1).as_json()) == Rejection("x", 1)
    assert Rejection.of_answer("abort", None) is None


@pytest.mark.parametrize(
    ("drain_s", "least_s", "most_s"),
    [
        (0.0, 1, 2), (0.2, 1, 2), (2.0, 2, 3), (8, 7, 10), (40, 31, 50), (1e9, 37, 60), (math.inf, 37, 60),
        (math.nan, 1, 2),
    ],
)
def test_clients_wait_whole_seconds_within_a_quarter_of_the_drain_time_and_from_one_to_sixty(drain_s, least_s, most_s):
    retry_s = retry_after_s_of(drain_s)
    assert set(retry_s) == set(range(least_s, most_s + 1))
    assert all(isinstance(seconds, int) for seconds in retry_s)


@pytest.mark.parametrize("drain_s", [8, 40, 1e9])
def test_requests_rejected_together_do_not_come_back_together(drain_s):
    counts = Counter(retry_after_s_of(drain_s))
    assert max(counts.values()) < 1.3 * len(IDS) / len(counts) * (1 if drain_s > 8 else 1.3)
    assert sum(retry_after_s_of(drain_s)) / len(IDS) == pytest.approx(min(drain_s, 48) + 0.5, rel=0.01), "rounded up"


def test_a_request_always_gets_the_same_retry_time():
    assert retry_after_s_of(30) == retry_after_s_of(30)
    assert Rejection.for_drain_time("busy", 30, "a-\ud800").retry_after_s >= 1, "no id can raise"
