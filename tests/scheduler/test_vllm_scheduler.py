"""`HeadraceScheduler` on vLLM's real scheduler and block manager, one iteration scheduled ahead as vLLM does."""

import asyncio
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from engine_harness import BLOCK, MAX_MODEL_LEN, STEP_S, Engine, add_many, fluid_params, telemetry
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus

from scheduler.engine.channel import ChannelClient, new_endpoint, remove_endpoint
from scheduler.engine.fair_queue import _Account
from scheduler.engine.running_requests import EngineBatch, batch_work, in_admission_order
from scheduler.messages import Arrival, Finished
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.policies import RunningRequest
from scheduler.policies.fcfs import Fcfs
from scheduler.rejection import Rejection
from scheduler.settings import TENANT, TENANT_WEIGHT, SchedulerSettings
from scheduler.support import UnsupportedSetting
from scheduler.thresholds import InvalidThresholds, Thresholds
from scheduler.vllm_scheduler import TOO_MANY


def wait(n=8, **fields):
    return {"policy": "wait", "types": [{"name": "all", "n": n}], **fields}


def nested(*ends_and_n, **fields):
    starts = (0, *(end for end, _ in ends_and_n))
    return {
        "policy": "nested_wait",
        "segments": [
            {"end_output_tokens": end, "total": n * (end - start)}
            for (end, n), start in zip(ends_and_n, starts, strict=False)
        ],
        **fields,
    }


# WAIT at the gate.


def test_wait_admits_in_groups_and_bounds_the_hold_of_the_rest():
    engine = Engine(thresholds=wait(8, max_hold_s=0.055))
    engine.add("busy", output=100)
    assert engine.step() == {"busy": 32}, "an idle engine admits at once"
    names = add_many(engine, 17, output=50)
    engine.step()
    assert engine.running == ["busy", *names[:8]]
    engine.step()
    assert engine.running == ["busy", *names[:16]]
    while names[16] not in engine.running:
        engine.step()
    # It came at 0.01; the first iteration at or after 0.065 is the one at 0.07.
    assert engine.first_scheduled[names[16]] == pytest.approx(0.07)
    engine.run()
    assert len(engine.finished) == 18


def test_wait_holds_an_incomplete_group_until_it_is_complete():
    engine = Engine(thresholds=wait(4, max_hold_s=10.0))
    engine.add("busy", output=100)
    engine.step()
    add_many(engine, 3)
    engine.steps(20)
    assert engine.running == ["busy"]
    engine.add("fourth")
    engine.step()
    assert len(engine.running) == 5


def test_idle_engine_takes_what_was_held():
    engine = Engine(thresholds=wait(4, max_hold_s=10.0))
    engine.add("busy", output=5)
    engine.step()
    engine.add("alone", output=5)
    engine.run()
    busy_gone_s = engine.finished_s["busy"]
    assert engine.first_scheduled["alone"] == pytest.approx(busy_gone_s + STEP_S), "and no sooner"


def test_types_go_by_declared_length():
    engine = Engine(thresholds={
        "policy": "wait", "max_hold_s": 10.0,
        "types": [{"name": "short", "n": 1, "max_output_tokens": 10}, {"name": "long", "n": 3}],
    })
    engine.add("busy", output=100)
    engine.step()
    engine.add("long", output=50)
    engine.add("short", output=10)
    engine.add("declared-short", output=10, max_tokens=500, extra_args={"expected_output_tokens": 10})
    engine.steps(2)
    assert engine.running == ["busy", "short", "declared-short"]


def test_strict_wait_moves_nobody_without_a_full_group():
    engine = Engine(thresholds=wait(4, mode="strict"), settings={"allow_strict": True})
    add_many(engine, 3, "a", output=3)
    assert engine.steps(3) == [{}, {}, {}], "the paper's letter: not even an idle engine admits"
    engine.add("a3", output=3)
    assert len(engine.step()) == 4
    assert engine.steps(3) == [{}, {}, {}], "those in service wait for the next full group"
    add_many(engine, 4, "b", output=3)
    assert len(engine.step()) == 8


# Nested WAIT at its boundaries.


def boundary_engine(**fields):
    """Two requests in front (at the boundary after four tokens) and four younger ones that keep the engine busy."""
    engine = Engine(thresholds=nested((4, 4), (1000, 4), **fields))
    front = add_many(engine, 2, "front", output=12)
    return engine, front


def test_boundary_queue_opens_when_n_stand_there():
    engine, front = boundary_engine(max_hold_s=10.0)
    engine.steps(2)
    young = add_many(engine, 4, "young", output=12)
    batches = engine.steps(6)
    assert batches[0].keys() == {*front, *young} and batches[1].keys() == {*front, *young}
    # `front` has four tokens after steps 0..3 and stands at the boundary in steps 4 and 5; `young` comes in step 6.
    assert batches[2].keys() == batches[3].keys() == set(young)
    assert batches[4].keys() == {*front, *young}
    assert batches[5].keys() == {*front, *young}, "nobody is held there twice"
    engine.run()
    assert {request.num_output_tokens for request in engine.finished.values()} == {12}


def test_boundary_hold_is_bounded():
    engine, front = boundary_engine(max_hold_s=0.015)
    engine.steps(3)
    young = add_many(engine, 4, "young", output=12)
    batches = engine.steps(4)
    assert batches[0].keys() == {*front, *young}
    assert batches[1].keys() == batches[2].keys() == set(young), "held at 0.04 and 0.05"
    assert batches[3].keys() == {*front, *young}, "0.06 is 0.02 s after reaching the boundary"


def test_those_who_sit_out_keep_their_memory_and_their_place():
    # Unknown lengths (no declaration) queue at the boundary, known ones never do: they stand in between.
    engine = Engine(thresholds={
        "policy": "wait", "types": [{"name": "known", "n": 1}], "max_hold_s": 10.0,
        "segments": [{"end_output_tokens": 4, "total": 12}, {"end_output_tokens": 1000, "total": 2988}],
    })
    unknown = {"max_tokens": MAX_MODEL_LEN - 32}
    engine.add("k1", output=40)
    engine.step()
    for name, output in (("u1", 20), ("u2", 20), ("u3", 2)):
        engine.add(name, output=output, **unknown)
    engine.step()
    engine.add("k2", output=40)
    engine.step()
    assert engine.running == ["k1", "u1", "u2", "u3", "k2"]
    while "u1" in engine.step():
        pass
    engine.add("k3", output=40)
    before = engine.scheduler.kv_cache_manager.usage
    assert engine.step().keys() == {"k1", "k2", "k3"}
    assert engine.running == ["k1", "u1", "u2", "k2", "k3"], "admission order, the newcomer last"
    assert engine.scheduler.kv_cache_manager.usage > before
    now = telemetry(engine)
    assert (now.gauges.running, now.gauges.sitting_out) == (5, 2)
    assert len(now.running) == 5, "whoever sits out is in service"
    engine.run()
    assert len(engine.finished) == 6


