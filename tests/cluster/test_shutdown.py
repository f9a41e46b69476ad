"""The stop of an application: requests finish, are cut at the bound or at once, and the operator is told."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable

import psutil
import pytest

from cluster import shutdown
from cluster.shutdown import Signals
from replicas.actor_calls import ReplicaUnavailable


class Application:
    """Requests in flight that finish one by one, `per_poll` at each poll; a drain within 0 s ends them all."""

    def __init__(self, in_flight: int, per_poll: float = 1.0) -> None:
        self.in_flight, self.per_poll = float(in_flight), per_poll
        self.polls = 0
        self.drains: list[float] = []

    async def stop_admitting(self) -> int:
        if self.polls:
            self.in_flight = max(0.0, self.in_flight - self.per_poll)
        self.polls += 1
        return round(self.in_flight)

    async def drain(self, within_s: float) -> None:
        assert self.polls, "the ingress is closed first, or requests would come back to it in vain"
        self.drains.append(within_s)
        if within_s == 0:
            self.per_poll = self.in_flight


@pytest.fixture
def finish(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    monkeypatch.setattr(shutdown, "_POLL_S", 0.001)
    monkeypatch.setattr(shutdown, "_SAY_EVERY_S", 0.0)
    monkeypatch.setattr(shutdown, "_TO_TELL_CLIENTS_S", 0.1)

    def run(app: Application, within_s: float, at_once: Callable[[], bool] = bool) -> tuple[int, list[str]]:
        said: list[str] = []
        stop = shutdown._finish(app.stop_admitting, app.drain, within_s, said.append, at_once)
        return asyncio.run(stop), said

    return run


def test_requests_that_finish_in_time_are_not_cut(finish: Callable[..., tuple[int, list[str]]]) -> None:
    app = Application(3)
    cut, said = finish(app, 600.0)
    assert cut == 0 and app.drains == [600.0]
    assert said == [
        "finishing 3 requests, at most 600 s; Ctrl-C again ends at once", "finishing 2 requests",
        "finishing 1 requests", "finishing 0 requests",
    ]


def test_an_idle_application_stops_without_a_word(finish: Callable[..., tuple[int, list[str]]]) -> None:
    app = Application(0)
    assert finish(app, 600.0) == (0, [])
    assert app.drains == [600.0], "requests that are on their way to a replica come back"


def test_at_the_bound_the_rest_is_ended_and_counted(finish: Callable[..., tuple[int, list[str]]]) -> None:
    app = Application(5, per_poll=0.0)
    cut, said = finish(app, 0.05)
    assert cut == 5 and app.drains == [0.05, 0.0] and app.in_flight == 0
    assert said[-1] == "ended 5 requests before they were complete"


def test_asked_again_it_ends_at_once_and_counts(finish: Callable[..., tuple[int, list[str]]]) -> None:
    app = Application(9)
    cut, said = finish(app, 600.0, lambda: app.polls > 4)
    assert 0 < cut < 9 and app.drains == [600.0, 0.0]
    assert said[-1] == f"ended {cut} requests before they were complete"


def test_an_application_that_does_not_end_its_requests_holds_up_no_stop(
    finish: Callable[..., tuple[int, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Application(2, per_poll=0.0)

    async def ignore(within_s: float) -> None:
        app.drains.append(within_s)

    monkeypatch.setattr(app, "drain", ignore)
    cut, _ = finish(app, 0.01)
    assert cut == 2 and app.in_flight == 2


def test_an_ingress_that_does_not_answer_once_still_has_its_requests() -> None:
    """One poll in hundreds that came late ended a stop at once, cut all requests and said that none was cut."""
    under_way = shutdown.UnderWay()
    assert under_way.heard({"a": 5, "b": 2}) == 7
    assert under_way.heard({"a": None, "b": 1}) == 6
    assert under_way.heard({"a": 3, "b": None}) == 4
    assert under_way.heard({"b": 0}) == 0, "one that is gone has none"


def test_an_ingress_that_has_not_answered_yet_is_waited_for() -> None:
    under_way = shutdown.UnderWay()
    assert under_way.heard({"a": None}) == 1
    assert under_way.heard({"a": 0}) == 0


def test_calls_are_answered_by_replica_and_only_silence_is_forgiven() -> None:
    async def says(answer: int | Exception) -> int:
        if isinstance(answer, Exception):
            raise answer
        return answer

    silent = ReplicaUnavailable("busy")
    assert asyncio.run(shutdown._answers({"a": says(4), "b": says(silent)})) == {"a": 4, "b": None}
    with pytest.raises(ZeroDivisionError):
        asyncio.run(shutdown._answers({"a": says(4), "b": says(ZeroDivisionError())}))


def test_the_first_signal_stops_and_the_next_ones_hurry() -> None:
    signals = Signals()
    with pytest.raises(KeyboardInterrupt):
        signals()
    assert not signals.again
    signals()
    assert signals.again


def test_a_signal_during_a_stop_that_had_another_reason_hurries() -> None:
    signals = Signals()
    signals.stopping()
    assert not signals.again
    signals()
    assert signals.again


def test_a_terminal_that_goes_stops_once_and_cuts_no_stop_short() -> None:
    signals = Signals()
    with pytest.raises(KeyboardInterrupt):
        signals(signal.SIGHUP)
    signals(signal.SIGHUP)
    assert not signals.again, "the stop under way goes on"
    signals(signal.SIGTERM)
    assert signals.again


@pytest.mark.parametrize("ignored", [False, True])
def test_under_nohup_a_terminal_that_goes_stops_nothing(ignored: bool) -> None:
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.getsignal(name) for name in names}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        signals = Signals()
        signals.install()
        assert (signal.getsignal(signal.SIGHUP) is signals) is not ignored
        assert signal.getsignal(signal.SIGTERM) is signals
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class Ray:
    """Stands for Ray and for Serve."""

    def __init__(self, *, initialized: bool) -> None:
        self.initialized = initialized
        self.shut_down = 0

    def is_initialized(self) -> bool:
        return self.initialized

    def shutdown(self) -> None:
        self.shut_down += 1
        raise RuntimeError("the cluster is gone")


@pytest.mark.parametrize("initialized", [True, False])
def test_whatever_ray_says_no_process_stays(initialized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(initialized=initialized)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [psutil.Process(child.pid)])
        shutdown.stop_local_ray(ray, ray)
        assert child.poll() is not None
    assert ray.shut_down == initialized, "a Serve that was never started is not asked, or it would start one"
