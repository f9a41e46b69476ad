"""Which request is preempted when blocks run short and others pause: on vLLM's real scheduler."""

import pytest
from engine_harness import MAX_MODEL_LEN, Engine


def segments(*ends_and_n):
    """Segments with n_k requests per stage."""
    starts = (0, *(end for end, _ in ends_and_n))
    return [
        {"end_output_tokens": end, "total": n * (end - start)}
        for start, (end, n) in zip(starts, ends_and_n, strict=False)
    ]


def nested(*ends_and_n, **fields):
    return {"policy": "nested_wait", "segments": segments(*ends_and_n), **fields}


def add_many(engine, count, prefix, **request):
    names = [f"{prefix}{place}" for place in range(count)]
    for name in names:
        engine.add(name, **request)
    return names


def preempted(engine):
    all_requests = {**engine.requests, **engine.finished}
    return {name: request.num_preemptions for name, request in all_requests.items() if request.num_preemptions}


def short_of_memory(max_hold_s=10.0, **engine_args):
    """13 usable blocks: two `old` requests stand at a boundary with three each, and three `young` outgrow the rest."""
    engine = Engine(blocks=14, thresholds={
        "policy": "wait", "types": [{"name": "known", "n": 1}], "max_hold_s": max_hold_s,
        "segments": segments((4, 3), (1000, 3)),
    }, **engine_args)
    add_many(engine, 2, "old", prompt=40, output=30, max_tokens=MAX_MODEL_LEN - 40)  # of unknown length
    engine.steps(3)
    add_many(engine, 3, "young", prompt=26, output=40)
    return engine


def test_held_requests_are_preempted_before_any_that_runs_the_latest_admitted_first():
    engine = short_of_memory()
    seen = []
    for _ in range(40):
        engine.step()
        for name in preempted(engine):
            if name not in seen:
                seen.append(name)
        if len(seen) == 2 or engine.finished:
            break
    assert seen[:2] == ["old1", "old0"], "the youngest of those held, then the other; none that runs"


def test_an_evicted_request_is_not_resumed_in_the_same_iteration():
    engine = short_of_memory()
    while not preempted(engine):
        batch = engine.step()
    assert batch.keys() == {"young0", "young1", "young2"} and engine.running == ["old0", *batch]
    assert [request.request_id for request in engine.scheduler.waiting] == ["old1"], "it is the next to be taken up"


def test_nothing_is_lost_by_an_eviction():
    engine = short_of_memory()
    engine.run()
    assert {name: request.num_output_tokens for name, request in engine.finished.items()} == {
        "old0": 30, "old1": 30, "young0": 40, "young1": 40, "young2": 40,
    }
    assert engine.scheduler.kv_cache_manager.usage == 0.0 and not engine.scheduler.running


@pytest.mark.parametrize(("method", "asynchronous"), [("ngram", False), ("ngram_gpu", True)])
def test_nothing_is_lost_by_an_eviction_of_requests_with_drafts(method, asynchronous):
    engine = short_of_memory(
        drafts=3, gains=lambda name, given: 2, async_scheduling=asynchronous,
        speculative_config={"method": method, "num_speculative_tokens": 3},
    )
    while not preempted(engine):
        engine.step()
    assert preempted(engine).keys() <= {"old0", "old1"}
    engine.run()
    outputs = {name: request.num_output_tokens for name, request in engine.finished.items()}
    old = {outputs.pop(name) for name in ("old0", "old1")}
    assert old <= {30, 31}, "the end comes as the first token of a step"
    assert outputs == {"young0": 40, "young1": 40, "young2": 40}
    assert engine.scheduler.kv_cache_manager.usage == 0.0 and not engine.scheduler.running


def test_without_paused_requests_vllm_s_own_preemption_is_untouched():
    """Once the hold is over the same requests run, and the latest admitted of them goes first."""
    engine = short_of_memory(max_hold_s=0.0)
    while not preempted(engine):
        engine.step()
    assert preempted(engine) == {"young2": 1}


def strict_scene():
    """Four stand at a boundary that opens for five, with 12 of 60 blocks; nothing else is there."""
    engine = Engine(
        blocks=61, thresholds=nested((4, 5), (1000, 5), mode="strict"), settings={"allow_strict": True},
        max_num_batched_tokens=1024,
    )
    held = add_many(engine, 4, "held", prompt=44, output=20)
    engine.add("short", prompt=44, output=4)
    for tick in range(4):  # a group moves on when the next one is complete
        engine.step()
        add_many(engine, 5, f"tick{tick}-", prompt=1, output=1)
    engine.steps(4)
    assert set(held) == set(engine.running) == set(engine.requests)
    return engine, held


def test_strict_mode_cannot_lock_up_when_held_requests_fill_the_memory():
    """A newcomer asks for 49 of 60 blocks, 12 of which are held."""
    engine, held = strict_scene()
    newcomers = [*add_many(engine, 1, "long", prompt=780, output=1), *add_many(engine, 4, "new", prompt=1, output=1)]
    batch = engine.step()
    assert list(batch) == newcomers, "room is made for those that are selected"
    assert preempted(engine) == {"held3": 1, "held2": 1}, "by those that are not, and by no more of them than needed"
    assert engine.running == ["held0", "held1", *batch]
    assert engine.scheduler.admission_queue.held == 2, "the evicted wait for a group again, like new ones"
    for tick in range(60):
        add_many(engine, 5, f"more{tick}-", prompt=1, output=6)  # these complete groups at the boundary too
        engine.step()
    finished = engine.finished
    assert {name: finished[name].num_output_tokens for name in held} == dict.fromkeys(held, 20)
    assert set(newcomers) <= set(finished)


def test_strict_mode_evicts_requests_at_a_boundary_before_other_paused_ones():
    engine, held = strict_scene()
    add_many(engine, 5, "inside", prompt=1, output=20)
    engine.step()  # they enter segment 1 and stand still there until the next group, the latest admitted of all
    add_many(engine, 4, "new", prompt=1, output=1)
    engine.add("long", prompt=740, output=1)
    batch = engine.step()
    assert "long" in batch and preempted(engine).keys() <= set(held) and preempted(engine)


def test_a_request_that_ends_while_waiting_again_leaves_nothing_behind():
    """Its last token was under way when it was evicted."""
    engine, _ = strict_scene()
    ending = add_many(engine, 5, "ending", prompt=1, output=1)
    engine.launch()
    scheduler = engine.scheduler
    scheduler._held.take_out(set(ending), (), strict=True)
    while scheduler._held._victims:
        scheduler._held._evict(scheduler._held._victims.pop())
    assert scheduler._held.put_back() == 0 and scheduler.admission_queue.held == 5
    engine.steps(3)
    assert set(ending) <= set(engine.finished) and scheduler.admission_queue.held == 0
    assert not set(ending) & (set(scheduler.requests) | set(scheduler.admission_queue._type_of))
