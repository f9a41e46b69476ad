"""What a replica records of its engines: counters that add up, gauges that end with the engine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fake_meter import FakeMeter
from synthetic_engine import SyntheticEngine

from replicas import measured
from replicas.measured import EnginesMeter, RayMeter, RequestMeter, StateMeter, keep_telling, tenant_in
from scheduler.messages import Counters, Gauges, Telemetry
from scheduler.metrics import ALL, ENGINE, TPOT_SECONDS, WAITING_SECONDS, Kind
from scheduler.settings import TENANT

LABELS = {"model": "m", "replica": "a"}
BY_NAME = {metric.name: metric for metric in ALL}
SEEN = Counters(
    arrivals=20, completed=7, good=6, aborted=2, rejected=6, rejected_too_late=1, rejected_queue_full=2,
    rejected_front_door=3, recalled=1,
)


def telemetry(counters: Counters = SEEN, engine_id: str = "e1") -> Telemetry:
    return replace(SyntheticEngine(engine_id=engine_id).report(None), counters=counters, gauges=Gauges(running=4))


def test_the_outcomes_of_an_engine_add_up() -> None:
    meter = FakeMeter()
    StateMeter(meter, ENGINE, LABELS).record(telemetry().shown())

    def total(name: str) -> float:
        exposed = BY_NAME[f"headrace_{name}"].exposed
        return sum(value for (found, _), value in meter.values.items() if found == exposed)

    ended = sum(map(total, ("completed", "aborted", "rejected", "recalled")))
    assert total("arrivals") == ended + total("requests_in_flight") == 20
    assert meter.value(BY_NAME["headrace_rejected"], **LABELS, reason="front_door") == 3


def test_counters_grow_by_what_is_new_and_an_engine_s_successor_begins_at_nothing() -> None:
    meter = FakeMeter()
    engine = StateMeter(meter, ENGINE, LABELS)
    arrivals = BY_NAME["headrace_arrivals"]
    for counters, engine_id, expected in (
        (Counters(arrivals=5), "e1", 5), (Counters(arrivals=5), "e1", 5), (Counters(arrivals=9), "e1", 9),
        (Counters(arrivals=2), "e2", 11),
    ):
        engine.record(telemetry(counters, engine_id).shown())
        assert meter.value(arrivals, **LABELS) == expected


def test_a_silent_engine_is_recorded_as_such_and_its_gauges_no_more() -> None:
    meter = FakeMeter()
    silent = False

    async def ask(rank: int) -> Telemetry:
        if silent:
            raise TimeoutError
        return telemetry()

    engines = EnginesMeter("m", ["a"], ask, meter)
    asyncio.run(engines.tell())
    up, running = BY_NAME["headrace_engine_up"], BY_NAME["headrace_requests_running"]
    assert (meter.value(up, **LABELS), meter.value(running, **LABELS)) == (1, 4)
    silent = True
    meter.values.clear()
    asyncio.run(engines.tell())
    assert list(meter.values.values()) == [0] and meter.value(up, **LABELS) == 0


def test_each_rank_is_an_engine_of_its_own() -> None:
    meter = FakeMeter()

    async def ask(rank: int) -> Telemetry:
        return telemetry(Counters(arrivals=rank + 1))

    asyncio.run(EnginesMeter("m", ["a#0", "a#1"], ask, meter).tell())
    arrivals = BY_NAME["headrace_arrivals"]
    assert [meter.value(arrivals, model="m", replica=f"a#{rank}") for rank in (0, 1)] == [1, 2]


def test_a_request_s_times_are_those_of_its_tenant() -> None:
    meter = FakeMeter()
    requests = RequestMeter("m", meter)
    requests.record(tenant_in(SimpleNamespace(vllm_xargs={TENANT: "red"})), 0.25, 0.05)
    requests.record(tenant_in(SimpleNamespace(vllm_xargs=None)), 0.5, None)
    assert meter.seconds(WAITING_SECONDS, model="m", tenant="red") == [0.25]
    assert meter.seconds(TPOT_SECONDS, model="m", tenant="red") == [0.05]
    assert meter.seconds(WAITING_SECONDS, model="m", tenant="none") == [0.5]
    assert not meter.seconds(TPOT_SECONDS, model="m", tenant="none"), "a single token has no TPOT"


def test_telling_goes_on_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    tries = 0

    async def tell() -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise RuntimeError("busy")
        if tries == 5:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(keep_telling(tell, every_s=0.0))
    assert len([record for record in caplog.records if "busy" in record.message]) == 1, "said once"


def test_ray_gets_each_kind_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []
    calls: list[tuple[str, float, dict[str, str]]] = []

    def kind(name: str) -> object:
        def make(metric: str, **options: object) -> SimpleNamespace:
            made.append((name, metric))
            assert str(options["description"]).isascii(), "Ray encodes it so, and raises an error"
            return SimpleNamespace(**{
                method: lambda value, tags: calls.append((name, value, tags)) for method in ("inc", "set", "observe")
            })

        return make

    fake = SimpleNamespace(**{name: kind(name) for name in ("Counter", "Gauge", "Histogram")})
    monkeypatch.setattr(measured, "ray_metrics", fake)
    meter = RayMeter()
    for metric in ALL:
        labels = dict.fromkeys(metric.labels, "x")
        meter.record(metric, 0.0, labels)
        meter.record(metric, 2.0, labels)
    assert len(made) == len(ALL), "each is made once"
    assert ("Counter", "headrace_arrivals_total") in made and ("Histogram", "headrace_tpot_seconds") in made
    assert all(value >= 0 if name != "Counter" else value > 0 for name, value, _ in calls), "Ray's rule"
    assert sum(value for name, value, _ in calls if name == "Counter") == 2.0 * sum(
        metric.kind is Kind.COUNTER for metric in ALL
    ), "a counter that is there counts nothing yet"
    assert len({metric.name for metric in ALL}) == len(ALL)
    assert all(bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM) for metric in ALL)
