"""The last quarter of an hour of an engine: what a point counts, where counting begins, and what is forgotten."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from synthetic_engine import LIMITS

from cluster.history import KEPT_POINTS, KEPT_S, History
from scheduler.messages import Counters, Finished, Gauges, Iteration, Telemetry
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.thresholds import Thresholds
from scheduler.tuning.slo import Slo

MODEL = IterationTimeModel(d0_s=0.02, d1_s_per_kv_token=0.0)
TARGETS = Slo(ttft_s=1.0, tpot_s=0.1)
EMPTY = Telemetry(
    engine_id="e", clock_s=100.0, cursor=0, limits=LIMITS, thresholds=Thresholds(max_running=32), from_config=False,
    gauges=Gauges(), counters=Counters(),
)


def done(seq: int, *, ttft_s: float | None, tpot_s: float | None, aborted: bool = False) -> Finished:
    return Finished(seq, 0.0, 10, 11, aborted, ttft_s=ttft_s, tpot_s=tpot_s)


def observe(history: History, at_unix_s: float, telemetry: Telemetry, targets: Slo = TARGETS, **shown: Any) -> None:
    history.observe("a", "m", at_unix_s, telemetry, targets=targets, predicted_by=MODEL, shown=shown)


def test_a_point_counts_what_happened_since_the_report_before() -> None:
    history = History()
    observe(history, 5.0, replace(EMPTY, counters=Counters(arrivals=100, completed=90, rejected=2)))
    assert history.columns()["a"]["at_unix_s"] == [], "requests of before are not of this point"
    observe(history, 10.0, replace(
        EMPTY, clock_s=104.0, cursor=9, gauges=Gauges(running=8, waiting=2, kv_used_tokens=1000),
        counters=Counters(
            arrivals=120, completed=94, good=2, rejected=7, rejected_too_late=3, rejected_front_door=2, recalled=1,
            audited=2, audited_met=1, iterations=2,
        ),
        iterations=(Iteration(1, 0.0, 0.03, 0, 8, 0, 8), Iteration(2, 0.0, 0.01, 0, 8, 0, 8)),
        finished=(
            done(3, ttft_s=0.5, tpot_s=0.05), done(4, ttft_s=2.0, tpot_s=0.05), done(5, ttft_s=0.5, tpot_s=0.2),
            done(6, ttft_s=0.7, tpot_s=None), done(7, ttft_s=None, tpot_s=None, aborted=True),
        ),
    ), fluid={"memory_tokens": 900.0}, forecast={"capacity_rps": 3.0})
    (point,) = (dict(zip(columns, values, strict=True)) for columns, values in [(
        [key for key in history.columns()["a"] if key != "model"],
        [values[0] for key, values in history.columns()["a"].items() if key != "model"],
    )])
    assert (point["seconds"], point["arrivals"], point["rejected"], point["completed"]) == (4.0, 20, 5, 4)
    assert point["admitted"] == 20 - 5 - 1 - 2, "neither rejected, nor sent back, nor waiting"
    assert [point[f"rejected_{why}"] for why in ("too_late", "queue_full", "front_door")] == [3, 0, 2]
    assert point["good"] == 2
    assert (point["audited"], point["audited_met"]) == (2, 1)
    assert point["iteration_s"] == pytest.approx(0.02) and point["predicted_s"] == pytest.approx(0.02)
    assert (point["ttft_s"], point["ttft_target_s"], point["tpot_target_s"]) == (0.6, 1.0, 0.1)
    assert (point["slots"], point["kv_planned_tokens"], point["capacity_rps"]) == (32, 900.0, 3.0)


def test_a_restarted_engine_begins_anew_and_a_report_seen_before_is_no_point() -> None:
    history = History()
    observe(history, 0.0, replace(EMPTY, counters=Counters(arrivals=50)))
    observe(history, 5.0, replace(EMPTY, clock_s=105.0, counters=Counters(arrivals=60)))
    observe(history, 10.0, replace(EMPTY, clock_s=105.0, counters=Counters(arrivals=60)))
    observe(history, 15.0, replace(EMPTY, engine_id="f", clock_s=3.0, counters=Counters(arrivals=1)))
    observe(history, 20.0, replace(EMPTY, engine_id="f", clock_s=8.0, counters=Counters(arrivals=4)))
    assert history.columns()["a"]["at_unix_s"] == [5.0, 20.0]
    assert history.columns()["a"]["arrivals"] == [10, 3]


def test_only_a_quarter_of_an_hour_is_kept_and_a_reader_asks_for_what_is_new() -> None:
    history = History()
    for number in range(1000):
        observe(history, float(number), replace(EMPTY, clock_s=100.0 + number, counters=Counters(arrivals=number)))
    assert len(history.columns()["a"]["at_unix_s"]) == KEPT_POINTS
    assert history.columns(997.0)["a"]["at_unix_s"] == [998.0, 999.0]
    assert history.recent("a", 10.0)["arrivals"] == 10
    history.keep_only(999.0 + KEPT_S - 1.5)
    assert history.columns()["a"]["at_unix_s"] == [998.0, 999.0]
    history.keep_only(2001.0 + KEPT_S)
    assert history.columns() == {}, "an engine that is gone is forgotten"
    assert history.recent("a", 10.0)["arrivals"] == 0
    observe(history, 3000.0, EMPTY)
    history.keep_only(3001.0 + KEPT_S)
    assert history.columns() == {}, "also one that reported once only"


def test_an_engine_with_requests_and_without_iterations_stands_still() -> None:
    history, busy = History(), Gauges(running=3)
    observe(history, 0.0, replace(EMPTY, gauges=busy, counters=Counters(iterations=7)))
    for number in (1, 2):
        observe(history, 5.0 * number, replace(
            EMPTY, clock_s=100.0 + 5 * number, gauges=busy, counters=Counters(iterations=7)
        ))
    assert history.still_s("a") == 10.0
    observe(history, 15.0, replace(EMPTY, clock_s=115.0, gauges=busy, counters=Counters(iterations=8)))
    assert history.still_s("a") == 0.0
    observe(history, 20.0, replace(EMPTY, clock_s=120.0, counters=Counters(iterations=8)))
    assert history.still_s("a") == 0.0, "an idle one runs none either"