@pytest.mark.parametrize("seed", range(30))
def test_admission_order_is_restored(seed):
    rng = random.Random(seed)
    original = [SimpleNamespace(name=place) for place in range(rng.randint(1, 10))]
    aside = [(place, request) for place, request in enumerate(original) if rng.random() < 0.4]
    taken = {place for place, _ in aside}
    others = [request for place, request in enumerate(original) if place not in taken]
    if rng.random() < 0.5:  # vLLM preempts from the end, and then admits nobody
        kept, new = others[: rng.randint(0, len(others))], []
    else:
        kept, new = others, [SimpleNamespace(name=100 + place) for place in range(rng.randint(0, 3))]
    names = [request.name for request in in_admission_order([*kept, *new], aside)]
    survivors = {request.name for request in kept} | taken
    assert names == [r.name for r in original if r.name in survivors] + [r.name for r in new]


def test_preemption_takes_the_latest_admitted_of_those_that_run():
    # 13 usable blocks; `front` (two requests of three blocks) sit at the boundary while `young` outgrow the memory.
    engine = Engine(
        blocks=14, thresholds=nested((4, 2), (1000, 2), max_hold_s=10.0), max_num_batched_tokens=256,
    )
    engine.add("front", prompt=44, output=30)
    engine.step()
    add_many(engine, 2, "young", prompt=62, output=40)
    for _ in range(12):
        engine.step()
        preempted = [name for name, request in engine.requests.items() if request.num_preemptions]
        if preempted:
            break
    assert preempted == ["young1"], "last in, first out"
    engine.run()
    assert len(engine.finished) == 3


def test_everyone_runs_when_those_who_sit_out_hold_all_the_memory():
    # `front` holds 6 of 9 blocks at its boundary; the young group lets it sit out and then does not fit.
    engine = Engine(blocks=10, thresholds=nested((4, 3), (1000, 3), max_hold_s=60.0))
    add_many(engine, 2, "front", prompt=44, output=20)
    engine.steps(4)
    add_many(engine, 3, "young", prompt=60, output=20)
    engine.run(most_steps=400)
    assert len(engine.finished) == 5
    for earlier, later in zip(engine.batches, engine.batches[1:], strict=False):
        assert earlier or later, "never two empty iterations in a row while there is work"


def test_those_who_sit_out_keep_their_seats():
    engine = Engine(thresholds=nested((4, 4), (1000, 4), max_hold_s=10.0), max_num_seqs=6)
    add_many(engine, 2, "front", output=12)
    engine.steps(2)
    add_many(engine, 4, "young", output=12)
    engine.steps(2)
    add_many(engine, 4, "late", output=12)
    assert len(engine.step()) == 4, "two sit out"
    assert len(engine.running) == 6 and engine.scheduler.admission_queue.released == 4
    engine.run()
    assert len(engine.finished) == 10


@pytest.mark.parametrize(
    ("is_prefill_chunk", "outputs", "in_flight", "stage"),
    [(True, 0, 0, 0), (False, 0, 1, 1), (False, 3, 1, 4), (True, 4, 0, 0), (False, 4, 0, 4)],
)
def test_stage_counts_tokens_in_flight_and_is_zero_while_a_prompt_is_computed(
    is_prefill_chunk, outputs, in_flight, stage
):
    request = SimpleNamespace(
        request_id="a", is_prefill_chunk=is_prefill_chunk, num_tokens=100 + outputs, num_output_tokens=outputs,
        num_output_placeholders=in_flight,
    )
    batch = EngineBatch([request], SimpleNamespace(type_of=lambda name: "any"), {})
    assert batch.stages() == [stage] == [one.stage for one in batch]
    assert list(batch) == [RunningRequest("a", "any", stage, in_flight, batch.kv_tokens()[0])]


# The same as vLLM's own scheduler when nothing is asked of us.


def random_workload(rng, *, requests=40, longest_prompt=200, longest_output=60, steps=60, priorities=False):
    """Requests by the step at which they come."""
    coming = {}
    for place in range(requests):
        output = rng.randint(1, longest_output)
        shared, own = [rng.randint(3, 6)] * BLOCK, [rng.randint(3, 999) for _ in range(rng.randint(1, longest_prompt))]
        request = {
            "prompt": shared + own,
            "output": output,
            "max_tokens": rng.choice([None, output + rng.randint(1, 200), MAX_MODEL_LEN - len(shared + own)]),
            "priority": rng.randint(0, 2) if priorities else 0,
        }
        coming.setdefault(rng.randrange(steps), []).append((f"r{place}", request))
    return coming


def play(engine, coming, *, each_step=lambda engine, step: None, most_steps=6000):
    """Feed a workload, then run to the end."""
    for step in range(max(coming) + 1):
        for name, request in coming.get(step, ()):
            engine.add(name, **request)
        each_step(engine, step)
        engine.step()
    step = max(coming)
    while engine.scheduler.has_unfinished_requests():
        step += 1
        assert step < most_steps, f"stranded: {sorted(engine.requests)}"
        each_step(engine, step)
        engine.step()
    engine.run()
    return engine


ENGINES = {
    "roomy": {},
    "small memory": {"blocks": 40},
    "small memory, prefix caching": {"blocks": 40, "enable_prefix_caching": True},
    "priority": {"blocks": 40, "scheduling_policy": "priority"},
    "small chunks": {"max_num_batched_tokens": 64, "max_num_seqs": 16},
    "prompt chunks limited": {"long_prefill_token_threshold": 48},
    "no chunked prefill": {
        "enable_chunked_prefill": False, "max_num_batched_tokens": MAX_MODEL_LEN, "blocks": 60,
    },
}


