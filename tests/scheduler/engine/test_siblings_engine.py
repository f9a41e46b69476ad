"""The engine requests of one HTTP request on vLLM's real scheduler: a completion of several prompts, with choices."""

from __future__ import annotations

from typing import Any

import pytest
from engine_harness import STEP_S, Engine
from vllm.pooling_params import PoolingParams
from vllm.v1.request import Request

from scheduler.policies import UNKNOWN_TYPE, Decision
from scheduler.rejection import TOO_LATE, Rejection

TIME_MODEL = {"d0_s": 4e-3, "d1_s_per_kv_token": 1e-6, "d2_s_per_prefill_token": 1e-4, "d3_s_per_decode_token": 1e-4}


def engine_of(settings: dict[str, Any] | None = None, **params: Any) -> Engine:
    survival = [[0, 1.0], [49, 1.0], [50, 0.0]]
    thresholds = {"policy": "fluid", "fluid": {"time_model": TIME_MODEL, "survival": survival, **params}}
    return Engine(thresholds=thresholds, settings=settings or {"audit_share": 0.0})


def prompts(http_id: str, count: int, choices: int = 1, digits: str = "0a1b2c3") -> list[str]:
    """The ids that vLLM gives the engine requests of a completion."""
    names = [f"cmpl-{http_id}-{place}-{digits}{place % 10}" for place in range(count)]
    return names if choices == 1 else [f"{choice}_{name}" for name in names for choice in range(choices)]


def add(engine: Engine, names: list[str]) -> list[str]:
    for name in names:
        engine.add(name, prompt=100, output=50)
    return names


def step(engine: Engine) -> None:
    engine.launch()
    engine.deliver()
    engine.now_s += STEP_S


def run(engine: Engine) -> None:
    while engine.scheduler.has_requests():
        step(engine)


def rejected(engine: Engine) -> set[str]:
    answers = engine.answers
    return {one.request_id for one in answers if Rejection.of_answer(str(one.finish_reason), one.stop_reason)}


@pytest.mark.parametrize("choices", [1, 2])
def test_a_queue_that_is_too_long_loses_a_completion_with_all_its_prompts(choices: int) -> None:
    engine = engine_of(ttft_s=5.0, queue_limit=6, kv_limit_tokens=400)
    others = add(engine, [f"r{place}" for place in range(6)])
    several = add(engine, prompts("http", 4 // choices, choices))
    step(engine)
    assert rejected(engine) == set(several)
    run(engine)
    assert engine.finished.keys() == set(others)


@pytest.mark.parametrize("choices", [1, 2])
def test_prompts_whose_sibling_was_let_through_are_served_however_late(choices: int) -> None:
    engine = engine_of(ttft_s=0.5, queue_limit=1, kv_limit_tokens=200)
    several = add(engine, prompts("http", 4 // choices, choices))
    step(engine)
    assert 0 < len(engine.running) < 4
    run(engine)
    assert engine.finished.keys() == set(several) and not rejected(engine)
    assert max(engine.first_scheduled[name] for name in several) > 0.5, "it waited past the target"


def test_a_prompt_that_comes_after_a_sibling_was_rejected_is_rejected_too() -> None:
    engine = engine_of(ttft_s=5.0, queue_limit=1, kv_limit_tokens=400, capacity_rps=0.1)
    others = add(engine, [f"r{place}" for place in range(6)])
    first, second = prompts("http", 2)
    add(engine, [first])
    step(engine)
    assert first in rejected(engine)
    run(engine)
    add(engine, [second])
    run(engine)
    assert {first, second} <= rejected(engine) <= {first, second, *others}


def test_a_client_that_uses_the_id_of_its_rejected_request_again_is_judged_anew() -> None:
    engine = engine_of(ttft_s=5.0, queue_limit=1, kv_limit_tokens=400, capacity_rps=0.1)
    add(engine, [f"r{place}" for place in range(6)])
    before = add(engine, prompts("mine", 2))
    step(engine)
    assert set(before) <= rejected(engine)
    run(engine)
    again = add(engine, prompts("mine", 2, digits="fffffff"))
    run(engine)
    assert engine.finished.keys() >= set(again)


def test_the_id_of_a_served_request_spares_no_later_one() -> None:
    engine = engine_of(ttft_s=5.0, queue_limit=1, kv_limit_tokens=400, capacity_rps=0.1)
    served = add(engine, prompts("mine", 1))
    step(engine)
    assert engine.running == served
    add(engine, [f"r{place}" for place in range(6)])
    again = add(engine, prompts("mine", 1, digits="fffffff"))
    step(engine)
    assert set(again) <= rejected(engine)


def test_a_rejection_drawn_for_the_audit_is_lifted_for_all_prompts() -> None:
    engine = engine_of({"audit_share": 0.5}, ttft_s=5.0, queue_limit=1, kv_limit_tokens=400, capacity_rps=0.1)
    for place in range(12):
        add(engine, prompts(f"http{place}", 3))
    run(engine)
    rejected_ids = rejected(engine)
    by_request = [{name in rejected_ids for name in prompts(f"http{place}", 3)} for place in range(12)]
    assert all(len(outcomes) == 1 for outcomes in by_request)
    assert {True} in by_request and {False} in by_request


def test_no_request_enters_that_the_policy_did_not_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """One choice is late and takes the others with it, one of which was to enter; the next in turn is too big."""
    engine = engine_of(kv_limit_tokens=400)
    engine.add("running", prompt=100, output=50)
    step(engine)
    add(engine, ["0_many", "1_many", "2_many"])
    engine.add("big", prompt=900, output=50)
    decision = Decision(admit={UNKNOWN_TYPE: 1}, reject=frozenset(["0_many"]))
    monkeypatch.setattr(engine.scheduler._obeyed.policy, "decide", lambda snapshot: decision)
    step(engine)
    assert rejected(engine) == {"0_many", "1_many", "2_many"}
    assert engine.scheduler.admission_queue.held == 1 and "big" not in engine.running


def test_an_embedding_is_never_rejected() -> None:
    """vLLM has no answer for it that says so: without a result its output processor fails."""
    engine = engine_of(ttft_s=5.0, kv_limit_tokens=400)
    request = Request("embd-1-0", [7] * 32, None, PoolingParams(task="embed"))
    engine.scheduler.add_request(request)
    engine.scheduler._reject([request], TOO_LATE, 1.0)
    assert not engine.scheduler.rejector.undelivered and engine.scheduler.admission_queue.released == 1
