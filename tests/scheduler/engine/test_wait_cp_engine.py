"""WAIT-CP on vLLM's real scheduler: chunks, the token gate and caps on segments."""


from engine_harness import Engine


def test_a_prompt_is_computed_in_chunks_and_the_token_gate_bounds_an_iteration():
    engine = Engine(thresholds={"policy": "wait_cp", "prefill_chunk_tokens": 256, "token_budget": 508})
    for name in ("a", "b", "c"):
        engine.add(name, prompt=600, output=3)
    assert engine.step() == {"a": 256, "b": 252}
    assert engine.step() == {"a": 256, "b": 252}
    engine.run()
    assert {request.num_output_tokens for request in engine.finished.values()} == {3}
    assert max(sum(batch.values()) for batch in engine.batches) <= 508


def test_a_chunk_set_live_holds_from_the_next_iteration_and_ends_with_its_thresholds():
    engine = Engine()
    engine.add("a", prompt=900, output=2)
    assert engine.step() == {"a": 512}
    assert engine.apply({"version": 1, "prefill_chunk_tokens": 100}).accepted
    assert engine.step() == {"a": 100}
    assert engine.apply({"version": 2}).accepted
    assert engine.step() == {"a": 288}


def test_the_engines_own_chunk_is_the_upper_bound():
    engine = Engine(thresholds={"prefill_chunk_tokens": 300}, long_prefill_token_threshold=128)
    engine.add("a", prompt=200, output=2)
    assert engine.steps(2) == [{"a": 128}, {"a": 72}]


def test_segment_caps_hold_on_the_engine():
    engine = Engine(thresholds={
        "policy": "wait_cp", "mode": "strict", "wait_gate": False, "max_running": 20,
        "segments": [{"end_output_tokens": 4, "total": 8}, {"end_output_tokens": 12, "total": 3}],
    }, settings={"allow_strict": True})
    for place in range(40):
        engine.add(f"r{place}", output=3 if place % 2 else 10)
    for _ in range(500):
        engine.step()
        running = engine.scheduler.running
        assert len(running) <= 20
        stages = [one.num_output_tokens + one.num_output_placeholders for one in running if not one.is_prefill_chunk]
        assert sum(stage > 4 for stage in stages) <= 3 and sum(stage < 4 for stage in stages) <= 8
    engine.run()
    assert len(engine.finished) == 40
