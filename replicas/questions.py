"""Questions of the ingress and the controller to an engine, sent through its replica.

Questions and answers are JSON (`scheduler.wire`), so that no class is pickled between processes of different releases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from replicas.actor_calls import ReplicaUnavailable, call_replica
from replicas.ranks import EngineAddress
from scheduler.messages import Ack, Stats, Telemetry
from scheduler.thresholds import Thresholds
from scheduler.wire import QuestionFailed, UnreadableMessage, offer_of, read_answer

_Answer = TypeVar("_Answer", Stats, Telemetry)
_Result = TypeVar("_Result")
ANSWER_S = 5.0
Unanswered = ReplicaUnavailable | UnreadableMessage
"""Takes the place of an answer that is missing or unreadable."""


async def ask_telemetry(engine: EngineAddress, cursor: int | None, *, timeout_s: float = ANSWER_S) -> Telemetry:
    """An engine's telemetry with the records after `cursor` (None: without records).

    Raises:
        ReplicaUnavailable: the replica or its engine does not answer.
        UnreadableMessage: the answer has another schema version or cannot be parsed.
    """
    answer = await call_replica(engine.actor_name, "telemetry", timeout_s=timeout_s, rank=engine.rank, cursor=cursor)
    return read_from(engine, answer, Telemetry)


async def ask_stats(engine: EngineAddress) -> Stats:
    """An engine's `Stats` for routing and readiness; raises as `ask_telemetry`."""
    return read_from(engine, await call_replica(engine.actor_name, "stats", rank=engine.rank), Stats)


async def offer_thresholds(engine: EngineAddress, thresholds: Thresholds, *, automatic: bool) -> Ack:
    """Offer thresholds to an engine; raises as `ask_telemetry`, but a silent engine gives an Ack, not accepted."""
    offer = offer_of(thresholds, automatic=automatic)
    return read_answer(await call_replica(engine.actor_name, "apply_thresholds", rank=engine.rank, offer=offer), Ack)


async def ask_to_look_at_settings(engine: EngineAddress) -> dict[str, Any]:
    """Ask a replica to take a change of settings now: {"accepted", "reason"} of the engine at the address.

    Raises:
        ReplicaUnavailable: the replica does not answer; it looks by itself within a second of being able to.
    """
    acks: dict[str, dict[str, Any]] = await call_replica(engine.actor_name, "look_at_settings")
    return acks[str(engine.rank)]


async def ask_all(
    engines: Mapping[str, EngineAddress], ask: Callable[[EngineAddress], Awaitable[_Result]]
) -> dict[str, _Result | Unanswered]:
    """Ask all engines at once; without an answer the entry is the error."""
    return dict(zip(engines, await asyncio.gather(*map(partial(_or_reason, ask), engines.values())), strict=True))


async def _or_reason(ask: Callable[[EngineAddress], Awaitable[_Result]], engine: EngineAddress) -> _Result | Unanswered:
    try:
        return await ask(engine)
    except (ReplicaUnavailable, UnreadableMessage) as error:
        return error


def read_from(engine: EngineAddress, answer: bytes, kind: type[_Answer]) -> _Answer:
    """What an engine's replica has answered or reported; raises as `ask_telemetry`."""
    try:
        return read_answer(answer, kind)
    except QuestionFailed as error:
        raise ReplicaUnavailable(f"the engine of rank {engine.rank} at {engine.actor_name}: {error}") from error
