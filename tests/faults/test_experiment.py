"""One fault under load, against a server of the test's own: no Ray, no engine."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

import pytest
from aiohttp import web
from fake_server import FakeServer, answer_all

from benchmarks.faults import experiment
from benchmarks.faults.faults import FAULTS, Fault, NotApplicable
from benchmarks.faults.hang_ups import HangUps
from benchmarks.faults.processes import Role


class OneServer:
    """A stack that is a fake server; `broken` makes it answer 500, and its engine core is then missing."""

    kind = "headrace"

    def __init__(self) -> None:
        self.broken = False
        self.server = FakeServer(self._answer)
        self.family = self

    async def _answer(self, call):
        if self.broken:
            return web.json_response({"error": {"message": "broken"}}, status=500)
        return await answer_all(call)

    @property
    def url(self):
        return self.server.url

    def by_role(self):
        return [] if self.broken else [(Role.ENGINE_CORE, None)]


@dataclass(frozen=True)
class Break(Fault):
    def strike(self, stack, prepared):
        stack.broken = True
        return "the server"

    def relieve(self, stack, prepared):
        stack.broken = False


@dataclass(frozen=True)
class Nothing(Fault):
    def prepare(self, stack):
        raise NotApplicable("there is none")


@pytest.fixture
def quick(monkeypatch):
    """Two seconds before the fault instead of twenty."""
    for name, seconds in {"FILL_S": 0, "FAULT_S": 2, "SETTLE_S": 0, "_PREPARE_S": 0.5}.items():
        monkeypatch.setattr(experiment, name, seconds)


def test_every_request_is_counted_before_and_after_the_fault(quick):
    stack = OneServer()
    with stack.server:
        result = experiment.run_fault(stack, Break("break", "broken", lasts_s=2.0), 10.0, watch_s=4)
    assert result["hit"] == "the server" and result["notes"] == []
    assert result["sent"] == sum(result["account"].values()) == len(result["requests"]) == 59
    assert result["account"]["unaccounted"] == 0
    assert result["new"]["errors"] >= 10, "two seconds of ten requests each, or more on a slow machine"
    assert result["new"]["errors"] + result["new"]["complete"] == result["new"]["requests"]
    assert 0 < result["goodput_before_rps"] <= 11
    assert result["replaced_s"] >= 2.0
    errors = result["in_flight"]["errors"] + result["new"]["errors"]
    assert result["messages"] == {"HTTP 500: broken": errors} and result["failed_before"] == 0


def test_a_strike_that_fails_is_a_note(quick):
    @dataclass(frozen=True)
    class Fails(Fault):
        def strike(self, stack, prepared):
            raise OSError("no such thing")

    stack = OneServer()
    with stack.server:
        result = experiment.run_fault(stack, Fails("fails", "fails"), 5.0, watch_s=1)
    assert (result["hit"], result["notes"]) == ("failed", ["OSError: no such thing"])
    assert result["account"]["complete"] == result["sent"]


def test_the_load_ends_some_time_after_a_strike_that_takes_long(quick):
    @dataclass(frozen=True)
    class Slow(Fault):
        def strike(self, stack, prepared):
            time.sleep(1.0)
            return "done"

    stack = OneServer()
    with stack.server:
        result = experiment.run_fault(stack, Slow("slow", "slow", after_done_s=1), 10.0, watch_s=60)
    assert result["hit"] == "done" and result["struck_s"] >= 1.0
    assert max(one["arrival_s"] for one in result["requests"]) < 30, "not the whole minute"
    assert len(result["goodput_by_second"]) < 30 and result["account"]["complete"] == result["sent"]


def test_a_fault_that_does_not_apply_gives_its_reason(quick):
    stack = OneServer()
    with stack.server:
        assert experiment.run_fault(stack, Nothing("none", "none"), 5.0, watch_s=1) == {"na": "there is none"}


def test_clients_hang_up_at_once_though_some_were_rejected_before():
    gone: Counter[str] = Counter()

    async def endless(call):
        if gone["rejected"] < 2:
            gone["rejected"] += 1
            return web.json_response({"error": {"message": "full"}}, status=429)
        response = await call.stream()
        try:
            while True:
                await response.write(b": still here\n\n")
                await asyncio.sleep(0.02)
        except (ConnectionError, asyncio.CancelledError):
            gone["gone"] += 1
            raise

    with FakeServer(endless) as server:
        clients = HangUps(server.url, 5)
        deadline = time.monotonic() + 10
        while len(server.calls) < 5 + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert clients.hang_up() == "5 clients left, 0 of them with tokens"
        deadline = time.monotonic() + 10
        while gone["gone"] < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert gone["gone"] == 5


def test_faults_are_named_once_and_bounded():
    assert all(fault.name == name and fault.title for name, fault in FAULTS.items())
    assert len({fault.title for fault in FAULTS.values()}) == len(FAULTS)
    assert all((fault.lasts_s or 0) < fault.watch_s <= 75 for fault in FAULTS.values() if not fault.after_done_s)
