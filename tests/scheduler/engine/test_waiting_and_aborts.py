"""The limit on running requests, aborts wherever a request is, and what vLLM counts of the requests that wait."""

import pytest
from engine_harness import Engine, add_many, boundary_engine, fluid_params, telemetry, wait

from scheduler.messages import Finished

# The cap.


def test_cap_limits_running_requests():
    engine = Engine(thresholds={"max_running": 4})
    add_many(engine, 10, output=6)
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        assert len(engine.running) <= 4
    engine.run()
    assert len(engine.finished) == 10


def test_cap_below_the_running_requests_evicts_none():
    engine = Engine(thresholds={"max_running": 8})
    first = add_many(engine, 8, "a", output=20)
    engine.step()
    assert engine.apply({"version": 1, "max_running": 3}).accepted
    add_many(engine, 4, "b", output=20)
    while any(name in engine.requests for name in first):
        before = set(engine.running)
        engine.step()
        stay = {name for name in before if name in engine.requests}
        assert stay <= set(engine.running), "none is put out"
        assert stay == set(engine.running) or len(engine.running) <= 3, "none enters above the cap"
    assert not any(engine.finished[name].num_preemptions for name in first)
    engine.run()
    assert len(engine.finished) == 12


def test_cap_counts_preempted_requests():
    engine = Engine(blocks=16, thresholds={"max_running": 4})
    add_many(engine, 8, prompt=40, output=40)
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        assert len(engine.running) + engine.scheduler.admission_queue.released <= 4
    assert telemetry(engine).counters.preemptions > 0
    engine.run()
    assert len(engine.finished) == 8


# Aborts, wherever a request is.


def assert_gone(engine, name):
    assert name not in engine.scheduler.requests and name not in engine.running
    assert name not in [request.request_id for request in engine.scheduler.waiting]
    assert engine.scheduler.admission_queue.type_of(name) is None
    engine.run()
    assert name not in engine.finished and engine.scheduler.kv_cache_manager.usage == 0.0


def test_abort_while_held():
    engine = Engine(thresholds=wait(8, max_hold_s=10.0))
    engine.add("busy", output=10)
    engine.step()
    names = add_many(engine, 3)
    engine.step()
    engine.abort(names[0])
    assert engine.scheduler.admission_queue.held == 2
    assert telemetry(engine).finished[-1] == Finished(telemetry(engine).cursor, engine.now_s, 32, 0, True)
    assert_gone(engine, names[0])
    assert len(engine.finished) == 3


def test_abort_when_let_through_and_not_yet_running():
    engine = Engine(blocks=6, thresholds={"policy": "fcfs"})
    engine.add("big", prompt=60, output=10)
    engine.step()
    engine.add("next", prompt=60, output=10)
    engine.step()
    assert engine.scheduler.admission_queue.released == 1 and engine.running == ["big"]
    engine.abort("next")
    assert engine.scheduler.admission_queue.released == 0
    assert_gone(engine, "next")


def test_abort_while_running():
    engine = Engine()
    add_many(engine, 2)
    engine.steps(3)
    engine.abort("r0")
    assert_gone(engine, "r0")
    assert list(engine.finished) == ["r1"]


def test_abort_while_sitting_out():
    engine, front = boundary_engine(max_hold_s=10.0)
    engine.steps(2)
    add_many(engine, 4, "young", output=12)
    engine.steps(3)
    assert telemetry(engine).gauges.sitting_out == 2
    engine.abort(front[0])
    assert_gone(engine, front[0])
    assert len(engine.finished) == 5


def test_abort_while_preempted():
    engine = Engine(blocks=12)
    add_many(engine, 3, prompt=40, output=60)
    while not (preempted := [n for n, r in engine.requests.items() if r.num_preemptions]):
        engine.step()
    engine.abort(preempted[0])
    assert_gone(engine, preempted[0])
    assert len(engine.finished) == 2


# vLLM's own view of held requests.


