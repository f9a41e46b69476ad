"""An engine that drains, on vLLM's real scheduler: what goes back, what runs on, and that the counters balance."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine_harness import STEP_S, Engine, add_many, boundary_engine, fluid_params, nested, telemetry, wait

from scheduler.messages import Drain, Report
from scheduler.rejection import Kind, Rejection

WAITING, ALL = Drain(end=False), Drain(end=True)


def step(engine: Engine) -> None:
    """An iteration whose results are delivered at once."""
    engine.launch()
    engine.deliver()
    engine.now_s += STEP_S


def answers(engine: Engine, kind: Kind = Kind.RECALLED) -> set[str]:
    found = {one.request_id: Rejection.of_answer(str(one.finish_reason), one.stop_reason) for one in engine.answers}
    return {name for name, rejection in found.items() if rejection and rejection.kind is kind}


def tokens_of(engine: Engine) -> dict[str, int]:
    count: dict[str, int] = {}
    for answer in engine.answers:
        count[answer.request_id] = count.get(answer.request_id, 0) + len(answer.new_token_ids)
    return count


def balanced(engine: Engine) -> bool:
    counters = telemetry(engine).counters
    known = counters.completed + counters.aborted + counters.rejected + counters.recalled
    return counters.arrivals == known + counters.in_flight and counters.in_flight == len(engine.scheduler.requests)


POLICIES = [{"policy": "fcfs"}, wait(n=2), nested((4, 2), (1000, 2))]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["policy"])
def test_what_has_begun_is_finished_and_what_has_not_goes_back_at_once(policy: dict[str, Any]) -> None:
    engine = Engine(thresholds=policy, max_num_seqs=2)
    names = add_many(engine, 6, output=20)
    step(engine)
    begun = set(engine.running)
    assert len(begun) == 2
    assert engine.scheduler.drain.ask(WAITING).accepted
    step(engine)
    assert answers(engine) == set(names) - begun, "in the very next iteration"
    engine.run()
    assert engine.finished.keys() == begun
    assert tokens_of(engine) == {name: 20 if name in begun else 0 for name in names}, "a recall costs no token"
    assert telemetry(engine).counters.recalled == 4 and balanced(engine)


def test_requests_that_come_later_go_back_too_also_to_an_idle_engine() -> None:
    engine = Engine()
    engine.scheduler.drain.ask(WAITING)
    engine.add("late")
    assert engine.scheduler.has_requests()
    step(engine)
    assert answers(engine) == {"late"} and not engine.scheduler.has_unfinished_requests()
    assert not engine.batches[-1]


def test_a_request_released_by_the_policy_but_not_begun_goes_back() -> None:
    engine = Engine(max_num_seqs=1)
    add_many(engine, 3, output=20)
    step(engine)
    engine.scheduler.admission_queue.release("unknown", 9)
    assert engine.scheduler.admission_queue.released
    engine.scheduler.drain.ask(WAITING)
    step(engine)
    assert answers(engine) == {"r1", "r2"}


def test_a_request_whose_grammar_still_compiles_goes_back() -> None:
    engine = Engine()
    engine.add("structured", structured=True)
    step(engine)
    engine.scheduler.drain.ask(WAITING)
    step(engine)
    assert answers(engine) == {"structured"}


def test_a_prompt_computed_in_part_is_finished() -> None:
    engine = Engine(max_num_batched_tokens=32, max_num_seqs=4)
    engine.add("long", prompt=200, output=4)
    step(engine)
    assert engine.requests["long"].is_prefill_chunk
    engine.scheduler.drain.ask(WAITING)
    engine.run()
    assert engine.finished.keys() == {"long"} and not answers(engine)


def test_a_preempted_request_is_finished() -> None:
    engine = Engine(blocks=8)
    names = add_many(engine, 3, prompt=32, output=40)
    while not telemetry(engine).counters.preemptions:
        engine.step()
    preempted = [name for name in names if name not in engine.running]
    begun = {name for name in names if engine.requests[name].num_preemptions or name in engine.running}
    assert set(preempted) & begun
    engine.scheduler.drain.ask(WAITING)
    engine.run()
    assert engine.finished.keys() == begun and answers(engine) == set(names) - begun


def test_no_threshold_holds_a_request_that_has_begun() -> None:
    """Two requests stand at Nested WAIT's boundary, where they would wait for two more to come, up to 60 s."""
    engine, front = boundary_engine(max_hold_s=60.0)
    engine.steps(2)
    young = add_many(engine, 4, "young", output=12)
    engine.steps(4)
    assert engine.batches[-1].keys() == set(young), "the others are paused"
    engine.scheduler.drain.ask(WAITING)
    assert engine.step().keys() == {*front, *young}
    engine.run(most_steps=15)
    assert engine.finished.keys() == {*front, *young}


def test_in_strict_mode_an_evicted_request_is_admitted_again() -> None:
    """Four stand at a boundary that opens for five; a newcomer needs the memory of two of them."""
    engine = Engine(
        blocks=61, thresholds=nested((4, 5), (1000, 5), mode="strict"), settings={"allow_strict": True},
        max_num_batched_tokens=1024,
    )
    begun = [*add_many(engine, 4, "held", prompt=44, output=20), "short"]
    engine.add("short", prompt=44, output=4)
    for tick in range(4):
        engine.step()
        begun += add_many(engine, 5, f"tick{tick}-", prompt=1, output=1)
    engine.steps(4)
    begun += [*add_many(engine, 1, "long", prompt=780, output=1), *add_many(engine, 4, "new", prompt=1, output=1)]
    engine.step()
    evicted = [name for name, request in engine.requests.items() if request.num_preemptions]
    assert evicted == ["held2", "held3"] and engine.scheduler.admission_queue.held == 2
    waiting = add_many(engine, 2, "waiting", prompt=1)
    engine.scheduler.drain.ask(WAITING)
    engine.run()
    assert engine.finished.keys() == set(begun) and answers(engine) == set(waiting) and balanced(engine)


