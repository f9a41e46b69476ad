"""The recorder: cursors, what is lost, and bounded memory."""

import pytest

from scheduler.engine.recorder import Recorder
from scheduler.messages import Arrival, Finished, Iteration
from scheduler.rejection import Kind


def _iterate(recorder, times):
    for step in range(times):
        recorder.iteration(at_s=float(step), seconds=0.01, prefill_tokens=1, decode_tokens=2, kv_tokens=3, batch_size=4)


def test_records_carry_what_was_written_in_one_sequence():
    recorder = Recorder()
    recorder.arrival(1.0, 32, None)
    recorder.iteration(1.5, 0.25, 32, 0, 32, 1)
    recorder.finished(2.0, 32, 8, aborted=False)
    iterations, arrivals, finished, lost = recorder.since(0)
    assert arrivals == (Arrival(1, 1.0, 32, None),)
    assert iterations == (Iteration(2, 1.5, 0.25, 32, 0, 32, 1),)
    assert finished == (Finished(3, 2.0, 32, 8, False),)
    assert not lost and recorder.cursor == 3


def test_same_cursor_gives_the_same_records_and_the_next_only_newer_ones():
    recorder = Recorder()
    _iterate(recorder, 3)
    first = recorder.since(0)
    assert recorder.since(0) == first and len(first[0]) == 3
    cursor = recorder.cursor
    assert recorder.since(cursor) == ((), (), (), False)
    recorder.arrival(9.0, 10, 5)
    assert recorder.since(cursor) == ((), (Arrival(4, 9.0, 10, 5),), (), False)
    assert recorder.since(cursor) == ((), (Arrival(4, 9.0, 10, 5),), (), False)


def test_no_record_is_given_twice_when_more_are_written_while_a_report_is_made():
    recorder = Recorder()
    _iterate(recorder, 2)
    until = recorder.cursor
    _iterate(recorder, 1)  # the engine goes on
    first = recorder.since(0, until)[0]
    rest = recorder.since(until)[0]
    assert [record.seq for record in first + rest] == [1, 2, 3]


def test_overwritten_records_are_reported_lost():
    recorder = Recorder(kept=4)
    _iterate(recorder, 4)
    assert recorder.since(0)[3] is False
    _iterate(recorder, 2)  # 1 and 2 are overwritten
    iterations, _, _, lost = recorder.since(0)
    assert [record.seq for record in iterations] == [3, 4, 5, 6] and lost
    assert recorder.since(1)[3], "record 2 was never read"
    assert not recorder.since(2)[3], "1 and 2 were read before they were overwritten"


def test_one_kind_overflowing_loses_nothing_of_another():
    recorder = Recorder(kept=2)
    recorder.arrival(0.0, 1, 1)
    _iterate(recorder, 5)
    assert len(recorder.since(0)[1]) == 1


@pytest.mark.parametrize("cursor", [100, -1])
def test_cursor_from_another_life_counts_as_none_read(cursor):
    recorder = Recorder()
    _iterate(recorder, 2)
    assert recorder.since(cursor) == recorder.since(0)
    assert len(recorder.since(cursor)[0]) == 2 and not recorder.since(cursor)[3]


def test_none_asks_for_no_records():
    recorder = Recorder(kept=1)
    _iterate(recorder, 3)
    assert recorder.since(None) == ((), (), (), False)


def test_memory_is_bounded_and_totals_are_not():
    recorder = Recorder(kept=8)
    for _ in range(1000):
        recorder.arrival(0.0, 1, None)
        recorder.finished(0.0, 1, 1, aborted=True)
    _iterate(recorder, 1000)
    assert [len(kind) for kind in recorder.since(0)[:3]] == [8, 8, 8]
    counters = recorder.counters()
    assert (counters.arrivals, counters.completed, counters.aborted, counters.iterations) == (1000, 0, 1000, 1000)


def test_every_request_is_counted_under_one_name():
    recorder = Recorder()
    for _ in range(10):
        recorder.arrival(0.0, 1, None)
    recorder.finished(0.0, 1, 1, aborted=False)
    recorder.finished(0.0, 1, 1, aborted=True)
    for kind, late in ((Kind.REJECTED, True), (Kind.REJECTED, False), (Kind.RECALLED, False), (Kind.ENDED, False)):
        recorder.finished(0.0, 1, 0, aborted=True, turned_away=kind, too_late=late)
    counters = recorder.counters()
    assert (counters.rejected_too_late, counters.rejected_queue_full, counters.rejected_front_door) == (1, 1, 0)
    assert (counters.completed, counters.aborted, counters.rejected, counters.recalled) == (1, 2, 2, 1)
    assert counters.in_flight == 4
    assert [record.aborted for record in recorder.since(0)[2]] == [False] + [True] * 5, "no whole answers"


def test_totals_of_holds():
    recorder = Recorder()
    recorder.released(0.25)
    recorder.released(0.5)
    counters = recorder.counters()
    assert (counters.held, counters.hold_s) == (2, 0.75)


def test_every_rejection_has_a_reason():
    recorder = Recorder()
    recorder.turned_away(1.0, 5, 10, None)
    recorder.finished(0.0, 1, 0, aborted=True, turned_away=Kind.REJECTED, too_late=True)
    counters = recorder.counters()
    assert counters.rejected_front_door == 5
    assert counters.rejected == counters.rejected_front_door + counters.rejected_too_late + counters.rejected_queue_full


@pytest.mark.parametrize(("misses", "good"), [
    ({"ttft": False, "tpot": False}, 1), ({"ttft": True, "tpot": False}, 0), ({"ttft": True, "tpot": True}, 0), ({}, 1),
])
def test_good_is_a_completed_request_that_met_every_target(misses, good):
    recorder = Recorder()
    recorder.judged(misses, audited=False)
    assert recorder.counters().good == good