@pytest.mark.parametrize("name", ENGINES)
def test_fcfs_without_a_cap_schedules_exactly_as_vllm_does(name):
    for seed in range(4):
        coming = random_workload(random.Random(seed), priorities=name == "priority")
        preemptions = []
        engines = [Engine(AsyncScheduler, **ENGINES[name]), Engine(thresholds={"policy": "fcfs"}, **ENGINES[name])]
        for engine in engines:
            play(engine, coming)
            preemptions.append({name: request.num_preemptions for name, request in engine.finished.items()})
        theirs, ours = engines
        assert [list(batch.items()) for batch in ours.batches] == [list(batch.items()) for batch in theirs.batches]
        assert preemptions[0] == preemptions[1] and ours.finished_s == theirs.finished_s
        assert len(ours.finished) == 40
        if "small memory" in name:
            assert sum(preemptions[0].values()), "the case was meant to preempt"
            assert telemetry(ours).counters.preemptions == sum(preemptions[1].values())


# Nobody is stranded, nothing is lost.


def random_thresholds(rng, slots):
    most = rng.randint(1, slots)
    ends = sorted(rng.sample(range(1, 40), rng.randint(0, 3)))
    n = sorted((rng.randint(1, most) for _ in ends), reverse=True)
    return {
        "policy": rng.choice(["fcfs", "wait", "nested_wait"]),
        "types": [
            {"name": "short", "n": rng.randint(1, most), "max_output_tokens": rng.randint(1, 40)},
            {"name": "rest", "n": rng.randint(1, most)},
        ][: rng.randint(0, 2)],
        "segments": [
            {"end_output_tokens": end, "total": count * (end - start)}
            for start, end, count in zip((0, *ends), ends, n, strict=False)
        ],
        "max_running": rng.choice([None, most, slots]),
        "token_budget": rng.choice([None, None, 1, 16, 60]),
        "max_hold_s": rng.choice([0.0, 0.02, 0.2, 2.0]),
        "valid_for_s": rng.choice([None, 0.1, 1.0]),
    }


@pytest.mark.parametrize("name", ENGINES)
def test_every_request_finishes_whatever_the_thresholds(name):
    """Thresholds that change while serving, aborts: every answer has its length, and all memory comes back."""
    for seed in range(6):
        rng = random.Random(1000 + seed)
        fields = ENGINES[name]
        slots = min(fields.get("max_num_seqs", 64), fields.get("blocks", 256))
        coming = random_workload(rng, longest_output=50, priorities=name == "priority")
        engine = Engine(thresholds=random_thresholds(rng, slots), **fields)
        limits = engine.scheduler.active.limits
        aborted, changes = set(), 0
        running = 0

        def each_step(engine, step, rng=rng, aborted=aborted, slots=slots, limits=limits):
            nonlocal changes, running
            scheduler = engine.scheduler
            if step and engine.batches:
                thresholds = scheduler._obeyed.thresholds
                taken = (
                    len(scheduler.running) + scheduler.admission_queue.released + len(scheduler.skipped_waiting)
                )
                assert len(scheduler.running) <= limits.max_num_seqs
                if thresholds.max_running:
                    assert taken <= max(thresholds.max_running, running), "admitted beyond the cap"
                computed, budget = sum(engine.batches[-1].values()), thresholds.token_budget
                assert computed <= limits.max_num_batched_tokens
                if budget and scheduler.scheduler_config.enable_chunked_prefill:
                    assert computed <= max(budget, running)
            if rng.random() < 0.05 and engine.requests:
                victim = rng.choice(sorted(engine.requests))
                engine.abort(victim)
                aborted.add(victim)
            if rng.random() < 0.1:
                changes += engine.apply(random_thresholds(rng, slots)).accepted
            running = (
                len(scheduler.running) + scheduler.admission_queue.released + len(scheduler.skipped_waiting)
            )

        play(engine, coming, each_step=each_step)
        assert changes > 3
        asked = {name: request for requests in coming.values() for name, request in requests}
        assert engine.finished.keys() | aborted == asked.keys() and not engine.finished.keys() & aborted
        for request_id, request in engine.finished.items():
            assert request.num_output_tokens == asked[request_id]["output"], "a token was lost or made up"
        scheduler = engine.scheduler
        assert scheduler.kv_cache_manager.usage == 0.0 and not scheduler.requests and not scheduler.running
        assert (
            len(scheduler.waiting) == 0
            and not scheduler.admission_queue._type_of
            and not scheduler.admission_queue._since_s
        )
        counters = telemetry(engine).counters
        assert (counters.arrivals, counters.completed, counters.aborted) == (40, 40 - len(aborted), len(aborted))
        assert not scheduler._executing, "every iteration was recorded"


# The cap.


def test_cap_limits_requests_in_service():
    engine = Engine(thresholds={"max_running": 4})
    add_many(engine, 10, output=6)
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        assert len(engine.running) <= 4
    engine.run()
    assert len(engine.finished) == 10


def test_cap_lowered_below_those_in_service_evicts_nobody():
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


def test_cap_counts_those_that_are_preempted():
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


# vLLM's own view of those who are held.


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


def test_structured_output_requests_wait_at_the_gate_too():
    engine = Engine(thresholds=wait(2, max_hold_s=10.0, max_running=3))
    scheduler = engine.scheduler
    engine.add("busy", output=50)
    engine.step()
    engine.add("s0", structured=True)
    engine.step()
    assert scheduler.admission_queue.held == 1 and len(scheduler.skipped_waiting) == 0, "held, not past the gate"
    engine.add("s1", structured=True)
    add_many(engine, 2)
    engine.step()
    assert scheduler.admission_queue.held == 2 and len(scheduler.skipped_waiting) == 2, (
        "let through, the grammar compiles"
    )
    engine.steps(3)
    assert engine.running == ["busy"], "the compiling ones have their seats: the cap leaves none"
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


def test_session_arrives_once_and_passes_the_gate_once():
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


def test_prefix_cache_reset_that_preempts_everybody():
    engine = Engine(enable_prefix_caching=True, thresholds=wait(2, max_hold_s=0.05))
    add_many(engine, 6, output=20)
    engine.steps(5)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not engine.running and engine.scheduler.admission_queue.held == 0
    engine.run()
    assert {request.num_output_tokens for request in engine.finished.values()} == {20}


# Tokens per iteration.


def test_token_budget_bounds_prompt_tokens():
    engine = Engine(thresholds={"token_budget": 20})
    engine.add("long", prompt=90, output=4)
    assert [batch["long"] for batch in engine.steps(5)] == [20, 20, 20, 20, 10]


