"""What an engine reports: iterations, arrivals, finished requests, gauges and counters."""

import math

import pytest
from engine_harness import BLOCK, MAX_MODEL_LEN, STEP_S, Engine, add_many, boundary_engine, telemetry, wait

from scheduler.messages import Arrival

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
    engine.deliver()  # no request is left
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
    assert engine.launch() == {}  # no request waits, so none moves
    engine.now_s = 1.0
    engine.add("b", output=3)
    assert engine.launch()
    engine.now_s += STEP_S
    while engine._in_flight:
        engine.deliver()
    assert telemetry(engine).iterations[-1].seconds == pytest.approx(STEP_S)


def test_iteration_records_leave_out_paused_requests():
    engine, _ = boundary_engine(max_hold_s=10.0)
    engine.steps(2)
    add_many(engine, 4, "young", output=12)
    engine.steps(4)  # `front` sits out in steps 4 and 5; the record of step 4 is there after step 5
    record = telemetry(engine).iterations[-1]
    assert (record.batch_size, record.decode_tokens, record.kv_tokens) == (4, 4, 4 * 34)


def test_speculative_tokens_are_decode_tokens():
    engine = Engine(
        drafts=3, speculative_config={"method": "ngram", "num_speculative_tokens": 3}, async_scheduling=False
    )
    engine.add("decode", output=20)
    for _ in range(2):
        engine.launch()
        engine.deliver()
    engine.add("prompt", prompt=100)
    assert engine.launch() == {"decode": 4, "prompt": 100}
    engine.deliver()
    record = telemetry(engine).iterations[-1]
    assert (record.prefill_tokens, record.decode_tokens, record.batch_size) == (100, 4, 2)


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


def test_finished_and_running_lengths():
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
    counters = telemetry(engine).counters
    assert counters.preemptions == preemptions > 0
    assert 41 * preemptions <= counters.recomputed_tokens <= 100 * preemptions, "prompt and the output so far"
    assert (counters.completed, counters.good) == (3, 3), "without a target each is good"


@pytest.mark.parametrize("runner", ["first", "second"])
def test_a_request_that_runs_again_is_not_a_new_one(runner):
    """vLLM's second model runner, its default where there is Triton, is sent a resumed request as a new one. Its prompt
    and its answer so far were counted as prompt again; found cached, they came to more than all prompts."""
    engine = Engine(blocks=96, thresholds={"policy": "fcfs"}, enable_prefix_caching=True)
    engine.scheduler.use_v2_model_runner = runner == "second"
    for number in range(30):
        engine.add(f"r{number}", prompt=[1000 + number] * 20, output=300)
    engine.run()
    report = telemetry(engine)
    assert report.counters.preemptions > 20 and report.counters.recomputed_tokens > 0
    assert (report.counters.prompt_tokens, report.counters.cached_tokens) == (30 * 20, 0)
    assert all(one.cached_tokens == 0 and one.shared_tokens <= 20 for one in report.finished)


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
