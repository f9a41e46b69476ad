"""Places taken lately: the sums beside the changes say what the changes do, in steps that do not multiply."""

from __future__ import annotations

import random
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_front_door_rule import Watch, door_at

from router import front_door, places
from router.places import ON_THE_WAY_S, CountedPlaces, Taken

KEEP_S = 4.0
CHANGES = st.lists(
    st.tuples(st.sampled_from([0.0, 0.01, ON_THE_WAY_S, 0.25, 3.0]), st.integers(-3, 3), st.sampled_from([0.0, 5.0])),
    max_size=40,
)
Change = tuple[float, int, float]


def by_definition(changes: list[Change], at_s: float) -> Taken:
    """Every change looked at: one that takes places counts from a little before the report, others from after it."""
    kept = [one for one in changes if one[0] >= changes[-1][0] - KEEP_S]
    counted = [
        one for one in kept
        if one[0] >= at_s - ON_THE_WAY_S and (one[1] > 0 or one[0] > at_s + ON_THE_WAY_S)
    ]
    prompts = tuple((one[0] - at_s, one[2]) for one in counted if one[2])
    return Taken(sum(one[1] for one in counted), sum(tokens for _, tokens in prompts), prompts)


@given(CHANGES, st.lists(st.integers(-1, 100), min_size=1, max_size=5))
def test_what_has_changed_since_a_report_is_what_its_definition_says(steps: list[Change], ages: list[int]) -> None:
    kept, changes, now_s = CountedPlaces(KEEP_S), list[Change](), 100.0
    for after_s, requests, tokens in steps:
        now_s += after_s
        kept.change(now_s, requests, tokens)
        changes.append((now_s, requests, tokens))
        reported_s = [now_s - 0.05 * age for age in ages] + [now_s - ON_THE_WAY_S, now_s + ON_THE_WAY_S]
        expected = [by_definition(changes, at_s) for at_s in reported_s]
        assert [kept.since(at_s) for at_s in reported_s] == expected
        assert kept.requests_since(reported_s) == sum(taken.requests for taken in expected)


class Steps:
    """Lines that the front door executes, counted while this is entered."""

    def __init__(self) -> None:
        self.count = 0

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in (front_door.__file__, places.__file__):
            return None
        self.count += event == "line"
        return self._trace

    def __enter__(self) -> Steps:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


@pytest.mark.parametrize("ingresses", [1, 2])
def test_a_request_costs_steps_by_replica_only_after_a_change_and_never_by_recent_requests(ingresses: int) -> None:
    replicas, sent = 200, 400
    watch, rng = Watch(), random.Random(1)
    door = door_at(watch, ingresses)
    for number in range(replicas):
        watch.clock[0] += rng.random() * 0.002
        watch.report(str(number), 9 * ingresses)
    for _ in range(sent):
        watch.clock[0] += 0.001
        door.sent("m")
    with Steps() as first:
        assert door.full("m", "r") is None
    with Steps() as again:
        assert door.full("m", "r") is None
    door.sent("m")
    with Steps() as after_a_change:
        assert door.full("m", "r") is None
    assert first.count < 30 * replicas
    assert after_a_change.count < 10 * replicas
    assert again.count < 50