def test_token_budget_never_stops_a_decode():
    engine = Engine()
    names = add_many(engine, 8, output=40)
    engine.steps(3)
    engine.apply({"version": 1, "token_budget": 1})
    engine.add("late", prompt=32, output=2)
    for batch in engine.steps(20):
        assert batch == dict.fromkeys(names, 1), "each running request its token, and no prompt beside them"
    engine.run()
    assert engine.finished["late"].num_output_tokens == 2


def test_token_budget_above_nothing_of_the_engine():
    engine = Engine(thresholds={"token_budget": 512}, max_num_batched_tokens=512)
    engine.add("long", prompt=900, output=2)
    assert [batch["long"] for batch in engine.steps(2)] == [512, 388]


def test_token_budget_strands_no_prompt_where_prompts_are_not_split():
    engine = Engine(thresholds={"token_budget": 20}, **ENGINES["no chunked prefill"])
    engine.add("long", prompt=90, output=4)
    assert engine.step() == {"long": 90}


# Changing thresholds while serving.


def test_new_thresholds_take_effect_with_the_next_iteration():
    engine = Engine(thresholds=wait(8, max_hold_s=10.0))
    engine.add("busy", output=50)
    engine.step()
    names = add_many(engine, 3, output=50)
    engine.step()
    assert engine.running == ["busy"]
    engine.apply({"version": 1, **wait(3, max_hold_s=10.0)})
    engine.step()
    assert engine.running == ["busy", *names]
    assert telemetry(engine).thresholds.version == 1 and not telemetry(engine).from_config


def test_thresholds_lapse_to_the_configured_ones():
    engine = Engine(thresholds={"policy": "fcfs"})
    engine.add("busy", output=50)
    engine.apply({"version": 1, "valid_for_s": 0.035, **wait(8, max_hold_s=10.0)})
    engine.step()
    engine.add("held", output=5)
    engine.steps(3)
    assert engine.running == ["busy"]
    engine.step()  # at 0.04
    assert engine.running == ["busy", "held"] and telemetry(engine).from_config


def test_types_are_named_anew_for_everybody_when_the_policy_changes():
    engine = Engine(blocks=8, thresholds={"policy": "fcfs"})
    engine.add("running", prompt=60, output=30)
    engine.add("through", prompt=60, output=30)
    engine.steps(2)
    assert engine.running == ["running"] and engine.scheduler.admission_queue.released == 1
    engine.apply({"version": 1, **wait(1)})
    engine.step()
    assert (
        engine.scheduler.admission_queue.type_of("running")
        == engine.scheduler.admission_queue.type_of("through")
        == "all"
    )


# Telemetry.


def test_iteration_records_of_a_worked_example():
    """a: 32 + 3 tokens; b: 600 + 4 tokens in chunks of at most 512 together."""
    engine = Engine(max_num_batched_tokens=512)
    engine.add("a", prompt=32, output=3)
    engine.add("b", prompt=600, output=4)
    engine.run()
    records = [
        (r.prefill_tokens, r.decode_tokens, r.kv_tokens, r.batch_size) for r in telemetry(engine).iterations
    ]
    assert records == [
        (512, 0, 512, 2),  # a whole, 480 of b
        (120, 1, 33 + 600, 2),  # the rest of b, a's second token
        (0, 2, 34 + 601, 2),
        (0, 1, 602, 1),  # a has what it asked for and is not in this batch
        (0, 1, 603, 1),
    ]
    for place, record in enumerate(telemetry(engine).iterations):
        assert record.seconds == pytest.approx(STEP_S)
        assert record.at_s == pytest.approx((place + 1) * STEP_S)
    assert telemetry(engine).counters.iterations == 5


def test_seconds_count_from_when_the_engine_was_free():
    engine = Engine()
    engine.add("a", output=4)
    engine.launch()  # starts at once, at 0.000
    engine.now_s = 0.001
    engine.launch()  # starts when the first is done
    engine.now_s = 0.010
    engine.deliver()
    engine.now_s = 0.018
    engine.deliver()
    engine.now_s = 0.020  # the engine has been busy with other things, although a request was running
    engine.launch()
    engine.now_s = 0.027
    engine.deliver()
    engine.launch()
    engine.now_s = 0.033
    engine.deliver()  # nobody is left
    assert engine.launch() == {}
    engine.now_s = 0.050
    engine.add("b", output=4)
    engine.launch()
    engine.now_s = 0.056
    while len(engine._in_flight) > 1:
        engine.deliver()
    engine.deliver()
    seconds = [record.seconds for record in telemetry(engine).iterations]
    assert seconds == pytest.approx([0.010, 0.008, 0.009, 0.006, 0.006])


def test_a_standstill_is_no_part_of_the_next_iteration():
    thresholds = {"policy": "wait", "mode": "strict", "types": [{"name": "all", "n": 1}]}
    engine = Engine(thresholds=thresholds, settings={"allow_strict": True})
    engine.add("a", output=3)
    engine.steps(2)
    engine.deliver()
    assert engine.launch() == {}  # nobody waits, so nobody moves
    engine.now_s = 1.0
    engine.add("b", output=3)
    assert engine.launch()
    engine.now_s += STEP_S
    while engine._in_flight:
        engine.deliver()
    assert telemetry(engine).iterations[-1].seconds == pytest.approx(STEP_S)


def test_iterations_leave_out_those_who_sit_out():
    engine, _ = boundary_engine(max_hold_s=10.0)
    engine.steps(2)
    add_many(engine, 4, "young", output=12)
    engine.steps(4)  # `front` sits out in steps 4 and 5; the record of step 4 is there after step 5
    record = telemetry(engine).iterations[-1]
    assert (record.batch_size, record.decode_tokens, record.kv_tokens) == (4, 4, 4 * 34)


def test_speculative_tokens_are_decode_tokens():
    engine = Engine()
    engine.add("prompt", prompt=100)
    engine.add("decode")
    output = SimpleNamespace(
        num_scheduled_tokens={"prompt": 100, "decode": 4}, total_num_scheduled_tokens=104,
        scheduled_spec_decode_tokens={"decode": [-1, -1, -1]},
    )
    prefill, decode, _, batch_size = batch_work(output, engine.scheduler.requests)
    assert (prefill, decode, batch_size) == (100, 4, 2)


def test_idle_iterations_are_not_recorded():
    engine = Engine()
    engine.steps(3)
    engine.add("a", output=2)
    engine.run()
    engine.steps(3)
    assert telemetry(engine).counters.iterations == 2


