"""The overload rules of others, at their documented defaults."""

from __future__ import annotations

from dataclasses import replace

from scheduler.model.iteration_time import IterationTimeModel
from simulator.scenario.admission_baselines import ReplicaLoad, dynamo_busy, llm_d_utilisation, queued_tokens

QUIET = ReplicaLoad(
    waiting=0, prefill_tokens=0, kv_used_fraction=0.1, time_model=IterationTimeModel(0.004, 4e-7, 1e-4), ttft_s=3.0
)


def test_every_door_is_open_when_it_is_quiet() -> None:
    assert all(rule(QUIET) for rule in (queued_tokens, llm_d_utilisation, dynamo_busy))


def test_queued_tokens_close_at_what_the_target_leaves_time_for() -> None:
    assert queued_tokens(replace(QUIET, prefill_tokens=29_000))
    assert not queued_tokens(replace(QUIET, prefill_tokens=30_001))
    assert queued_tokens(replace(QUIET, prefill_tokens=10**9, ttft_s=None))


def test_llm_d_closes_on_its_queue_or_its_cache() -> None:
    assert llm_d_utilisation(replace(QUIET, waiting=4, kv_used_fraction=0.79))
    assert not llm_d_utilisation(replace(QUIET, waiting=5))
    assert not llm_d_utilisation(replace(QUIET, kv_used_fraction=0.8))


def test_dynamo_closes_on_its_blocks_or_its_prefill_tokens() -> None:
    assert dynamo_busy(replace(QUIET, kv_used_fraction=0.85, prefill_tokens=10_000))
    assert not dynamo_busy(replace(QUIET, kv_used_fraction=0.86))
    assert not dynamo_busy(replace(QUIET, prefill_tokens=10_001))