# Several choices or prompts of one HTTP request.


def completion(count: int) -> list[str]:
    return [f"cmpl-http-{place}-0a1b2c3{place}" for place in range(count)]


@pytest.mark.parametrize("names", [["0_many", "1_many", "2_many"], completion(3)], ids=["choices", "prompts"])
def test_all_siblings_go_back_together_later_ones_too(names: list[str]) -> None:
    engine = Engine(max_num_seqs=1)
    engine.add("other", output=20)
    step(engine)
    *early, late = names
    for name in early:
        engine.add(name)
    engine.scheduler.drain.ask(WAITING)
    step(engine)
    assert answers(engine) == set(early)
    engine.add(late)
    step(engine)
    assert answers(engine) == set(names)


@pytest.mark.parametrize("names", [["0_many", "1_many", "2_many"], completion(3)], ids=["choices", "prompts"])
def test_once_one_sibling_has_begun_all_are_served_later_ones_too(names: list[str]) -> None:
    engine = Engine(max_num_seqs=1)
    *early, late = names
    for name in early:
        engine.add(name, output=20)
    step(engine)
    assert engine.running == names[:1]
    engine.scheduler.drain.ask(WAITING)
    step(engine)
    engine.add(late, output=20)
    engine.run()
    assert engine.finished.keys() == set(names) and not answers(engine)


def test_a_sibling_of_one_that_is_finished_is_served() -> None:
    engine = Engine(max_num_seqs=1)
    first, second, third = completion(3)
    engine.add(first, output=2)
    engine.add(second, output=2)
    while not engine.finished:
        step(engine)
    assert first in engine.finished and second not in engine.finished
    engine.scheduler.drain.ask(WAITING)
    engine.add(third, output=2)
    engine.run()
    assert engine.finished.keys() == {first, second, third}
    assert not answers(engine)


# The order itself.


def test_an_order_given_twice_changes_nothing() -> None:
    engine = Engine(max_num_seqs=1)
    add_many(engine, 3, output=20)
    step(engine)
    for _ in range(2):
        engine.scheduler.drain.ask(WAITING)
        engine.steps(2)
    engine.run()
    assert answers(engine) == {"r1", "r2"} and engine.finished.keys() == {"r0"}


@pytest.mark.parametrize("then", [[], [WAITING]], ids=["alone", "softened in vain"])
def test_at_the_bound_what_runs_ends_with_a_marked_answer(then: list[Drain]) -> None:
    engine = Engine(max_num_seqs=1)
    add_many(engine, 3, output=200)
    step(engine)
    step(engine)
    for order in (ALL, *then):
        engine.scheduler.drain.ask(order)
    step(engine)
    engine.run()
    assert answers(engine, Kind.ENDED) == {"r0"} and answers(engine) == {"r1", "r2"}
    assert engine.scheduler.recorder.counters().aborted == 1 and balanced(engine)
    assert not engine.finished


def test_whoever_asks_sees_that_the_engine_drains() -> None:
    engine = Engine()
    assert not engine.scheduler.stats().draining and not telemetry(engine).draining
    engine.scheduler.drain.ask(WAITING)
    assert engine.scheduler.stats().draining and engine.scheduler.telemetry(Report(cursor=None)).draining


@pytest.mark.parametrize("seed", range(6))
def test_whenever_it_comes_every_request_has_one_outcome(seed: int) -> None:
    rng = random.Random(seed)
    policies = [{"policy": "fcfs"}, wait(n=3, max_hold_s=1.0), {"policy": "fluid", "fluid": fluid_params(ttft_s=0.5)}]
    engine = Engine(thresholds=policies[seed % 3], max_num_seqs=4, blocks=64)
    names, aborted, orders = [], set(), 0
    for number in range(120):
        if rng.random() < 0.5:
            family = rng.choice([f"r{number}", f"0_many{number // 5}", f"cmpl-{number // 5}-{number % 5}-0a1b2c3d"])
            if family not in names:
                names.append(family)
                engine.add(family, prompt=rng.randint(1, 80), output=rng.randint(1, 30))
        if engine.requests and rng.random() < 0.1:
            gone = rng.choice(sorted(engine.requests))
            engine.abort(gone)
            aborted.add(gone)
        if number >= 60 and rng.random() < 0.2:
            engine.scheduler.drain.ask(WAITING)
            orders += 1
        engine.step()
        assert balanced(engine)
    assert orders
    engine.scheduler.drain.ask(WAITING)
    engine.run()
    counters = engine.scheduler.recorder.counters()
    assert counters.in_flight == 0 and counters.recalled == len(answers(engine))
    outcomes = [set(engine.finished), answers(engine), answers(engine, Kind.REJECTED)]
    assert sorted(name for outcome in outcomes for name in outcome - aborted) == sorted(set(names) - aborted)
