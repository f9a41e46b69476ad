"""The soak's account, its slopes and its verdict, against a server of the test's own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import psutil
import pytest
from fake_server import FakeServer, answer_all

from benchmarks.faults import soak
from benchmarks.faults.faults import Fault, NotApplicable
from benchmarks.faults.processes import Role
from benchmarks.faults.stack import Leftovers

SLOPE = {"mib_per_hour": 5.0, "low": 4.0, "high": 6.0, "mean_mib": 100.0, "minutes": 20.0}
GOOD = {"complete": 3, "silently cut": 0, "lost": 0, "hung": 0, "unaccounted": 0}
NONE_LEFT = Leftovers(0)


class OneServer:
    def __init__(self) -> None:
        self.server = FakeServer(answer_all)
        self.family = self

    @property
    def url(self):
        return self.server.url

    def by_role(self):
        return [(Role.PROXY, psutil.Process())]


@dataclass(frozen=True)
class Missing(Fault):
    def prepare(self, stack):
        raise NotApplicable("there is none")


def test_faults_strike_at_their_times_and_every_request_is_counted(monkeypatch):
    for name, value in {"BETWEEN_S": 1.0, "SAMPLE_S": 0.1, "ORDER": ("none", "missing")}.items():
        monkeypatch.setattr(soak, name, value)
    monkeypatch.setitem(soak.FAULTS, "missing", Missing("missing", "missing"))
    stack = OneServer()
    with stack.server:
        result = asyncio.run(soak.soak(stack, rate_rps=10.0, seconds=3.0, quiet_s=1.0))
    assert [(one["fault"], one["hit"]) for one in result["struck"]] == [
        ("none", "nothing"), ("missing", "not struck: there is none"),
    ]
    first_s, second_s = (one["at_s"] for one in result["struck"])
    assert first_s > 0.45 and second_s > 1.45, "later on a slow machine"
    assert result["account"]["complete"] == result["sent"] == 39, "the load goes on without faults"
    assert 0 < result["good"] <= 39
    (name,) = result["slopes"]
    assert name.startswith("Serve proxy")


def test_all_as_it_has_to_be():
    assert soak.verdict({"account": GOOD, "slopes": {"proxy 1": SLOPE}}, NONE_LEFT, grow_mib_per_hour=10.0) == []


@pytest.mark.parametrize(("account", "left", "grow", "said"), [
    (GOOD | {"hung": 1}, NONE_LEFT, 10.0, "not accounted for to the last"),
    (GOOD, NONE_LEFT, 3.9, "proxy 1 grows by 5.0 MiB/h (4.0 to 6.0)"),
    (GOOD, Leftovers(0, files=["a"]), 10.0, "left behind: files: ['a']"),
    (GOOD, Leftovers(0, shared_memory=["psm"]), 10.0, "left behind: shared_memory: ['psm']"),
])
def test_what_is_not_is_said(account, left, grow, said):
    (line,) = soak.verdict({"account": account, "slopes": {"proxy 1": SLOPE}}, left, grow)
    assert line.startswith(said)