@pytest.mark.parametrize(
    ("request_fields", "known"),
    [
        ({"max_tokens": 50}, 50),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": 7}}, 7),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": 7.9}}, 7),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": 500}}, 50),
        ({"max_tokens": 50, "extra_args": {"other": 1}}, 50),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": 0}}, 50),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": -3}}, 50),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": "7"}}, 50),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": None}}, 50),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": True}}, 50),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": [7]}}, 50),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": math.nan}}, 50),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": math.inf}}, 50),
        ({"max_tokens": 50, "extra_args": {"expected_output_tokens": 1e300}}, 50),
        ({"max_tokens": MAX_MODEL_LEN - 33}, MAX_MODEL_LEN - 33),
        ({"max_tokens": MAX_MODEL_LEN - 32}, None),
        ({"max_tokens": MAX_MODEL_LEN - 32, "extra_args": {"expected_output_tokens": 9}}, 9),
    ],
    ids=str,
)
def test_arrivals_carry_the_declared_length(request_fields, known):
    engine = Engine()
    engine.now_s = 4.0
    engine.add("r", prompt=32, output=2, **request_fields)
    assert telemetry(engine).arrivals == (Arrival(1, 4.0, 32, known),)
    engine.run()
    assert telemetry(engine).finished[0].output_tokens == 2, "the length it really had"


def test_finished_and_in_service_lengths():
    engine = Engine()
    engine.add("a", prompt=32, output=3)
    engine.add("b", prompt=40, output=20)
    engine.steps(6)
    now = telemetry(engine)
    assert [(f.prompt_tokens, f.output_tokens, f.aborted) for f in now.finished] == [(32, 3, False)]
    assert now.running == ((40, 5),), "five results are back, one more is being computed"
    assert now.gauges.running == 1 and now.clock_s == engine.now_s
    engine.abort("b")
    now = telemetry(engine)
    assert [(f.prompt_tokens, f.output_tokens, f.aborted) for f in now.finished] == [(32, 3, False), (40, 5, True)]
    assert now.running == () and (now.counters.completed, now.counters.aborted) == (1, 1)


def test_gauges_tell_memory_in_tokens():
    engine = Engine(blocks=101)
    engine.add("a", prompt=10 * BLOCK, output=2)
    engine.step()
    used = telemetry(engine).gauges.kv_used_tokens
    assert used == pytest.approx(10 * BLOCK, rel=0.02), "ten blocks of a hundred usable ones"
    assert telemetry(engine).limits.kv_capacity_tokens == 101 * BLOCK


def test_hold_times_are_totalled():
    engine = Engine(thresholds=wait(8, max_hold_s=0.025))
    engine.add("busy", output=20)
    engine.step()
    add_many(engine, 2)
    engine.run()
    counters = telemetry(engine).counters
    assert counters.held == 3 and counters.hold_s == pytest.approx(2 * 0.03)


def test_preemptions_are_counted():
    engine = Engine(blocks=12)
    add_many(engine, 3, prompt=40, output=60)
    engine.run()
    preemptions = sum(request.num_preemptions for request in engine.finished.values())
    assert telemetry(engine).counters.preemptions == preemptions > 0


def test_telemetry_cursor_gives_only_what_is_new():
    engine = Engine()
    engine.add("a", output=4)
    engine.steps(3)
    first = telemetry(engine)
    assert telemetry(engine).iterations == first.iterations and first.records_lost == 0
    engine.run()
    second = telemetry(engine, first.cursor)
    assert second.arrivals == () and len(second.finished) == 1
    assert [r.seq for r in first.iterations + second.iterations] == [2, 3, 4, 5]
    assert telemetry(engine, None).iterations == () and telemetry(engine, None).cursor == second.cursor


# Settings and the channel of a real engine.


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threshold": {}}, r"headrace\.threshold = \{\}.*keys are thresholds, profile, .*allow_strict"),
        ({"allow_strict": "perhaps"}, r"headrace\.allow_strict = 'perhaps'"),
        ({"channel": 5}, r"headrace\.channel = 5"),
        ({"thresholds": {"max_hold_s": -1.0}}, r"thresholds\.max_hold_s = -1\.0"),
        ({"thresholds": {"nonsense": 1}}, r"thresholds\.nonsense"),
        ({"thresholds": 3}, r"thresholds\.\(body\) = 3"),
        ([], r"additional_config\.headrace = \[\].*an object"),
        (None, r"additional_config\.headrace = None"),
    ],
    ids=str,
)
def test_settings_errors_name_the_key(settings, says):
    with pytest.raises(ValueError, match=says):
        SchedulerSettings.from_additional_config({"headrace": settings})


def test_settings_default_to_plain_fcfs():
    for nothing in (None, {}, {"other": 1}, {"headrace": {}}):
        settings = SchedulerSettings.from_additional_config(nothing)
        assert settings.thresholds == Thresholds() and settings.channel is None and not settings.allow_strict


def test_engine_does_not_start_with_settings_that_do_not_fit():
    with pytest.raises(InvalidThresholds, match="max_running = 65"):
        Engine(thresholds={"max_running": 65})
    with pytest.raises(InvalidThresholds, match="mode = 'strict'"):
        Engine(thresholds={"mode": "strict"})
    with pytest.raises(ValueError, match=r"headrace\.chanel"):
        Engine(settings={"chanel": "ipc:///tmp/x"})


def test_live_channel_into_a_serving_engine():
    endpoint = new_endpoint()
    engine = Engine(settings={"channel": endpoint, "thresholds": {"policy": "fcfs"}})

    async def main():
        client = ChannelClient(endpoint)
        try:
            assert (await client.report()).from_config
            ack = await client.apply(Thresholds(version=1, max_running=2))
            assert ack.accepted
            add_many(engine, 5, output=4)
            engine.step()
            assert len(engine.running) == 2
            told = await client.report()
            assert len(told.arrivals) == 5 and told.gauges.held == 3 and told.thresholds.version == 1
            engine.run()
            assert len((await client.report(told.cursor)).finished) == 5
        finally:
            client.close()

    try:
        asyncio.run(main())
    finally:
        engine.scheduler.shutdown()
        remove_endpoint(endpoint)
    assert not engine.scheduler._channel._thread.is_alive(), "shutdown closes the channel"


