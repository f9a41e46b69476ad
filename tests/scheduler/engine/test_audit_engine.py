"""The two ways to be wrong, counted live: served though late, and rejected though in time (by a served sample)."""

from __future__ import annotations

import pytest
from engine_harness import Engine, add_many, fluid_params, telemetry


def overloaded(audit_share: float, **targets: float) -> Engine:
    """Eight requests where two run and two more may wait."""
    params = fluid_params(queue_limit=2, kv_limit_tokens=400, capacity_rps=1.0, **targets)
    engine = Engine(thresholds={"policy": "fluid", "fluid": params}, settings={"audit_share": audit_share})
    add_many(engine, 8, "r", prompt=100, output=20)
    engine.run()
    return engine


def test_without_an_audit_the_queue_s_tail_is_rejected():
    counters = telemetry(overloaded(0.0, ttft_s=5.0)).counters
    assert counters.rejected > 0
    assert (counters.audited, counters.audited_met) == (0, 0)


def test_an_audited_request_waits_for_its_turn_and_is_judged_at_its_end():
    """With a share of one, every rejection is audited: all are served, and those that met the target are counted."""
    generous = telemetry(overloaded(1.0, ttft_s=500.0)).counters
    assert (generous.rejected, generous.completed) == (0, 8)
    assert generous.audited == generous.audited_met > 0


def test_what_was_served_too_late_is_counted_by_target():
    engine = overloaded(1.0, ttft_s=500.0, tpot_s=1e-4, latency_s=500.0)
    counters = telemetry(engine).counters
    assert (counters.ttft_misses, counters.tpot_misses, counters.latency_misses) == (0, 8, 0)
    assert counters.audited_met == 0


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_sample_is_the_same_in_every_run(share: float):
    first, second = (telemetry(overloaded(share, ttft_s=5.0)).counters for _ in range(2))
    assert (first.audited, first.rejected) == (second.audited, second.rejected)
