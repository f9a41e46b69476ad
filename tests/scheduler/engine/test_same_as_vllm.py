"""Without thresholds the schedule is vLLM's own, batch by batch; under any thresholds every request finishes."""

import random

import pytest
from engine_harness import BLOCK, MAX_MODEL_LEN, Engine, telemetry
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

# The same as vLLM's own scheduler when nothing is asked of us.


def random_workload(rng, *, requests=40, longest_prompt=200, longest_output=60, steps=60, priorities=False):
    """Requests by the step at which they come."""
    coming = {}
    for place in range(requests):
        output = rng.randint(1, longest_output)
        shared, own = [rng.randint(3, 6)] * BLOCK, [rng.randint(3, 999) for _ in range(rng.randint(1, longest_prompt))]
        request = {
            "prompt": shared + own,
            "output": output,
            "max_tokens": rng.choice([None, output + rng.randint(1, 200), MAX_MODEL_LEN - len(shared + own)]),
            "priority": rng.randint(0, 2) if priorities else 0,
        }
        coming.setdefault(rng.randrange(steps), []).append((f"r{place}", request))
    return coming


def play(engine, coming, *, each_step=lambda engine, step: None, most_steps=6000):
    """Feed a workload, then run to the end."""
    for step in range(max(coming) + 1):
        for name, request in coming.get(step, ()):
            engine.add(name, **request)
        each_step(engine, step)
        engine.step()
    step = max(coming)
    while engine.scheduler.has_unfinished_requests():
        step += 1
        assert step < most_steps, f"starved: {sorted(engine.requests)}"
        each_step(engine, step)
        engine.step()
    engine.run()
    return engine


ENGINES = {
    "roomy": {},
    "small memory": {"blocks": 40},
    "small memory, prefix caching": {"blocks": 40, "enable_prefix_caching": True},
    "priority": {"blocks": 40, "scheduling_policy": "priority"},
    "small chunks": {"max_num_batched_tokens": 64, "max_num_seqs": 16},
    "prompt chunks limited": {"long_prefill_token_threshold": 48},
    "no chunked prefill": {
        "enable_chunked_prefill": False, "max_num_batched_tokens": MAX_MODEL_LEN, "blocks": 60,
    },
}


@pytest.mark.parametrize("name", ENGINES)
def test_fcfs_without_a_cap_schedules_exactly_as_vllm_does(name):
    for seed in range(4):
        coming = random_workload(random.Random(seed), priorities=name == "priority")
        preemptions = []
        engines = [Engine(AsyncScheduler, **ENGINES[name]), Engine(thresholds={"policy": "fcfs"}, **ENGINES[name])]
        for engine in engines:
            play(engine, coming)
            preemptions.append({name: request.num_preemptions for name, request in engine.finished.items()})
        theirs, ours = engines
        assert [list(batch.items()) for batch in ours.batches] == [list(batch.items()) for batch in theirs.batches]
        assert preemptions[0] == preemptions[1] and ours.finished_s == theirs.finished_s
        assert len(ours.finished) == 40
        if "small memory" in name:
            assert sum(preemptions[0].values()), "the case was meant to preempt"
            assert telemetry(ours).counters.preemptions == sum(preemptions[1].values())


# No request starves, none is lost.


def random_thresholds(rng, slots):
    most = rng.randint(1, slots)
    ends = sorted(rng.sample(range(1, 40), rng.randint(0, 3)))
    n = sorted((rng.randint(1, most) for _ in ends), reverse=True)
    return {
        "policy": rng.choice(["fcfs", "wait", "nested_wait"]),
        "types": [
            {"name": "short", "n": rng.randint(1, most), "max_output_tokens": rng.randint(1, 40)},
            {"name": "rest", "n": rng.randint(1, most)},
        ][: rng.randint(0, 2)],
        "segments": [
            {"end_output_tokens": end, "total": count * (end - start)}
            for start, end, count in zip((0, *ends), ends, n, strict=False)
        ],
        "max_running": rng.choice([None, most, slots]),
        "token_budget": rng.choice([None, None, 1, 16, 60]),
        "max_hold_s": rng.choice([0.0, 0.02, 0.2, 2.0]),
        "valid_for_s": rng.choice([None, 0.1, 1.0]),
    }


@pytest.mark.parametrize("name", ENGINES)
def test_every_request_finishes_whatever_the_thresholds(name):
    """Thresholds that change while serving, aborts: every answer has its length, and all memory comes back."""
    for seed in range(6):
        rng = random.Random(1000 + seed)
        fields = ENGINES[name]
        slots = min(fields.get("max_num_seqs", 64), fields.get("blocks", 256))
        coming = random_workload(rng, longest_output=50, priorities=name == "priority")
        engine = Engine(thresholds=random_thresholds(rng, slots), **fields)
        limits = engine.scheduler.active.limits
        aborted, changes = set(), 0
        running = 0

        def each_step(engine, step, rng=rng, aborted=aborted, slots=slots, limits=limits):
            nonlocal changes, running
            scheduler = engine.scheduler
            if step and engine.batches:
                thresholds = scheduler._obeyed.thresholds
                taken = (
                    len(scheduler.running) + scheduler.admission_queue.released + len(scheduler.skipped_waiting)
                )
                assert len(scheduler.running) <= limits.max_num_seqs
                if thresholds.max_running:
                    assert taken <= max(thresholds.max_running, running), "admitted beyond the cap"
                computed, budget = sum(engine.batches[-1].values()), thresholds.token_budget
                assert computed <= limits.max_num_batched_tokens
                if budget and scheduler.scheduler_config.enable_chunked_prefill:
                    assert computed <= max(budget, running)
            if rng.random() < 0.05 and engine.requests:
                victim = rng.choice(sorted(engine.requests))
                engine.abort(victim)
                aborted.add(victim)
            if rng.random() < 0.1:
                changes += engine.apply(random_thresholds(rng, slots)).accepted
            running = (
                len(scheduler.running) + scheduler.admission_queue.released + len(scheduler.skipped_waiting)
            )

        play(engine, coming, each_step=each_step)
        assert changes > 3
        asked = {name: request for requests in coming.values() for name, request in requests}
        assert engine.finished.keys() | aborted == asked.keys() and not engine.finished.keys() & aborted
        for request_id, request in engine.finished.items():
            assert request.num_output_tokens == asked[request_id]["output"], "a token was lost or made up"
        scheduler = engine.scheduler
        assert scheduler.kv_cache_manager.usage == 0.0 and not scheduler.requests and not scheduler.running
        assert (
            len(scheduler.waiting) == 0
            and not scheduler.admission_queue._type_of
            and not scheduler.admission_queue._since_s
        )
        counters = telemetry(engine).counters
        assert (counters.arrivals, counters.completed, counters.aborted) == (40, 40 - len(aborted), len(aborted))
        assert not scheduler._timer.busy, "every iteration was recorded"
