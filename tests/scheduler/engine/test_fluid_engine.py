"""`fluid` on vLLM's real scheduler: what is let through, what a prompt costs, and what the engine tells of requests."""

import random
from collections import Counter

import pytest
from engine_harness import BLOCK, STEP_S, Engine
from vllm.lora.request import LoRARequest
from vllm.v1.request import RequestStatus

from scheduler.messages import Report
from scheduler.rejection import Rejection

TIME_MODEL = {"d0_s": 4e-3, "d1_s_per_kv_token": 1e-6, "d2_s_per_prefill_token": 1e-4, "d3_s_per_decode_token": 1e-4}
OUTPUT = 50


def fluid(**params):
    """Thresholds with fluid parameters and outputs of `OUTPUT` tokens."""
    survival = [[0, 1.0], [OUTPUT - 1, 1.0], [OUTPUT, 0.0]]
    return {"policy": "fluid", "fluid": {"time_model": TIME_MODEL, "survival": survival, **params}}


def memory_engine(*, blocks=64, thresholds=None, **engine_args):
    """Requests of 60 + 50 tokens take 7 blocks of the 63: memory holds nine."""
    return Engine(
        blocks=blocks, thresholds=thresholds or fluid(kv_limit_tokens=(blocks - 1) * BLOCK), **engine_args
    )


MEMORY_HOLDS = 9


def let_through(engine):
    """Released requests that have not ended."""
    return len(engine.requests) - engine.scheduler.admission_queue.held


def telemetry(engine):
    return engine.scheduler.telemetry(Report())


def snapshot(engine):
    return engine.scheduler._snapshot(engine.now_s)


def rejected(engine):
    return {
        answer.request_id for answer in engine.answers
        if Rejection.of_answer(str(answer.finish_reason), answer.stop_reason)
    }


# Requests let through that cannot start.


def test_requests_whose_grammar_compiles_hold_the_memory_that_they_will_need():
    engine = memory_engine()
    names = [f"r{place}" for place in range(40)]
    for name in names:
        engine.add(name, prompt=60, output=OUTPUT, structured=True)
    engine.steps(3)
    assert engine.running == [] and len(engine.scheduler.skipped_waiting) > 0
    engine.steps(30)
    assert 0 < let_through(engine) <= MEMORY_HOLDS
    assert engine.scheduler.admission_queue.held == 40 - let_through(engine)
    for name in names:
        engine.compile_grammar(name)
    engine.run()
    assert Counter(request.num_output_tokens for request in engine.finished.values()) == {OUTPUT: 40}
    assert telemetry(engine).counters.preemptions == 0


def test_requests_that_cannot_start_keep_their_memory():
    engine = memory_engine()
    for place in range(5):
        engine.add(f"s{place}", prompt=60, output=OUTPUT, structured=True)
    engine.steps(2)
    for place in range(20):
        engine.add(f"r{place}", prompt=60, output=OUTPUT)
    engine.steps(20)
    assert len(engine.scheduler.skipped_waiting) == 5
    assert 0 < len(engine.running) <= MEMORY_HOLDS - 5
    for place in range(5):
        engine.compile_grammar(f"s{place}")
    engine.run()
    assert telemetry(engine).counters.preemptions == 0


def test_requests_that_wait_for_an_adapter_hold_the_memory_that_they_will_need():
    """At max_loras=1 the requests of one adapter run, while those of the other wait, held or released."""
    engine = memory_engine(enable_lora=True, max_loras=1)
    for place in range(40):
        request = engine.add(f"r{place}", prompt=60, output=OUTPUT)
        adapter = 1 + place % 2
        request.lora_request = LoRARequest(f"adapter{adapter}", adapter, f"/adapters/{adapter}")
    engine.steps(3)
    scheduler, most = engine.scheduler, 0
    assert len(scheduler.skipped_waiting) > 0, "the second adapter's"
    while scheduler.has_unfinished_requests():
        assert len({request.lora_request.lora_int_id for request in scheduler.running}) <= 1
        most = max(most, let_through(engine))
        engine.step()
        assert engine.now_s < 100
    # Some more than memory holds of full length, as some end before others have grown.
    assert 1 < most <= MEMORY_HOLDS * 4 / 3
    assert Counter(request.num_output_tokens for request in engine.finished.values()) == {OUTPUT: 40}
    assert telemetry(engine).counters.preemptions == 0


