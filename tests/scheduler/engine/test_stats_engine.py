"""The stats question to a serving engine: numbers, and nothing that grows with its requests."""

from __future__ import annotations

import pytest
from engine_harness import Engine, add_many

from scheduler.messages import Report, Stats


class NotToBeWalked(dict):
    """Requests that fail whatever goes through all of them."""

    def __iter__(self):
        raise AssertionError("the requests were walked")

    keys = values = items = __iter__


def test_stats_count_running_and_waiting_requests_under_the_active_cap():
    engine = Engine(thresholds={"policy": "fcfs", "max_running": 3})
    add_many(engine, 5, prompt=32, output=8)
    engine.step()
    stats, limits = engine.scheduler.stats(), engine.scheduler.active.limits
    assert stats == Stats(
        engine_id=stats.engine_id, slots=3, running=3, waiting=2, kv_used_tokens=stats.kv_used_tokens,
        kv_capacity_tokens=limits.kv_capacity_tokens, thresholds_version=0, steps=1, prompt_tokens=96,
    )
    assert 0 < stats.kv_used_fraction < 1
    assert engine.apply({"version": 4, "policy": "fcfs"}).accepted
    engine.step()
    assert engine.scheduler.stats().steps == 2
    assert (engine.scheduler.stats().slots, engine.scheduler.stats().thresholds_version) == (limits.max_num_seqs, 4)


def test_neither_stats_nor_telemetry_without_records_walk_the_requests():
    engine = Engine()
    add_many(engine, 5, prompt=32, output=8)
    engine.step()
    full, requests = engine.scheduler.telemetry(Report()), engine.scheduler.requests
    assert len(full.running) == 5
    engine.scheduler.requests = NotToBeWalked(requests)
    with pytest.raises(AssertionError, match="walked"):
        engine.scheduler.telemetry(Report())
    stats, bare = engine.scheduler.stats(), engine.scheduler.telemetry(Report(cursor=None))
    assert stats.running == bare.gauges.running == 5
    assert bare.running == bare.iterations == bare.arrivals == bare.finished == ()
    assert (bare.counters, bare.thresholds, bare.limits) == (full.counters, full.thresholds, full.limits)
