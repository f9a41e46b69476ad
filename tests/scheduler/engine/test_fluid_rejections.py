"""`fluid` in an engine under overload: the queue limit, memory, iteration time, and counters that add up."""

from dataclasses import replace

from engine_harness import BLOCK, STEP_S, Engine, add_many, fluid_params, telemetry
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from scheduler.model.iteration_time import IterationTimeModel
from scheduler.rejection import TOO_MANY, Rejection


def test_fluid_rejects_the_tail_beyond_the_queue_limit_with_a_retry_time():
    params = fluid_params(ttft_s=5.0, queue_limit=2, kv_limit_tokens=400, capacity_rps=1.0)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params})
    add_many(engine, 8, "r", prompt=100, output=50)
    engine.launch()
    engine.deliver()
    rejected = [answer for answer in engine.answers if answer.finish_reason is not None]
    assert all(answer.new_token_ids == [] for answer in rejected)
    # The oldest are served, the next two wait, and the others are rejected: they may come back once these are served.
    served = len(engine.running)
    assert 0 < served < 6
    for answer in rejected:
        sent = Rejection.of_answer(str(answer.finish_reason), answer.stop_reason)
        assert sent == Rejection.for_drain_time(TOO_MANY, served + 2.0, answer.request_id)
    assert engine.running == [f"r{place}" for place in range(served)]
    assert engine.scheduler.admission_queue.held == 2
    assert sorted(answer.request_id for answer in rejected) == [f"r{place}" for place in range(served + 2, 8)]


def test_fluid_never_overflows_memory_and_serves_all_requests_without_targets():
    thresholds = {"policy": "fluid", "fluid": fluid_params(kv_limit_tokens=63 * BLOCK)}
    engine = Engine(blocks=64, thresholds=thresholds)
    add_many(engine, 30, "r", prompt=60, output=50)
    engine.run()
    assert len(engine.finished) == 30
    assert telemetry(engine).counters.preemptions == 0


def test_fluid_keeps_the_iteration_within_its_time_without_slack():
    """At capacity later iterations regain nothing, so that there is no slack to use."""
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
    assert slowest <= STEP_S + 16 * time_model.d2_s_per_prefill_token  # prefills always progress
    assert len(engine.finished) == 60


def test_prefills_use_the_slack_of_running_requests():
    thresholds = {"policy": "fluid", "fluid": fluid_params(kv_limit_tokens=1023 * BLOCK, iteration_s=2 * STEP_S)}
    engine = Engine(blocks=1024, thresholds=thresholds)
    add_many(engine, 4, "r", prompt=20, output=50)
    engine.steps(30)
    engine.add("long", prompt=480, output=2)
    computed = max(batch.get("long", 0) for batch in engine.steps(3))
    assert computed == 480, "at 0.1 ms a token the planned time alone has room for 150"


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
        rejected |= {request.request_id for request, _ in engine.scheduler.rejector.undelivered}  # not delivered yet
        counters = telemetry(engine).counters
        assert counters == replace(
            counters, arrivals=arrived, completed=len(engine.finished), aborted=cut_short, rejected=len(rejected)
        )
        freed_late = sum(request.is_finished() for request in engine.scheduler.requests.values())
        assert counters.in_flight == len(engine.scheduler.requests) - freed_late


def test_urgent_requests_enter_first_and_the_others_are_rejected_first():
    params = fluid_params(ttft_s=5.0, queue_limit=2, kv_limit_tokens=400)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params}, scheduling_policy="priority")
    add_many(engine, 6, "later", prompt=100, output=50, priority=1)
    add_many(engine, 2, "urgent", prompt=100, output=50)
    engine.launch()
    assert engine.running[:2] == ["urgent0", "urgent1"]
    engine.deliver()
    assert all(answer.request_id.startswith("later") for answer in engine.answers if answer.stop_reason)


def test_fluid_starts_with_parameters_from_the_profile_and_the_targets():
    settings = {"profile": "a100-llama2-7b", "targets": {"ttft_s": 2.0, "tpot_s": 0.05}}
    engine = Engine(thresholds={"policy": "fluid"}, settings=settings)
    active = telemetry(engine).thresholds
    assert active.fluid.ttft_s == 2.0 and 0 < active.fluid.iteration_s <= 0.05
    assert "from the profile" in active.reason
    assert Engine(thresholds={"policy": "fluid"}).scheduler.active.current().thresholds.fluid is None