# Slots.


def test_no_more_requests_are_let_through_than_the_engine_has_slots():
    """Released requests could no longer be rejected; held ones that are late are."""
    engine = memory_engine(blocks=1024, thresholds=fluid(kv_limit_tokens=1023 * BLOCK, ttft_s=0.8), max_num_seqs=4)
    for place in range(40):
        engine.add(f"r{place}", prompt=60, output=OUTPUT)
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        assert let_through(engine) - len(rejected(engine) & engine.requests.keys()) <= 4
        assert engine.scheduler.admission_queue.released + len(engine.scheduler.skipped_waiting) == 0
        assert engine.now_s < 10
    assert len(engine.finished) + len(rejected(engine)) == 40
    assert 4 < len(engine.finished) < 40, "the rest was late in the admission queue and was rejected"


@pytest.mark.parametrize("structured", [False, True])
def test_requests_that_cannot_start_take_slots(structured):
    engine = memory_engine(blocks=1024, thresholds=fluid(kv_limit_tokens=1023 * BLOCK), max_num_seqs=4)
    for place in range(40):
        engine.add(f"r{place}", prompt=60, output=OUTPUT, structured=structured)
    engine.steps(10)
    assert (let_through(engine), engine.scheduler.admission_queue.held) == (4, 36)


# Prefix caching.

SHARED, PROMPT = 480, 500


def with_prefix_caching(enabled):
    """40 requests share all but their last 20 tokens with one that came before; iterations take what they compute."""
    params = fluid(kv_limit_tokens=1023 * BLOCK, iteration_s=0.05, ttft_s=0.4, prompt_flow_tokens=400.0)
    engine = Engine(blocks=1024, thresholds=params, enable_prefix_caching=enabled)
    shared = list(range(1000, 1000 + SHARED))
    engine.add("first", prompt=[*shared, *[1] * (PROMPT - SHARED)], output=200)
    engine.steps(5)
    for place in range(40):
        engine.add(f"r{place}", prompt=[*shared, *[10 + place] * (PROMPT - SHARED)], output=OUTPUT)
    engine.run()
    return engine


def test_prompts_that_the_cache_holds_are_early():
    cached, computed = with_prefix_caching(True), with_prefix_caching(False)
    assert len(rejected(computed)) >= 10
    assert len(rejected(cached)) <= len(rejected(computed)) / 4
    assert len(cached.finished) + len(rejected(cached)) == 41


def test_finished_records_tell_what_the_cache_held():
    records = [record for record in telemetry(with_prefix_caching(True)).finished if not record.aborted]
    cached = Counter((record.cached_tokens, record.shared_tokens) for record in records)
    assert cached.pop((0, 0)) == 1, "the first"
    assert cached.keys() == {(SHARED, SHARED)}, "while the first runs, all of it is in blocks that it holds"
    plain = telemetry(with_prefix_caching(False)).finished
    assert {(record.cached_tokens, record.shared_tokens) for record in plain} == {(0, 0)}


def test_what_the_cache_holds_of_a_request_that_has_ended_is_cached_and_not_shared():
    engine = Engine(thresholds=fluid(kv_limit_tokens=255 * BLOCK), enable_prefix_caching=True)
    prompt = list(range(100))
    for name in ("first", "second"):
        engine.add(name, prompt=prompt, output=2)
        engine.run()
    first, second = telemetry(engine).finished
    assert (first.cached_tokens, first.shared_tokens) == (0, 0)
    assert (second.cached_tokens, second.shared_tokens) == (96, 0), "six whole blocks of 16"
    stats = engine.scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (200, 96), "which the request routers read"