def test_fluid_refuses_the_useless_end_of_the_queue_and_tells_their_clients():
    params = fluid_params(ttft_s=5.0, queue_limit=2, kv_limit_tokens=400, capacity_rps=1.0)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params})
    add_many(engine, 8, "r", prompt=100, output=50)
    engine.launch()
    engine.deliver()
    rejected = [answer for answer in engine.answers if answer.finish_reason is not None]
    for answer in rejected:
        told = Rejection.of_answer(str(answer.finish_reason), answer.stop_reason)
        assert told == Rejection.for_drain_time(TOO_MANY, 8.0, answer.request_id)
    assert all(answer.new_token_ids == [] for answer in rejected)
    # The oldest are served, the next two wait, and who came last is refused.
    served = len(engine.running)
    assert 0 < served < 6
    assert engine.running == [f"r{place}" for place in range(served)]
    assert engine.scheduler.admission_queue.held == 2
    assert sorted(answer.request_id for answer in rejected) == [f"r{place}" for place in range(served + 2, 8)]


def test_fluid_never_lets_memory_overflow_and_serves_everybody_without_targets():
    thresholds = {"policy": "fluid", "fluid": fluid_params(kv_limit_tokens=63 * BLOCK)}
    engine = Engine(blocks=64, thresholds=thresholds)
    add_many(engine, 30, "r", prompt=60, output=50)
    engine.run()
    assert len(engine.finished) == 30
    assert telemetry(engine).counters.preemptions == 0


def test_fluid_keeps_the_iteration_within_its_time_while_nobody_is_ahead():
    """At capacity later iterations regain nothing, so that there is no time over to lend."""
    time_model = IterationTimeModel(0.004, 1e-6, 1e-4, 1e-4)
    params = fluid_params(kv_limit_tokens=1023 * BLOCK, iteration_s=STEP_S, steady_s=STEP_S)
    thresholds = {"policy": "fluid", "fluid": params}
    engine = Engine(blocks=1024, thresholds=thresholds)
    add_many(engine, 60, "r", prompt=90, output=50)
    engine.run()
    slowest = max(
        time_model.iteration_s(r.prefill_tokens, r.decode_tokens, r.kv_tokens) for r in telemetry(engine).iterations
        if r.decode_tokens  # alone, prompts may take what they like
    )
    assert slowest <= STEP_S + 16 * time_model.d2_s_per_prefill_token  # whoever has entered always gets on
    assert len(engine.finished) == 60


def test_prompts_take_the_time_that_those_in_service_have_over():
    thresholds = {"policy": "fluid", "fluid": fluid_params(kv_limit_tokens=1023 * BLOCK, iteration_s=2 * STEP_S)}
    engine = Engine(blocks=1024, thresholds=thresholds)
    add_many(engine, 4, "r", prompt=20, output=50)
    engine.steps(30)
    engine.add("long", prompt=480, output=2)
    computed = max(batch.get("long", 0) for batch in engine.steps(3))
    assert computed == 480, "at 0.1 ms a token the promise alone has time for 150"


def test_of_two_tenants_in_an_overload_each_is_served_by_its_weight():
    params = fluid_params(ttft_s=0.5, queue_limit=12, kv_limit_tokens=900)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params}, settings={"trust_tenants": True})
    for round_ in range(900):
        for tenant, weight in (("big", 3), ("small", 1)):
            if round_ % 3 == 0:
                extra = {TENANT: tenant, TENANT_WEIGHT: weight}
                engine.add(f"{tenant}{round_}", prompt=100, output=50, extra_args=extra)
        engine.step()
    under_way = dict(engine.first_scheduled)
    engine.run()
    rejected = {name for answer in engine.answers if answer.stop_reason for name in [answer.request_id]}
    served = [sum(name.startswith(tenant) for name in under_way) for tenant in ("big", "small")]
    assert served[0] / served[1] == pytest.approx(3, rel=0.15)
    assert rejected and not rejected & under_way.keys()
    assert telemetry(engine).counters.rejected == len(rejected)


@settings(max_examples=25, deadline=None)
@given(st.lists(
    st.tuples(
        st.integers(0, 4), st.integers(1, 300), st.integers(1, 30), st.booleans(),
        st.sampled_from([RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR]),
    ),
    min_size=10, max_size=40,
))
def test_counters_add_up_after_every_step(steps):
    """Arrivals, aborts, errors, rejections and completions at random; each request is counted under one name."""
    params = fluid_params(ttft_s=0.08, queue_limit=4, kv_limit_tokens=900, capacity_rps=10.0)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params})
    arrived = cut_short = 0
    for arrivals, prompt, output, cuts, status in steps:
        for _ in range(arrivals):
            engine.add(f"r{arrived}", prompt=prompt, output=output)
            arrived += 1
        victim = next(iter(engine.scheduler.requests), None)
        if cuts and victim is not None:
            engine.scheduler.finish_requests(victim, status)
            engine.requests.pop(victim)
            cut_short += 1
        engine.step()
        rejected = {answer.request_id for answer in engine.answers if answer.stop_reason}
        rejected |= {request.request_id for request, _ in engine.scheduler.rejector.untold}  # not told yet
        counters = telemetry(engine).counters
        assert counters == replace(
            counters, arrivals=arrived, completed=len(engine.finished), aborted=cut_short, rejected=len(rejected)
        )
        freed_late = sum(request.is_finished() for request in engine.scheduler.requests.values())
        assert counters.in_flight == len(engine.scheduler.requests) - freed_late


@pytest.mark.parametrize(("pinned", "most"), [(None, 150), (100, 100), (400, 150)])
def test_an_operator_s_token_budget_bounds_that_of_the_policy_and_does_not_replace_it(monkeypatch, pinned, most):
    decide = Fcfs.decide
    monkeypatch.setattr(Fcfs, "decide", lambda self, snapshot: replace(decide(self, snapshot), token_budget=150))
    engine = Engine(thresholds={"token_budget": pinned})
    add_many(engine, 8, prompt=480, output=20)
    assert {sum(batch.values()) for batch in engine.steps(20)} == {most}


def of_tenant(name):
    return {TENANT: name}


