"""What is known of waiting prompts in the prefix cache, on vLLM's real block manager."""

from __future__ import annotations

from engine_harness import BLOCK, Engine

from scheduler.engine import prefix_hits

LONG = [3] * (8 * BLOCK) + [4] * (8 * BLOCK) + [9]


def engine(blocks: int = 256) -> Engine:
    held = {"policy": "fcfs", "max_running": 1}
    return Engine(blocks=blocks, thresholds=held, enable_prefix_caching=True)


def cached_tokens(served: Engine, name: str, iterations: int = 1) -> int:
    hits = served.scheduler._prefixes
    for _ in range(iterations):
        hits.step()
    return hits.of(served.requests[name])[0]


def walks(served: Engine) -> list[str]:
    """The names of the requests of which all blocks are walked from now on."""
    walked, look_up = [], served.scheduler.kv_cache_manager.get_computed_blocks

    def noted(request):
        walked.append(request.request_id)
        return look_up(request)

    served.scheduler.kv_cache_manager.get_computed_blocks = noted
    return walked


def one_waits(served: Engine) -> None:
    """A request with the long prompt waits behind one that runs."""
    served.add("runs", prompt=[1] * BLOCK, output=900)
    served.step()
    served.add("waits", prompt=LONG, output=2)


def serve(served: Engine, name: str, prompt: list[int]) -> None:
    served.add(name, prompt=prompt, output=2)
    while name not in served.finished:
        served.step()


def test_a_prefix_that_grows_while_a_request_waits_is_seen_when_it_is_asked_again():
    served = engine()
    serve(served, "half", LONG[: 8 * BLOCK] + [5] * 4)
    one_waits(served)
    assert cached_tokens(served, "waits") == 8 * BLOCK
    served.scheduler.admission_queue.let_through(served.add("whole", prompt=LONG, output=2))
    while "whole" not in served.finished:
        served.step()
    assert cached_tokens(served, "waits") == 8 * BLOCK, "known for a few iterations"
    assert cached_tokens(served, "waits", prefix_hits._ASK_AGAIN) == 16 * BLOCK


def test_a_prefix_that_is_evicted_while_a_request_waits_is_seen_when_it_is_asked_again():
    served = engine()
    serve(served, "whole", LONG)
    one_waits(served)
    assert cached_tokens(served, "waits") == 16 * BLOCK
    served.scheduler.kv_cache_manager.block_pool.evict_blocks(
        {block.block_id for block in served.scheduler.kv_cache_manager.get_computed_blocks(
            served.requests["waits"])[0].blocks[0][4:]}
    )
    assert cached_tokens(served, "waits") == 16 * BLOCK, "known for a few iterations"
    assert cached_tokens(served, "waits", prefix_hits._ASK_AGAIN) == 4 * BLOCK


def test_all_blocks_are_walked_seldom_while_nothing_changes():
    served = engine()
    serve(served, "whole", LONG)
    one_waits(served)
    cached_tokens(served, "waits", prefix_hits._WALK_AGAIN)
    walked = walks(served)
    for _ in range(prefix_hits._WALK_AGAIN - 1):
        assert cached_tokens(served, "waits") == 16 * BLOCK
    assert walked == [], "a look at the last block says as much"
    cached_tokens(served, "waits", prefix_hits._ASK_AGAIN)
    assert walked == ["waits"], "who holds the blocks is found by walking only"