# What the engine tells of requests that ended.


def test_finished_records_tell_the_times_of_their_tokens():
    """Two slots. A token comes one step after its iteration was scheduled, an ended request's slot is free one later.

    r0 has its tokens at 0.01 … 0.05, r1 at 0.02 … 0.10; r2 is scheduled at 0.06, and r3, after its one token, at 0.08.
    """
    engine = memory_engine(max_num_seqs=2)
    engine.now_s = 100.0
    for place, output in enumerate((5, 9, 1, 6)):
        engine.add(f"r{place}", prompt=60, output=output)
        engine.step()
    engine.run()
    records = {record.output_tokens: record for record in telemetry(engine).finished}
    assert {output: record.ttft_s for output, record in records.items()} == pytest.approx(
        {5: STEP_S, 9: STEP_S, 1: 5 * STEP_S, 6: 6 * STEP_S}
    )
    assert records[1].tpot_s is None, "a single token has no next one"
    assert [records[output].tpot_s for output in (5, 9, 6)] == pytest.approx([STEP_S] * 3)


def test_a_pause_between_tokens_is_part_of_their_time():
    engine = memory_engine()
    engine.add("r", prompt=60, output=11)
    engine.steps(4)
    engine.now_s += 1.0
    engine.run()
    (record,) = telemetry(engine).finished
    assert (record.ttft_s, record.tpot_s) == (pytest.approx(STEP_S), pytest.approx(STEP_S + 1.0 / 10))


def test_the_way_from_the_api_process_counts_in_the_time_to_the_first_token_and_as_waiting():
    """Tokenizing, and the iteration under way when the request came, are part of what its client waits."""
    engine = memory_engine(thresholds=fluid(kv_limit_tokens=63 * BLOCK, ttft_s=0.5))
    engine.now_s = 100.0
    engine.add("late", prompt=60, output=5, on_its_way_s=0.6)
    engine.add("r", prompt=60, output=5, on_its_way_s=0.3)
    assert [waiting.since_s for waiting in engine.scheduler.admission_queue.views()["unknown"].aged()] == pytest.approx(
        [99.4, 99.7]
    )
    engine.run()
    assert rejected(engine) == {"late"}
    assert [record.ttft_s for record in telemetry(engine).finished if not record.aborted] == [
        pytest.approx(0.3 + STEP_S)
    ]


@pytest.mark.parametrize("on_its_way_s", [-5.0, 3600.0])
def test_a_clock_of_another_machine_counts_for_nothing(on_its_way_s):
    engine = memory_engine(thresholds=fluid(kv_limit_tokens=63 * BLOCK, ttft_s=0.5))
    engine.now_s = 100.0
    engine.add("r", prompt=60, output=5, on_its_way_s=on_its_way_s)
    engine.run()
    (record,) = telemetry(engine).finished
    assert record.ttft_s == pytest.approx(STEP_S)


def test_a_request_without_a_token_has_no_times():
    engine = memory_engine()
    engine.add("gone", prompt=60)
    engine.abort("gone")
    (record,) = telemetry(engine).finished
    assert (record.ttft_s, record.tpot_s, record.aborted) == (None, None, True)


# Prompts in progress.


def test_prompts_that_are_let_through_count_as_prompts_in_progress():
    engine = memory_engine()
    engine.add("s0", prompt=60, output=OUTPUT, structured=True)
    engine.add("s1", prompt=40, output=OUTPUT, structured=True)
    assert snapshot(engine).prompt_backlog_tokens == 0, "held ones are not in progress"
    engine.step()
    assert len(engine.scheduler.skipped_waiting) == 2
    assert snapshot(engine).prompt_backlog_tokens == 100
    engine.compile_grammar("s0")
    engine.compile_grammar("s1")
    engine.steps(3)
    assert snapshot(engine).prompt_backlog_tokens == 0