def test_held_requests_are_counted_everywhere_vllm_looks():
    engine = Engine(thresholds=wait(8, max_hold_s=10.0))
    scheduler = engine.scheduler
    engine.add("busy", output=50)
    engine.step()
    add_many(engine, 3)
    engine.step()
    assert scheduler.get_num_unfinished_requests() == 4 and scheduler.has_unfinished_requests()
    assert scheduler.get_request_counts() == (1, 3)
    stats = scheduler.make_stats()
    assert (stats.num_running_reqs, stats.num_waiting_reqs) == (1, 3)
    gauges = telemetry(engine).gauges
    assert (gauges.running, gauges.waiting, gauges.held, gauges.sitting_out) == (1, 3, 3, 0)
    engine.abort("busy")
    assert scheduler.has_unfinished_requests(), "held requests keep the engine going"
    engine.run()
    assert len(engine.finished) == 3


def test_structured_output_requests_wait_for_admission_too():
    engine = Engine(thresholds=wait(2, max_hold_s=10.0, max_running=3))
    scheduler = engine.scheduler
    engine.add("busy", output=50)
    engine.step()
    engine.add("s0", structured=True)
    engine.step()
    assert scheduler.admission_queue.held == 1 and len(scheduler.skipped_waiting) == 0, "held, not released"
    engine.add("s1", structured=True)
    add_many(engine, 2)
    engine.step()
    assert scheduler.admission_queue.held == 2 and len(scheduler.skipped_waiting) == 2, (
        "let through, the grammar compiles"
    )
    engine.steps(3)
    assert engine.running == ["busy"], "the compiling ones have their slots: the cap leaves none"
    assert scheduler.get_request_counts() == (1, 4)
    engine.compile_grammar("s1")
    assert "s1" in engine.step()
    engine.compile_grammar("s0")
    engine.run()
    assert len(engine.finished) == 5


def test_abort_while_the_grammar_compiles():
    engine = Engine(thresholds={"policy": "fcfs"})
    engine.add("s", structured=True)
    engine.step()
    assert len(engine.scheduler.skipped_waiting) == 1
    engine.abort("s")
    assert len(engine.scheduler.skipped_waiting) == 0
    assert_gone(engine, "s")


def test_session_arrives_once_and_is_admitted_once():
    engine = Engine(thresholds=wait(4, max_hold_s=10.0))
    scheduler = engine.scheduler
    engine.add("session", prompt=32, output=3, resumable=True)
    engine.add("busy", output=60)
    engine.steps(6)
    assert engine.running == ["busy"] and len(scheduler.skipped_waiting) == 1, "it waits for its next input"
    engine.add("session", prompt=16, output=3, resumable=True)
    assert engine.step().keys() == {"session", "busy"}, "which needs no group"
    assert len(telemetry(engine).arrivals) == 2
    engine.abort("session")
    assert_gone(engine, "session")


@pytest.mark.parametrize("targets", [
    {}, {"iteration_s": 0.02, "tpot_s": 0.021},
    {"iteration_s": 0.02, "tpot_s": 0.021, "ttft_s": 3.0, "capacity_rps": 5.0, "prompt_flow_tokens": 50.0},
])
def test_sessions_that_wait_for_their_client_hold_up_no_request(targets):
    """Half the slots with such sessions was none free, and their context counted as prompts still to compute."""
    engine = Engine(thresholds={"policy": "fluid", "fluid": fluid_params(**targets)}, max_num_seqs=8)
    for number in range(4):
        engine.add(f"s{number}", prompt=[100 + number] * 200, output=3, resumable=True)
    engine.steps(60)
    assert engine.scheduler.num_waiting_for_streaming_input == 4
    add_many(engine, 4, output=8)
    engine.steps(100)
    assert (len(engine.finished), telemetry(engine).counters.rejected) == (4, 0)


def test_prefix_cache_reset_that_preempts_all_requests():
    engine = Engine(enable_prefix_caching=True, thresholds=wait(2, max_hold_s=0.05))
    add_many(engine, 6, output=20)
    engine.steps(5)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not engine.running and engine.scheduler.admission_queue.held == 0
    engine.run()
    assert {request.num_output_tokens for request in engine.finished.values()} == {20}
