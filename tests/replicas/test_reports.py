"""What a replica tells the controller by itself: small, again after a loss, and without any controller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
from pool_engines import LAW, KnownEngine

from replicas.digester import Digester
from replicas.reports import Reporter
from scheduler.messages import Ack, Delivered, Telemetry
from scheduler.thresholds import Thresholds
from scheduler.tuning.replica_model import ReplicaModel
from scheduler.tuning.settings import TuningSettings
from scheduler.tuning.slo import Slo
from scheduler.wire import QuestionFailed, answer_of, read_answer, read_question

WISHES = {
    "next_s": 4.0, "cursors": {}, "profile": asdict(LAW),
    "tuning": {"window_s": 60.0, "min_finished": 20, "overflow_probability": 0.01},
}
SETTINGS = TuningSettings(targets=Slo(ttft_s=3.0, tpot_s=0.08))


class Replica:
    """A replica of one or more known engines, and the controller that it reports to. sent: what has arrived there."""

    def __init__(self, *engines: KnownEngine, wishes: dict[str, Any] = WISHES) -> None:
        self.engines, self.wishes = engines, wishes
        self.sent: list[dict[str, bytes]] = []
        self.urgent: list[bool] = []
        self.asked: list[int | None] = []
        self.silent: set[int] = set()
        self.fails: Callable[[], None] = lambda: None
        self.reporter = Reporter(
            [one.name for one in engines], self.ask, lambda: [Delivered(1, 0.01, 0.05)], self.send,
        )

    async def ask(self, rank: int, question: bytes) -> bytes:
        self.asked.append(read_question(question).cursor)  # type: ignore[union-attr]
        if rank in self.silent:
            return answer_of(Ack.without_version("the engine did not answer"))
        return answer_of(self.engines[rank].period())

    async def send(self, reports: dict[str, bytes], urgent: bool) -> dict[str, Any]:
        self.fails()
        self.sent.append(reports)
        self.urgent.append(urgent)
        return self.wishes

    def report(self) -> float:
        return asyncio.run(self.reporter.report())

    def latest(self, name: str) -> Telemetry:
        return read_answer(self.sent[-1][name], Telemetry)


def test_the_first_report_asks_how_to_digest_and_then_all_engines_are_in_one_message() -> None:
    replica = Replica(KnownEngine(1), KnownEngine(2))
    assert replica.report() == 4.0
    assert [set(one) for one in replica.sent] == [set(), {"r1", "r2"}]
    replica.report()
    assert len(replica.sent) == 3


def test_a_report_has_a_digest_and_no_records_and_stays_small_whatever_the_traffic() -> None:
    """At all 64 buckets and with the thresholds of `fluid`, whose survival curve is the longest part."""
    sizes = {}
    for rate_rps in (2.0, 60.0):
        engine = KnownEngine(1, rate_rps=rate_rps, output=800.0, prompt=900.0)
        replica = Replica(engine)
        model = ReplicaModel(SETTINGS, LAW, Thresholds(policy="fluid"))
        for _ in range(12):
            replica.report()
        model.observe(replica.latest("r1"))
        engine.thresholds = model.propose().thresholds
        replica.report()
        report = replica.latest("r1")
        assert report.digest is not None
        assert not (report.iterations or report.arrivals or report.finished or report.running or report.delivered)
        sizes[rate_rps] = len(replica.sent[-1]["r1"])
    assert sizes[60.0] < 10_000
    assert sizes[60.0] < 1.5 * sizes[2.0]


def test_records_are_read_once_and_a_lost_report_loses_nothing() -> None:
    replica = Replica(KnownEngine(1))
    replica.report()

    def lost() -> None:
        raise ConnectionError("no controller")

    replica.fails = lost
    with pytest.raises(ConnectionError):
        replica.report()
    replica.fails = lambda: None
    replica.report()
    digest = replica.latest("r1").digest
    assert digest is not None and digest.records == 300, "three periods of 100 iterations"
    assert replica.asked == [None, 0, *[pytest.approx(asked) for asked in replica.asked[2:]]]
    assert replica.asked[2] is not None and replica.asked[3] is not None and 0 < replica.asked[2] < replica.asked[3]


def test_one_silent_engine_is_told_and_keeps_no_other_from_reporting() -> None:
    replica = Replica(KnownEngine(1), KnownEngine(2))
    replica.silent = {0}
    replica.report()
    with pytest.raises(QuestionFailed, match="the engine did not answer"):
        replica.latest("r1")
    assert replica.latest("r2").digest is not None
    replica.silent = set()
    replica.report()
    assert replica.latest("r1").digest is not None


def test_an_engine_whose_policy_needs_records_sends_those_that_the_controller_does_not_know() -> None:
    engine = KnownEngine(1)
    engine.thresholds = Thresholds(policy="nested_wait")
    replica = Replica(engine, wishes=WISHES | {"cursors": {"r1": 41}})
    replica.report()
    replica.report()
    report = replica.latest("r1")
    assert report.digest is None and report.iterations and report.arrivals and report.delivered
    assert replica.asked == [None, 41, 41], "the first question only looks for the policy"


def test_a_change_of_policy_is_followed() -> None:
    engine = KnownEngine(1)
    replica = Replica(engine)
    replica.report()
    engine.thresholds = Thresholds(policy="nested_wait")
    replica.report()
    replica.report()
    assert replica.latest("r1").digest is None
    engine.thresholds = Thresholds(policy="fluid")
    replica.report()
    replica.report()
    assert replica.latest("r1").digest is not None


def test_without_a_profile_it_is_measured_first_and_says_so() -> None:
    replica = Replica(KnownEngine(1), wishes=WISHES | {"profile": None})
    few = replica.engines[0].period(0.5)
    digester = Digester()
    told = digester.digested(few, SETTINGS, None).digest
    assert told is not None and told.measuring.startswith("9 iterations measured") and digester.cursor == 0
    replica.report()
    digest = replica.latest("r1").digest
    assert digest is not None and not digest.measuring and digest.time_model is not None


def test_without_a_controller_nothing_but_another_try_happens() -> None:
    replica = Replica(KnownEngine(1))
    tries = []

    def refuse() -> None:
        tries.append(1)
        raise ValueError("there is no controller")

    replica.fails = refuse

    async def main() -> None:
        task = asyncio.create_task(replica.reporter.keep_reporting())
        while not tries:
            await asyncio.sleep(0)
        replica.fails = lambda: None
        replica.reporter.soon()
        while len(replica.sent) < 2:
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(main())
    assert replica.latest("r1").digest is not None


def test_what_is_urgent_stays_so_until_it_has_arrived() -> None:
    replica = Replica(KnownEngine(1), wishes=WISHES | {"next_s": 0.05})
    left = [1, 1]

    def refuse_twice() -> None:
        if left:
            left.pop()
            raise ValueError("there is no controller")

    async def main() -> None:
        task = asyncio.create_task(replica.reporter.keep_reporting())
        while len(replica.sent) < 3:
            await asyncio.sleep(0.001)
        replica.fails = refuse_twice
        replica.reporter.soon()
        seen = len(replica.sent)
        while len(replica.sent) < seen + 2:
            if left:
                replica.reporter._soon.set()  # it need not wait for its next try
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(main())
    assert replica.urgent[-2:] == [True, False]


def test_an_engine_whose_report_fails_unexpectedly_keeps_no_other_from_reporting() -> None:
    replica = Replica(KnownEngine(1), KnownEngine(2))
    replica.report()
    ask = replica.ask

    async def broken(rank: int, question: bytes) -> bytes:
        if rank == 0:
            raise RuntimeError("unexpected")
        return await ask(rank, question)

    replica.reporter._ask = broken
    replica.report()
    assert replica.latest("r2").digest is not None
    assert "unexpected" in read_answer(replica.sent[-1]["r1"], Ack).reason


def test_a_digest_of_another_release_may_say_more() -> None:
    report = Digester().digested(KnownEngine(1).period(), SETTINGS, LAW)
    text = answer_of(report).replace(b'"measuring":', b'"of_a_later_release":[1,2],"measuring":')
    assert read_answer(text, Telemetry) == replace(report)
