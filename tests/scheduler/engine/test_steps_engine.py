"""Several tokens a step on vLLM's real scheduler: what an engine counts, and that every running request advances."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_harness import BLOCK, STEP_S, Engine

from scheduler.messages import Counters, Report
from scheduler.thresholds import EngineLimits

LIMITS = EngineLimits(
    kv_capacity_tokens=137_000, block_tokens=16, max_num_seqs=512, max_num_batched_tokens=2048, max_model_len=4096
)


def sync_engine(drafts: int, gains, *, depth: int = 3, **engine_args) -> Engine:
    speculation = {"method": "ngram", "num_speculative_tokens": depth}
    return Engine(drafts=drafts, gains=gains, speculative_config=speculation, async_scheduling=False, **engine_args)


def step(engine: Engine) -> dict[str, int]:
    batch = engine.launch()
    engine.deliver()
    engine.now_s += STEP_S
    return batch


def run(engine: Engine) -> None:
    while engine.scheduler.has_unfinished_requests():
        step(engine)
        assert engine.now_s < 100 * STEP_S * 100


def counters(engine: Engine) -> Counters:
    return engine.scheduler.telemetry(Report()).counters


@pytest.mark.parametrize(("drafts", "gained"), [(3, 4), (3, 2), (3, 1), (0, 1), (2, 3)])
def test_an_engine_counts_its_steps_and_what_they_gain_and_cost(drafts, gained):
    """One token comes of the prompt, the rest of steps; what is beyond an answer's end counts for none."""
    engine = sync_engine(drafts, lambda name, given: gained, thresholds={"policy": "fcfs"})
    for place in range(5):
        engine.add(f"r{place}", prompt=40, output=22)
    run(engine)
    seen, steps = counters(engine), -(-21 // gained)
    assert (seen.decode_steps, seen.decode_gained_tokens) == (5 * steps, 5 * 21)
    assert seen.decode_computed_tokens == 5 * steps * (1 + drafts)
    last = 21 - (steps - 1) * gained
    assert seen.decode_gained_squares == 5 * ((steps - 1) * gained**2 + last**2)
    assert {request.num_output_tokens for request in engine.finished.values()} == {22}


def test_an_engine_that_does_not_speculate_counts_no_steps():
    engine = Engine(thresholds={"policy": "fcfs"})
    engine.add("r")
    engine.run()
    assert counters(engine).decode_steps == 0


def test_the_time_model_counts_computed_tokens():
    engine = sync_engine(3, lambda name, given: 2, thresholds={"policy": "fcfs"})
    for place in range(5):
        engine.add(f"r{place}", prompt=40, output=22)
    run(engine)
    iterations = engine.scheduler.telemetry(Report()).iterations
    assert (iterations[0].prefill_tokens, iterations[0].decode_tokens) == (5 * 40, 0)
    assert {(one.prefill_tokens, one.decode_tokens) for one in iterations[1:]} == {(0, 5 * 4)}


def test_drafts_that_are_under_way_do_not_count_as_output():
    """Scheduled ahead, a step has one token for certain."""
    engine = Engine(
        drafts=3, gains=lambda name, given: 1, thresholds={"policy": "fcfs"},
        speculative_config={"method": "ngram_gpu", "num_speculative_tokens": 3},
    )
    engine.add("r", prompt=40, output=30)
    stages = []
    for _ in range(6):
        engine.step()
        stages += engine.scheduler._snapshot(engine.now_s).running.stages()
    assert stages == [1, 2, 3, 4, 5, 6]
    engine.run()
    assert engine.finished["r"].num_output_tokens == 30


FAST = {"d0_s": 4e-3, "d1_s_per_kv_token": 1e-6, "d2_s_per_prefill_token": 1e-4, "d3_s_per_decode_token": 1e-4}


def fluid(**params):
    survival = [[0, 1.0], [39, 1.0], [40, 0.0]]
    return {
        "policy": "fluid",
        "fluid": {"time_model": FAST, "survival": survival, "kv_limit_tokens": 1023 * BLOCK, **params},
    }


@pytest.mark.parametrize("computed_per_step", [1.0, 4.0])
def test_every_running_request_advances_beside_prompts_that_fill_the_iteration(computed_per_step):
    """Iterations of 12 ms have time for the decodes and few prompt tokens; how many drafts there are is known."""
    engine = sync_engine(
        3, lambda name, given: 2, blocks=1024,
        thresholds=fluid(iteration_s=0.012, computed_per_step=computed_per_step, tokens_per_step=1.0),
    )
    for place in range(12):
        engine.add(f"r{place}", prompt=16, output=40)
    for _ in range(4):
        step(engine)
    for place in range(3):
        engine.add(f"long{place}", prompt=400, output=2)
    beside = 0
    for _ in range(12):
        decoding = [name for name in engine.running if engine.requests[name].num_output_tokens]
        before = {name: engine.requests[name].num_output_tokens for name in decoding}
        batch = step(engine)
        beside += any(name.startswith("long") for name in batch)
        for name, count in before.items():
            request = engine.requests.get(name) or engine.finished[name]
            assert request.num_output_tokens > count and batch[name] == 4
    assert beside > 3


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_prompt_takes_the_time_left_beside_the_drafts_that_come(drafts):
    """Of 12 ms, 4 are fixed and a token takes 0.1: ten requests leave some 80 − 10·(1 + drafts) tokens."""
    engine = sync_engine(drafts, lambda name, given: 1, blocks=1024, thresholds=fluid(iteration_s=0.012))
    for place in range(10):
        engine.add(f"r{place}", prompt=16, output=40)
    for _ in range(3):
        step(engine)
    engine.add("long", prompt=400, output=2)
    step(engine)
    step(engine)
    chunk = engine.batches[-1]["long"]
    assert chunk == pytest.approx(80 - 10 * (1 + drafts), abs=8)


def test_no_more_requests_run_than_one_iteration_advances():
    """Of 64 tokens, sixteen requests with three drafts each take all."""
    engine = sync_engine(3, lambda name, given: 1, blocks=1024, thresholds=fluid(), max_num_batched_tokens=64)
    for place in range(40):
        engine.add(f"r{place}", prompt=4, output=40)
    for _ in range(30):
        batch = step(engine)
        assert set(batch) == set(engine.running) | (set(batch) & set(engine.finished))
    assert len(engine.running) == 16
    assert replace(LIMITS, speculative_tokens=3).slots == 512
    assert replace(LIMITS, speculative_tokens=7).slots == 256


def test_nested_wait_holds_at_boundaries_on_an_engine_that_jumps_over_them():
    """Steps of three tokens pass 10: two of the front stand beyond it until the four of the young do too."""
    thresholds = {
        "policy": "nested_wait", "max_hold_s": 10.0,
        "segments": [{"end_output_tokens": 9, "total": 36}, {"end_output_tokens": 900, "total": 3564}],
    }
    engine = sync_engine(3, lambda name, given: 3, thresholds=thresholds)
    for place in range(2):
        engine.add(f"front{place}", output=40)
    for _ in range(2):
        step(engine)
    for place in range(4):
        engine.add(f"young{place}", output=40)
    batches = [step(engine) for _ in range(6)]
    front = {"front0", "front1"}
    advanced = [front <= batch.keys() for batch in batches]
    assert advanced == [True, True, False, False, True, True]
    assert all(batch[name] == 4 for batch in batches[1:] for name in batch), "drafts and all"
    run(engine)
    assert {request.num_output_tokens for request in engine.finished.values()} == {40}
