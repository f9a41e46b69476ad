"""Token budgets, and thresholds that change or lapse while an engine serves."""

from dataclasses import replace

import pytest
from engine_harness import MAX_MODEL_LEN, Engine, add_many, telemetry, wait

from scheduler.policies.fcfs import Fcfs

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


def test_token_budget_starves_no_prompt_where_prompts_are_not_split():
    engine = Engine(
        thresholds={"token_budget": 20}, enable_chunked_prefill=False, max_num_batched_tokens=MAX_MODEL_LEN, blocks=60
    )
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


def test_all_requests_are_reclassified_when_the_policy_changes():
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


@pytest.mark.parametrize(("pinned", "most"), [(None, 150), (100, 100), (400, 150)])
def test_an_operator_s_token_budget_bounds_that_of_the_policy_and_does_not_replace_it(monkeypatch, pinned, most):
    decide = Fcfs.decide
    monkeypatch.setattr(Fcfs, "decide", lambda self, snapshot: replace(decide(self, snapshot), token_budget=150))
    engine = Engine(thresholds={"policy": "fcfs", "token_budget": pinned})
    add_many(engine, 8, prompt=480, output=20)
    assert {sum(batch.values()) for batch in engine.steps(20)} == {most}


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
