"""The state of a server's engines, and the same as Prometheus metrics."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic_core import to_json
from synthetic_engine import PAPER, SyntheticEngine

from scheduler.alone.controller import OneEngineController
from scheduler.alone.metrics import exposition
from scheduler.alone.place import new_place, write_state
from scheduler.alone.state import Engines
from scheduler.engine.channel import ChannelServer, remove_endpoint
from scheduler.messages import Ack, Counters
from scheduler.metrics import ENGINE, ESTIMATES, OF_CONTROLLER, Kind
from scheduler.settings import LiveSettings, SchedulerSettings
from scheduler.thresholds import Thresholds
from scheduler.tuning.slo import Slo

SETTINGS = SchedulerSettings.from_additional_config({"headrace": {"targets": {"ttft_s": 3.0, "tpot_s": 0.08}}})
NOT_SHOWN = {
    "decode_steps", "decode_computed_tokens", "decode_gained_tokens", "decode_gained_squares", "prompt_tokens",
    "cached_tokens", "rejected",
}
"""Of speculative decoding and of the prefix cache, which vLLM's own metrics have; and a sum of others."""
NOT_LIMITED = {
    "headrace_threshold_group_requests", "headrace_threshold_running_requests", "headrace_threshold_queue_requests",
}
"""Thresholds of other policies, and of a queue that is short enough without one."""


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    short = Path(tempfile.mkdtemp(prefix="hr-"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    yield short
    short.rmdir()


@pytest.fixture
def endpoint(temporary: Path) -> Iterator[str]:
    endpoint = new_place(2)
    yield endpoint
    remove_endpoint(endpoint)


def busy_engine() -> SyntheticEngine:
    engine = SyntheticEngine(Thresholds(policy="fluid"))
    for number in range(60):
        engine.now_s += 0.02
        prefill, kv = (58 if number % 4 == 0 else 0), 1000.0 + 100 * number
        engine.iterate(prefill, 10 + number % 7, int(kv), PAPER.iteration_s(prefill, 10.0 + number % 7, kv))
    engine.traffic([(58, 40), (120, 90)], every_s=0.1, seconds=6.0)
    return engine


def state_of(engine: SyntheticEngine, endpoint: str) -> dict[str, Any]:
    """What a reader sees after one control cycle over this engine."""

    async def scenario() -> dict[str, Any]:
        controller = OneEngineController(SETTINGS.model_copy(update={"channel": endpoint}))
        await controller.one_cycle()
        write_state(endpoint, to_json(controller.state()))
        return await Engines().state()

    def unasked(question: Any) -> Ack:
        raise AssertionError(f"a controller does not ask this: {question}")

    server = ChannelServer(
        endpoint, engine.active.offer, lambda asked: engine.report(asked.cursor), engine.stats, unasked, unasked
    )
    try:
        return asyncio.run(scenario())
    finally:
        server.close()


def test_one_cycle_shows_the_engine_its_plan_and_its_controller(endpoint: str) -> None:
    state = state_of(busy_engine(), endpoint)
    assert list(state["engines"]) == ["2"] and abs(state["at_unix_s"] - time.time()) < 60
    engine = state["engines"]["2"]
    assert engine["reachable"] and engine["thresholds"]["version"] == 1 and not engine["from_config"]
    assert engine["fluid"]["load"] > 0 and engine["forecast"]["bottleneck"]
    assert engine["decision"] == engine["thresholds"]["reason"]
    controller = engine["controller"]
    assert (controller["alive"], controller["pid"], controller["passes"]) == (True, os.getpid(), 1)
    assert [event["new_version"] for event in controller["events"]] == [1]


def test_an_engine_is_tuned_for_the_settings_that_it_says_are_in_force(endpoint: str) -> None:
    busy = busy_engine()
    busy.settings = LiveSettings(
        targets=Slo(ttft_s=1.5, tpot_s=0.05), thresholds=Thresholds(policy="fluid"), overflow_probability=0.03
    )
    engine = state_of(busy, endpoint)["engines"]["2"]
    assert engine["targets"] == {"ttft_s": 1.5, "tpot_s": 0.05, "latency_s": None}, "not those it started with"
    assert (engine["thresholds"]["fluid"]["ttft_s"], engine["thresholds"]["fluid"]["tpot_s"]) == (1.5, 0.05)
    assert engine["settings"]["overflow_probability"] == 0.03 and engine["draining"] is False


def test_an_engine_and_a_controller_that_do_not_answer_are_shown_as_such(endpoint: str) -> None:
    (engine,) = asyncio.run(Engines().state())["engines"].values()
    assert not engine["reachable"] and "did not answer" in engine["reason"]
    assert engine["controller"] == {"alive": False} and engine["forecast"] is None
    samples = _samples(exposition({"engines": {"2": engine}}))
    assert samples == {("headrace_engine_up", ("2",)): 0.0, ("headrace_controller_up", ("2",)): 0.0}


@pytest.mark.parametrize("written", [b"", b"{", b'{"engine": {}}', b'{"engine": {}, "controller": {"pid": 1}}'])
def test_an_unreadable_state_counts_as_none(endpoint: str, written: bytes) -> None:
    write_state(endpoint, written)
    (engine,) = asyncio.run(Engines().state())["engines"].values()
    assert engine["controller"] == {"alive": False}


@pytest.mark.parametrize("controller", [
    {"pid": 2**30, "at_unix_s": time.time(), "period_s": 5.0},
    {"pid": os.getpid(), "at_unix_s": time.time() - 16.0, "period_s": 5.0},
], ids=["ended", "silent"])
def test_a_controller_that_ended_or_is_silent_is_not_alive(endpoint: str, controller: dict[str, Any]) -> None:
    write_state(endpoint, to_json({"engine": {"decision": "d"}, "controller": controller}))
    (engine,) = asyncio.run(Engines().state())["engines"].values()
    assert not engine["controller"]["alive"] and engine["decision"] == "d"


def test_every_metric_has_a_sample_under_load(endpoint: str) -> None:
    state = state_of(busy_engine(), endpoint)
    samples = _samples(exposition(state))
    names = {name for name, _ in samples}
    expected = {metric.exposed for metric in (*ENGINE, *ESTIMATES, *OF_CONTROLLER)} - NOT_LIMITED
    assert names == expected
    assert samples[("headrace_policy", ("2", "fluid"))] == 1.0
    assert samples[("headrace_thresholds_version", ("2",))] == 1.0
    plan = state["engines"]["2"]["forecast"]
    assert samples[("headrace_capacity_rate", ("2",))] == plan["capacity_rps"]
    assert samples[("headrace_bottleneck", ("2", plan["bottleneck"]))] == 1.0
    assert {labels for name, labels in samples if name == "headrace_target_misses_total"} == {
        ("2", "ttft"), ("2", "tpot"), ("2", "latency")
    }


def test_every_counter_of_the_engine_is_a_metric_or_left_out_on_purpose() -> None:
    names = [field.name for field in fields(Counters)]
    counters = Counters(**{name: number for number, name in enumerate(names, 1)})
    state = {"counters": {name: getattr(counters, name) for name in names}}
    read = {value for metric in ENGINE if metric.kind is Kind.COUNTER for _, value in metric.read(state)}
    assert {names[round(value) - 1] for value in read} == set(names) - NOT_SHOWN


def test_groups_of_other_policies_are_named_by_type_and_segment() -> None:
    types = [{"name": "short", "n": 4}, {"name": "free", "n": None}]
    segments = [{"end_output_tokens": 64, "total": 12}]
    state = {"engines": {"0": {"thresholds": {"types": types, "segments": segments, "max_running": 9}}}}
    assert _samples(exposition(state)) == {
        ("headrace_threshold_group_requests", ("0", "short")): 4.0,
        ("headrace_threshold_group_requests", ("0", "to 64")): 12.0,
        ("headrace_threshold_running_requests", ("0",)): 9.0,
    }


def test_infinite_and_missing_values_have_no_sample() -> None:
    state = {"engines": {"0": {"reachable": True, "fluid": {"load": None}, "forecast": None, "time_model": None}}}
    assert _samples(exposition(state)) == {("headrace_engine_up", ("0",)): 1.0}


def _samples(text: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    families = list(text_string_to_metric_families(text.decode()))
    assert all(family.documentation for family in families)
    return {
        (sample.name, tuple(sorted(sample.labels.values()))): sample.value
        for family in families for sample in family.samples
    }