def test_a_prompt_computed_in_chunks_counts_with_what_is_left_of_it():
    engine = Engine(thresholds=fluid(kv_limit_tokens=255 * BLOCK), max_num_batched_tokens=64)
    engine.add("long", prompt=200, output=OUTPUT)
    left = []
    for _ in range(4):
        engine.step()
        left.append(snapshot(engine).prompt_backlog_tokens)
    assert left == [136, 72, 8, 0]


def test_what_a_preempted_request_computes_again_counts_as_a_prompt_in_progress():
    """Its prompt and its output so far are computed anew."""
    engine = Engine(blocks=15, thresholds=fluid(kv_limit_tokens=10**6))
    for place in range(3):
        engine.add(f"r{place}", prompt=60, output=OUTPUT)
    seen = 0
    for _ in range(400):
        engine.step()
        again = [r for r in engine.requests.values() if r.status == RequestStatus.PREEMPTED]
        if again:
            seen += 1
            expected = sum(request.num_prompt_tokens + request.num_output_tokens for request in again)
            assert snapshot(engine).prompt_backlog_tokens == expected
            assert snapshot(engine).released == len(again)
    assert seen > 0 and len(engine.finished) == 3


# Thresholds that lapse.


def test_thresholds_that_lapse_build_no_new_policy(monkeypatch):
    """The loop of the engine is where they lapse: a policy's tables take it tens of milliseconds."""
    engine = memory_engine()
    engine.add("busy", prompt=60, output=200)
    engine.step()
    configured = engine.scheduler.active.current()
    assert engine.apply({"version": 1, "valid_for_s": 0.035, **fluid(kv_limit_tokens=500)}).accepted
    engine.step()
    assert engine.scheduler.active.current().policy is not configured.policy
    built = []
    monkeypatch.setattr(engine.scheduler.active, "_policy_of", built.append)
    engine.steps(6)
    lapsed = engine.scheduler.active.current()
    assert lapsed.from_config and lapsed.policy is configured.policy and lapsed.thresholds.version == 1
    assert not built


# Preemption with prefix caching.


def shared_tokens(engine, name):
    return engine.scheduler._lives[name].shared_tokens


def test_a_preempted_request_that_resumes_shares_what_others_hold_then():
    """Memory runs out under b, which shares a prefix with a; when b resumes, a has ended."""
    prefix = [1] * (4 * BLOCK)
    engine = memory_engine(blocks=12, thresholds=fluid(kv_limit_tokens=10_000), enable_prefix_caching=True)
    engine.add("a", prompt=prefix + [2] * (2 * BLOCK), output=60)
    engine.step()
    engine.add("b", prompt=prefix + [3] * (2 * BLOCK), output=40)
    while "b" not in engine.running:
        engine.step()
    assert shared_tokens(engine, "b") == len(prefix)
    while engine.running != ["b"]:
        engine.step()
    assert telemetry(engine).counters.preemptions > 0
    assert shared_tokens(engine, "b") == 0, "no other request holds the prefix now"
    engine.run()
    assert engine.finished.keys() == {"a", "b"}


@pytest.mark.parametrize("scheduling_policy", ["fcfs", "priority"])
def test_through_preemptions_no_memory_is_counted_twice(scheduling_policy):
    """What the policy takes for private, with what it takes for shared, is what vLLM has allocated."""
    rng = random.Random(1)
    engine = memory_engine(
        blocks=40, thresholds=fluid(kv_limit_tokens=10_000), enable_prefix_caching=True,
        scheduling_policy=scheduling_policy,
    )
    for number in range(24):
        prompt = [1 + number % 3] * (4 * BLOCK) + [10 + number] * rng.randint(1, 3 * BLOCK)
        engine.add(f"r{number}", prompt=prompt, output=rng.randint(10, 80), priority=rng.randint(0, 3))
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        seen = snapshot(engine)
        private = sum(seen.running.kv_tokens()) - sum(seen.running.shared_kv_tokens())
        assert private <= seen.kv_used_tokens + BLOCK * len(seen.running)
    assert telemetry(engine).counters.preemptions > 5
    assert snapshot(engine).kv_used_tokens == 0 and len(engine.finished) == 24
