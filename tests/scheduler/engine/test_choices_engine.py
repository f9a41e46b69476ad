"""Requests with several choices (n > 1): rejected or served as a whole."""

import random

import pytest
from engine_harness import STEP_S, Engine, add_many, fluid_params, telemetry

from scheduler.rejection import TOO_MANY, Rejection

# Requests with several choices (n > 1).


def rejections(engine):
    """The rejections delivered so far, by request id."""
    by_id = {a.request_id: Rejection.of_answer(str(a.finish_reason), a.stop_reason) for a in engine.answers}
    return {name: rejection for name, rejection in by_id.items() if rejection}


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
    by_id = rejections(engine)
    assert by_id.keys() == set(choices) and len(set(by_id.values())) == 1, "all get the same time"
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
    assert rejections(engine).keys() == set(lone), "requests behind them are still rejected"
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
    assert engine.scheduler.has_requests(), "or the engine core would not step nor deliver the rejection"
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
    by_id = rejections(engine)
    whole = {parent: {name in by_id for name in names} for parent, names in asked.items()}
    assert all(len(outcomes) == 1 for outcomes in whole.values())
    assert {True} in whole.values() and {False} in whole.values(), "some of both"
    assert engine.finished.keys() | by_id.keys() == {name for names in asked.values() for name in names}
    assert (
        not engine.scheduler.admission_queue.choices.committed and not engine.scheduler.admission_queue.choices._waiting
    )


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