@pytest.mark.parametrize("pushed", [
    {"max_running": 1, "max_hold_s": 0.1}, {"max_running": 1, "valid_for_s": 0.015}, wait(1, max_running=1),
])
def test_a_push_of_thresholds_changes_no_tenants_turn(pushed):
    """Tenant a pays for a long answer when thresholds are pushed, iteration after iteration."""
    orders = []
    for push in (False, True):
        engine = Engine(thresholds={"max_running": 1}, settings={"trust_tenants": True})
        engine.add("a-long", output=60, extra_args=of_tenant("a"))
        engine.step()
        for number in range(6):
            for name in "ba":
                engine.add(f"{name}{number}", output=2, extra_args=of_tenant(name))
        while engine.scheduler.admission_queue.held:
            if push:
                assert engine.apply({"version": 0} | pushed).accepted
            engine.step()
        orders.append("".join(name[0] for name in engine.first_scheduled if "-" not in name))
    assert orders[0] == orders[1] == "bbbbababaaaa"


def test_a_push_that_leaves_the_types_as_they_are_sorts_nothing_anew(monkeypatch):
    engine = Engine(thresholds=wait(8))
    sorted_anew = []
    monkeypatch.setattr(engine.scheduler.admission_queue, "reclassify", sorted_anew.append)
    engine.apply(wait(8, version=1, token_budget=100))
    engine.step()
    assert not sorted_anew
    engine.apply(wait(9, version=2))
    engine.step()
    assert len(sorted_anew) == 1


def test_long_answers_of_one_tenant_are_paid_for_while_they_run():
    """Ten answers of 400 tokens of a run; of the short ones that then wait, b's enter until a's are paid for."""
    engine = Engine(blocks=1024, thresholds={"max_running": 12}, settings={"trust_tenants": True})
    for number in range(10):
        engine.add(f"a-long{number}", output=400, extra_args=of_tenant("a"))
    engine.add("b-long", output=400, extra_args=of_tenant("b"))
    engine.steps(50)
    for number in range(10):
        for name in "ba":
            engine.add(f"{name}{number}", prompt=100, output=1, extra_args=of_tenant(name))
    while len(engine.finished) < 10:
        engine.step()
    assert set(engine.finished) == {f"b{number}" for number in range(10)}
    engine.run()
    assert len(engine.finished) == 31


def test_with_one_tenant_an_iteration_counts_no_tokens(monkeypatch):
    engine = Engine(settings={"trust_tenants": True})
    add_many(engine, 8, output=20)
    engine.steps(3)
    monkeypatch.setattr(_Account, "charge_outputs", None)
    engine.steps(3)
    engine.add("other", extra_args=of_tenant("other"))
    with pytest.raises(TypeError):
        engine.steps(2)


def test_the_urgent_enter_first_and_the_others_are_refused_first():
    params = fluid_params(ttft_s=5.0, queue_limit=2, kv_limit_tokens=400)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params}, scheduling_policy="priority")
    add_many(engine, 6, "later", prompt=100, output=50, priority=1)
    add_many(engine, 2, "urgent", prompt=100, output=50)
    engine.launch()
    assert engine.running[:2] == ["urgent0", "urgent1"]
    engine.deliver()
    assert all(answer.request_id.startswith("later") for answer in engine.answers if answer.stop_reason)


def test_fluid_starts_with_a_pace_from_the_profile_and_the_targets():
    settings = {"profile": "a100-llama2-7b", "targets": {"ttft_s": 2.0, "tpot_s": 0.05}}
    engine = Engine(thresholds={"policy": "fluid"}, settings=settings)
    active = telemetry(engine).thresholds
    assert active.fluid.ttft_s == 2.0 and 0 < active.fluid.iteration_s <= 0.05
    assert "from the profile" in active.reason
    assert Engine(thresholds={"policy": "fluid"}).scheduler.active.current().thresholds.fluid is None


# Engine settings that a policy does not go with.

NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}, "async_scheduling": False}
CONNECTOR = {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}


@pytest.mark.parametrize(
    ("thresholds", "engine_args", "says"),
    [
        ({"policy": "fluid"}, CONNECTOR, "KV transfer .* is not supported with policy fluid"),
        ({"policy": "fluid"}, {"kv_offloading_size": 1.0}, "KV transfer .* is not supported with policy fluid"),
    ],
    ids=str,
)
def test_an_engine_does_not_start_with_a_setting_that_its_policy_does_not_go_with(thresholds, engine_args, says):
    settings = {"profile": "a100-llama2-7b", "targets": {"ttft_s": 2.0, "tpot_s": 0.05}}
    with pytest.raises(UnsupportedSetting, match=says):
        Engine(thresholds=thresholds, settings=settings, **engine_args)


@pytest.mark.parametrize(
    ("thresholds", "engine_args"),
    [
        ({"policy": "fluid"}, NGRAM), (nested((8, 2), (64, 1)), NGRAM), ({"policy": "fcfs"}, CONNECTOR),
        ({"policy": "fluid"}, {"pipeline_parallel_size": 2}),
    ],
    ids=str,
)
def test_an_engine_starts_with_a_setting_that_its_policy_goes_with(thresholds, engine_args):
    Engine(thresholds=thresholds, **engine_args)


def test_a_policy_that_does_not_go_with_the_engine_is_refused_live_too():
    engine = Engine(thresholds={"policy": "fcfs"}, **CONNECTOR)
    ack = engine.apply({"policy": "fluid"}, automatic=False)
    assert (ack.accepted, ack.code) == (False, "invalid") and "KV transfer" in ack.reason
    assert engine.apply(wait(2), automatic=False).accepted


def test_a_small_token_budget_starves_nobody_who_runs_with_speculative_decoding():
    engine = Engine(thresholds={"policy": "fcfs"}, **NGRAM)
    names = add_many(engine, 20, prompt=16, output=40)
    engine.launch()
    engine.deliver()
    assert engine.running == names
    assert engine.apply({"policy": "fcfs", "token_budget": 1}).accepted
    for _ in range(10):
        before = {name: engine.requests[name].num_output_tokens for name in names}
        engine.launch()
        engine.deliver()
        assert all(engine.requests[name].num_output_tokens > count for name, count in before.items())


# Requests with several choices (n > 1).


def rejections(engine):
    """Those told of a rejection so far, by request id."""
    told = {a.request_id: Rejection.of_answer(str(a.finish_reason), a.stop_reason) for a in engine.answers}
    return {name: rejection for name, rejection in told.items() if rejection}


def step_at_once(engine):
    engine.launch()
    engine.deliver()
    engine.now_s += STEP_S


