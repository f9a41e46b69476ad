"""What is asked of an engine through its replica: JSON both ways, one question for all, and silence as a result."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from synthetic_engine import SyntheticEngine

from replicas import questions
from replicas.actor_calls import ReplicaUnavailable
from replicas.questions import ask_all, ask_stats, ask_telemetry, offer_thresholds
from replicas.ranks import EngineAddress
from scheduler.messages import Ack, Apply
from scheduler.thresholds import Thresholds
from scheduler.wire import OtherSchema, answer_of, read_question

ENGINES = {"a#0": EngineAddress("a", 0), "a#1": EngineAddress("a", 1), "b#0": EngineAddress("b", 0)}


class Replicas:
    """Stands where Ray carries calls to replica actors: the same engine behind each."""

    def __init__(self) -> None:
        self.engine = SyntheticEngine(Thresholds(max_running=9))
        self.calls: list[tuple[str, int, str]] = []
        self.answers: dict[tuple[str, int], bytes | Exception] = {}

    async def call(
        self, actor_name: str, method: str, *, rank: int, timeout_s: float = 5.0, **arguments: Any
    ) -> bytes:
        assert all(value is None or type(value) in (bytes, int) for value in arguments.values()), arguments
        self.calls.append((actor_name, rank, method))
        given = self.answers.get((actor_name, rank))
        if isinstance(given, Exception):
            raise given
        if given is not None:
            return given
        if method == "apply_thresholds":
            offer = read_question(arguments["offer"])
            assert isinstance(offer, Apply)
            return answer_of(self.engine.active.offer(offer))
        return answer_of(self.engine.stats() if method == "stats" else self.engine.report(**arguments))


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Replicas:
    replicas = Replicas()
    monkeypatch.setattr(questions, "call_replica", replicas.call)
    return replicas


def test_every_engine_is_asked_once_by_its_rank(replicas: Replicas) -> None:
    answers = asyncio.run(ask_all(ENGINES, ask_stats))
    assert list(answers) == list(ENGINES)
    assert all(answer == replicas.engine.stats() for answer in answers.values())
    assert replicas.calls == [("a", 0, "stats"), ("a", 1, "stats"), ("b", 0, "stats")]


def test_telemetry_and_acks_arrive_whole(replicas: Replicas) -> None:
    replicas.engine.traffic([(58, 147)], every_s=1.0, seconds=3.0)
    for cursor in (0, 3, None):
        assert asyncio.run(ask_telemetry(ENGINES["b#0"], cursor)) == replicas.engine.report(cursor)
    ack = asyncio.run(offer_thresholds(ENGINES["b#0"], Thresholds(version=4, pinned=True), automatic=False))
    assert (ack.accepted, ack.active_version) == (True, 4)
    assert asyncio.run(offer_thresholds(ENGINES["b#0"], Thresholds(version=5), automatic=True)).code == "pinned"


def test_silence_another_release_and_an_engine_s_own_silence_are_results(replicas: Replicas) -> None:
    silent_engine = Ack(accepted=False, active_version=-1, reason="the engine did not answer", code="unavailable")
    replicas.answers = {
        ("a", 0): ReplicaUnavailable("gone"), ("a", 1): b'{"schema":2}', ("b", 0): answer_of(silent_engine),
    }
    for ask in (ask_stats, partial(ask_telemetry, cursor=None)):
        gone, other, silent = asyncio.run(ask_all(ENGINES, ask)).values()
        assert isinstance(gone, ReplicaUnavailable)
        assert isinstance(other, OtherSchema)
        assert isinstance(silent, ReplicaUnavailable) and "rank 0 at b: the engine did not answer" in str(silent)
    assert asyncio.run(offer_thresholds(ENGINES["b#0"], Thresholds(), automatic=True)) == silent_engine


def test_any_other_error_is_not_hidden(replicas: Replicas) -> None:
    replicas.answers = {("a", 0): KeyError("a mistake")}
    with pytest.raises(KeyError, match="a mistake"):
        asyncio.run(ask_all(ENGINES, ask_stats))
