"""Models whose layers are of several kinds, on vLLM's real block pool."""

import pytest
from engine_harness import Engine, add_many, fluid_params, telemetry
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from simulator.engine import vllm_harness

BLOCKS, BLOCK = 1024, 16


@pytest.fixture
def windows(monkeypatch):
    """Groups of sliding windows beside one of full attention: so many, of so many tokens."""

    def layers(number, tokens):
        def groups(num_blocks, kv_cache_tensors, kv_cache_groups):
            full = kv_cache_groups[0].kv_cache_spec
            window = SlidingWindowSpec(
                block_size=full.block_size, num_kv_heads=full.num_kv_heads, head_size=full.head_size,
                dtype=full.dtype, sliding_window=tokens,
            )
            more = [KVCacheGroupSpec([f"window {one}"], window) for one in range(number)]
            return KVCacheConfig(
                num_blocks=num_blocks, kv_cache_tensors=kv_cache_tensors, kv_cache_groups=[*kv_cache_groups, *more]
            )

        monkeypatch.setattr(vllm_harness, "KVCacheConfig", groups)

    return layers


def engine(kv_limit_tokens=10**9):
    law = fluid_params(survival=[[0, 1.0], [199, 1.0], [200, 0.0]]) | {"kv_limit_tokens": kv_limit_tokens}
    return Engine(
        blocks=BLOCKS, thresholds={"policy": "fluid", "fluid": law}, max_num_seqs=256, max_num_batched_tokens=2048,
        max_model_len=2048,
    )


def test_one_kind_of_layer_holds_a_token_a_place():
    assert telemetry(engine()).limits.kv_capacity_tokens == BLOCKS * BLOCK


def test_short_windows_cost_little(windows):
    windows(1, 128)  # as gpt-oss
    served = engine()
    assert telemetry(served).limits.kv_capacity_tokens == pytest.approx(BLOCKS * BLOCK * 64 / (64 + 9), rel=0.02)
    config = served.scheduler.vllm_config
    assert (config.model_config.max_model_len, config.scheduler_config.max_num_batched_tokens) == (2048, 2048)


def test_blocks_of_every_kind_of_layer_count(windows):
    """Every token was taken for one in one block, where it takes six: requests were preempted again and again."""
    windows(5, 1024)  # as Gemma 3
    capacity = telemetry(engine()).limits.kv_capacity_tokens
    assert capacity == pytest.approx(BLOCKS * BLOCK / 6, rel=0.02)
    served = engine(capacity - BLOCK)  # as the controller's plan has it
    add_many(served, 60, prompt=100, output=200)
    served.run()
    counters = telemetry(served).counters
    assert (counters.completed, counters.preemptions) == (60, 0)
