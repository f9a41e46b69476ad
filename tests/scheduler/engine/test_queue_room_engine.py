"""The room that an engine publishes: as many more requests as it says are taken, and no more."""

from __future__ import annotations

import pytest
from engine_harness import Engine, add_many, fluid_params
from vllm.v1.request import RequestStatus

from scheduler.messages import Stats
from scheduler.wire import answer_of, read_answer


def rejecting(**fluid: object) -> Engine:
    params = fluid_params(kv_limit_tokens=400, capacity_rps=2.0, **fluid)
    return Engine(thresholds={"policy": "fluid", "fluid": params})


def rejected(engine: Engine) -> int:
    engine.steps(2)
    return sum(answer.stop_reason is not None for answer in engine.answers)


def full(engine: Engine, waiting: int) -> Engine:
    """Memory is taken by running requests, and `waiting` others queue."""
    add_many(engine, 3, "running", prompt=100, output=400)
    engine.steps(2)
    assert len(engine.running) >= 1
    add_many(engine, waiting - engine.scheduler.admission_queue.held, "waiting", prompt=100, output=400)
    engine.steps(1)
    assert engine.scheduler.admission_queue.held == waiting
    return engine


@pytest.mark.parametrize(("limits", "waiting"), [
    ({"queue_limit": 12}, 5), ({"queue_limit": 12, "ttft_s": 50.0}, 9), ({"ttft_s": 8.0}, 4),
])
def test_a_full_engine_takes_just_as_many_requests_as_it_publishes(limits: dict[str, float], waiting: int) -> None:
    room = full(rejecting(**limits), waiting).scheduler.stats().room
    assert room is not None and 0 < room < 30
    for more, turned_away in ((room, 0), (room + 3, 3)):
        engine = full(rejecting(**limits), waiting)
        add_many(engine, more, "new", prompt=100, output=400)
        assert rejected(engine) == turned_away


def test_requests_that_arrived_after_the_decision_take_their_place() -> None:
    engine = full(rejecting(queue_limit=12), 5)
    before = engine.scheduler.stats()
    add_many(engine, 4, "new", prompt=100, output=50)
    after = engine.scheduler.stats()
    assert before.room is not None and after.room == before.room - 4
    add_many(engine, 40, "more", prompt=100, output=50)
    assert engine.scheduler.stats().room == 0
    engine.step()
    assert engine.scheduler.stats().retry_after_s > 1.0 and engine.scheduler.stats().drain_rps == 2.0


def test_an_engine_that_fell_idle_has_room_whatever_it_decided_last() -> None:
    engine = full(rejecting(queue_limit=6), 6)
    assert engine.scheduler.stats().room == 0
    for name in list(engine.scheduler.requests):
        engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        engine.requests.pop(name, None)
    assert not engine.scheduler.requests, "no further decision is made"
    stats = engine.scheduler.stats()
    assert stats.room == engine.scheduler.active.limits.slots


@pytest.mark.parametrize("thresholds", [
    {"policy": "fcfs", "max_running": 2}, {"policy": "fluid"},
    {"policy": "fluid", "fluid": fluid_params(kv_limit_tokens=400)},
    {"policy": "fluid", "fluid": fluid_params(kv_limit_tokens=400, ttft_s=1.0, cold=True)},
])
def test_an_engine_that_rejects_none_publishes_no_room(thresholds: dict[str, object]) -> None:
    engine = Engine(thresholds=thresholds)
    add_many(engine, 20, prompt=100, output=50)
    engine.step()
    assert engine.scheduler.stats().room is None


def test_room_travels_and_an_engine_of_another_release_has_none() -> None:
    stats = full(rejecting(queue_limit=12), 5).scheduler.stats()
    text = answer_of(stats)
    assert read_answer(text, Stats) == stats
    older = text.replace(b',"room":%d' % stats.room, b"")
    assert older != text and read_answer(older, Stats).room is None


def test_what_the_ingress_turned_away_counts_as_arrivals_and_takes_no_place() -> None:
    engine = full(Engine(
        thresholds={"policy": "fluid", "fluid": fluid_params(kv_limit_tokens=400, capacity_rps=2.0, queue_limit=12)},
        settings={"trust_tenants": True},
    ), 5)
    before, counters = engine.scheduler.stats().room, engine.scheduler.recorder.counters()
    records = len(engine.scheduler.recorder.since(0)[1])
    engine.now_s += 3.0
    engine.add("new", prompt=100, output=50, extra_args={"headrace_turned_away": 40})
    after = engine.scheduler.recorder.counters()
    assert (after.arrivals - counters.arrivals, after.rejected - counters.rejected) == (41, 40)
    assert after.in_flight == counters.in_flight + 1
    assert before is not None and engine.scheduler.stats().room == before - 1
    arrivals = engine.scheduler.recorder.since(0)[1]
    assert len(arrivals) == records + 9, "of many, eight stand for all"
    times = [one.at_s for one in arrivals]
    assert times == sorted(times) and len(set(times[-9:])) == 9, "spread over the time in which they came"


def test_without_an_ingress_a_client_s_word_is_not_taken() -> None:
    engine = rejecting(queue_limit=12)
    engine.add("new", extra_args={"headrace_turned_away": 40})
    assert engine.scheduler.recorder.counters().arrivals == 1


# The outlook.


def test_a_queue_lengthens_the_wait_and_every_request_the_pace() -> None:
    idle = rejecting(queue_limit=12)
    idle.steps(1)
    quiet = idle.scheduler.stats().outlook
    busy = full(rejecting(queue_limit=12), 5).scheduler
    queued = busy.stats().outlook
    assert quiet is not None and queued is not None
    assert quiet.wait_s == 0.0 < queued.wait_s and quiet.output_tokens == queued.output_tokens > 0
    assert queued.token_s > quiet.token_s and queued.added_s > 0
    longer = full(rejecting(queue_limit=12), 9).scheduler.stats().outlook
    assert longer is not None and longer.wait_s > queued.wait_s and longer.token_s > queued.token_s


def test_what_arrived_after_the_decision_is_ahead_too() -> None:
    engine = full(rejecting(queue_limit=12), 5)
    before = engine.scheduler.stats().outlook
    add_many(engine, 4, "new", prompt=100, output=50)
    after = engine.scheduler.stats().outlook
    assert before is not None and after is not None and after.wait_s > before.wait_s
    assert after.token_s == pytest.approx(before.token_s + 4 * before.added_s)


def test_an_engine_that_fell_idle_lets_no_request_wait() -> None:
    engine = full(rejecting(queue_limit=6), 6)
    for name in list(engine.scheduler.requests):
        engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        engine.requests.pop(name, None)
    outlook, fresh = engine.scheduler.stats().outlook, rejecting(queue_limit=6)
    fresh.steps(1)
    quiet = fresh.scheduler.stats().outlook
    assert outlook is not None and quiet is not None and outlook.wait_s == 0.0
    assert outlook.token_s == quiet.token_s, "nor does it keep the pace of what ran before"


@pytest.mark.parametrize("thresholds", [{"policy": "fcfs", "max_running": 2}, {"policy": "fluid"}])
def test_a_policy_without_a_model_predicts_nothing(thresholds: dict[str, object]) -> None:
    engine = Engine(thresholds=thresholds)
    add_many(engine, 20, prompt=100, output=50)
    engine.step()
    assert engine.scheduler.stats().outlook is None
