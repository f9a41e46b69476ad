"""WAIT at admission and Nested WAIT at its boundaries, on vLLM's real scheduler and block manager."""

import random
from types import SimpleNamespace

import pytest
from engine_harness import MAX_MODEL_LEN, STEP_S, Engine, add_many, boundary_engine, nested, telemetry, wait

from scheduler.engine.running_requests import EngineBatch, in_admission_order
from scheduler.policies import RunningRequest

# WAIT at admission.


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


def test_strict_wait_advances_no_request_without_a_full_group():
    engine = Engine(thresholds=wait(4, mode="strict"), settings={"allow_strict": True})
    add_many(engine, 3, "a", output=3)
    assert engine.steps(3) == [{}, {}, {}], "strict mode: not even an idle engine admits"
    engine.add("a3", output=3)
    assert len(engine.step()) == 4
    assert engine.steps(3) == [{}, {}, {}], "running requests wait for the next full group"
    add_many(engine, 4, "b", output=3)
    assert len(engine.step()) == 8


def test_boundary_queue_opens_when_n_stand_there():
    engine, front = boundary_engine(max_hold_s=10.0)
    engine.steps(2)
    young = add_many(engine, 4, "young", output=12)
    batches = engine.steps(6)
    assert batches[0].keys() == {*front, *young} and batches[1].keys() == {*front, *young}
    # `front` has four tokens after steps 0..3 and stands at the boundary in steps 4 and 5; `young` comes in step 6.
    assert batches[2].keys() == batches[3].keys() == set(young)
    assert batches[4].keys() == {*front, *young}
    assert batches[5].keys() == {*front, *young}, "no request is held there twice"
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


def test_paused_requests_keep_their_memory_and_their_place():
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
    assert len(now.running) == 5, "paused requests count as running"
    engine.run()
    assert len(engine.finished) == 6


@pytest.mark.parametrize("seed", range(30))
def test_admission_order_is_restored(seed):
    rng = random.Random(seed)
    original = [SimpleNamespace(name=place) for place in range(rng.randint(1, 10))]
    aside = [(place, request) for place, request in enumerate(original) if rng.random() < 0.4]
    taken = {place for place, _ in aside}
    others = [request for place, request in enumerate(original) if place not in taken]
    if rng.random() < 0.5:  # vLLM preempts from the end, and then admits none
        kept, new = others[: rng.randint(0, len(others))], []
    else:
        kept, new = others, [SimpleNamespace(name=100 + place) for place in range(rng.randint(0, 3))]
    names = [request.name for request in in_admission_order([*kept, *new], aside)]
    survivors = {request.name for request in kept} | taken
    assert names == [r.name for r in original if r.name in survivors] + [r.name for r in new]


def test_preemption_takes_the_latest_admitted_running_request():
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


def test_all_requests_run_when_paused_ones_hold_all_the_memory():
    # `front` holds 6 of 9 blocks at its boundary; the young group lets it sit out and then does not fit.
    engine = Engine(blocks=10, thresholds=nested((4, 3), (1000, 3), max_hold_s=60.0))
    add_many(engine, 2, "front", prompt=44, output=20)
    engine.steps(4)
    add_many(engine, 3, "young", prompt=60, output=20)
    engine.run(most_steps=400)
    assert len(engine.finished) == 5
    for earlier, later in zip(engine.batches, engine.batches[1:], strict=False):
        assert earlier or later, "never two empty iterations in a row while there is work"


def test_paused_requests_keep_their_slots():
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