def test_a_queue_that_is_too_long_loses_a_request_with_all_its_choices():
    params = fluid_params(ttft_s=5.0, queue_limit=6, kv_limit_tokens=400)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params})
    names = add_many(engine, 6, prompt=100, output=50)
    choices = [f"{index}_many" for index in range(4)]
    for name in choices:
        engine.add(name, prompt=100, output=50)
    step_at_once(engine)
    served = len(engine.running)
    assert 10 - served - 6 < 4, "fewer than four are in excess"
    told = rejections(engine)
    assert told.keys() == set(choices) and len(set(told.values())) == 1, "all are told the same time"
    engine.run()
    assert engine.finished.keys() == set(names)


def test_a_choice_whose_sibling_was_let_through_is_served_however_late():
    params = fluid_params(ttft_s=0.5, queue_limit=1, kv_limit_tokens=200)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params})
    choices = [f"{index}_many" for index in range(4)]
    for name in choices:
        engine.add(name, prompt=100, output=50)
    step_at_once(engine)
    assert 0 < len(engine.running) < 4
    lone = add_many(engine, 3, prompt=100, output=50)
    while engine.now_s < 1.0:
        step_at_once(engine)
    assert rejections(engine).keys() == set(lone), "who stands behind them is still told"
    engine.run()
    assert engine.finished.keys() == set(choices)
    assert max(engine.first_scheduled[name] for name in choices) > 1.0, "it waited past the target"


def test_a_choice_that_comes_after_a_sibling_was_rejected_is_rejected_too():
    params = fluid_params(ttft_s=5.0, queue_limit=1, kv_limit_tokens=400, capacity_rps=0.1)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params})
    add_many(engine, 6, prompt=100, output=50)
    engine.add("0_many", prompt=100, output=50)
    step_at_once(engine)
    before = rejections(engine)
    assert "0_many" in before
    engine.run()
    engine.add("1_many", prompt=100, output=50)  # the engine is idle: it would be served at once
    assert engine.scheduler.has_requests(), "or the engine core would not step, and it would never be told"
    step_at_once(engine)
    assert rejections(engine) == before | {"1_many": before["0_many"]}
    assert "1_many" not in engine.finished and not engine.scheduler.requests
    assert telemetry(engine).counters.rejected == len(before) + 1


@pytest.mark.parametrize("seed", range(5))
def test_choices_are_rejected_or_served_as_a_whole(seed):
    rng = random.Random(seed)
    params = fluid_params(ttft_s=0.3, queue_limit=8, kv_limit_tokens=900, capacity_rps=20.0)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params})
    late, asked = [], {}
    for number in range(60):
        asked[f"p{number}"] = [f"{index}_p{number}" for index in range(rng.randint(1, 5))]
        for name in asked[f"p{number}"]:
            if rng.random() < 0.2:
                late.append(name)
            else:
                engine.add(name, prompt=rng.randint(50, 100), output=rng.randint(2, 50))
        for _ in range(rng.randint(0, 6)):
            step_at_once(engine)
        while late and rng.random() < 0.5:
            engine.add(late.pop(), prompt=100, output=10)
    for name in late:
        engine.add(name, prompt=100, output=10)
    while engine.scheduler.has_requests():
        step_at_once(engine)
    told = rejections(engine)
    whole = {parent: {name in told for name in names} for parent, names in asked.items()}
    assert all(len(outcomes) == 1 for outcomes in whole.values())
    assert {True} in whole.values() and {False} in whole.values(), "some of both"
    assert engine.finished.keys() | told.keys() == {name for names in asked.values() for name in names}
    assert (
        not engine.scheduler.admission_queue.choices.committed and not engine.scheduler.admission_queue.choices._waiting
    )


# What clients say of their requests.

NONSENSE = [
    0, -1, 1e300, 10**400, math.nan, math.inf, -math.inf, True, "x", "3", "", "n" * 1000, None, [], [1], {"a": 1},
]


@pytest.mark.parametrize("trust_tenants", [False, True])
def test_no_value_that_a_client_writes_raises_in_the_engine_s_loop(trust_tenants):
    engine = Engine(thresholds={"policy": "fcfs"}, settings={"trust_tenants": trust_tenants}, blocks=1024)
    for place, value in enumerate(NONSENSE):
        engine.add(f"name{place}", extra_args={TENANT: value})
        engine.add(f"weight{place}", extra_args={TENANT: "team", TENANT_WEIGHT: value})
        engine.add(f"length{place}", extra_args={"expected_output_tokens": value})
    engine.add("no arguments at all", extra_args=None)
    engine.run()
    assert len(engine.finished) == 3 * len(NONSENSE) + 1


@pytest.mark.parametrize(
    ("trust_tenants", "first"), [(False, ["a0", "a1", "a2", "a3"]), (True, ["a0", "b0", "b1", "b2"])]
)
def test_a_client_cannot_give_itself_a_weight_unless_an_ingress_signs_requests(trust_tenants, first):
    engine = Engine(thresholds={"policy": "fcfs", "max_running": 1}, settings={"trust_tenants": trust_tenants})
    add_many(engine, 4, "a", extra_args={TENANT: "a", TENANT_WEIGHT: 1})
    add_many(engine, 4, "b", extra_args={TENANT: "b", TENANT_WEIGHT: 1000})
    engine.run()
    assert sorted(engine.first_scheduled, key=engine.first_scheduled.__getitem__)[:4] == first


@pytest.mark.parametrize(("scheduling_policy", "first"), [("fcfs", "polite"), ("priority", "pushy")])
def test_a_client_jumps_the_queue_by_priority_only_where_the_operator_lets_priorities_count(scheduling_policy, first):
    engine = Engine(thresholds={"policy": "fcfs", "max_running": 1}, scheduling_policy=scheduling_policy)
    engine.add("busy", output=4)
    engine.step()
    engine.add("polite", priority=0)
    engine.add("pushy", priority=-(2**31))
    engine.run()
    assert sorted(engine.finished, key=engine.finished_s.__getitem__)[1] == first


def test_a_late_choice_that_a_policy_wants_rejected_all_the_same_is_let_in():
    engine = Engine(thresholds={"policy": "fcfs", "max_running": 1})
    add_many(engine, 2, "")  # ids "0", "1"
    engine.add("0_many")
    engine.add("1_many")
    scheduler = engine.scheduler
    scheduler.admission_queue.let_through(engine.requests["0_many"])
    scheduler._reject([engine.requests["1_many"], engine.requests["1"]], TOO_MANY, 1.0)
    assert scheduler.admission_queue.released == 2
    engine.run()
    assert engine.finished.keys() == {"0", "0_many", "1_many"} and rejections(engine).keys() == {"1"}
