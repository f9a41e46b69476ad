"""The JSON in which messages travel between engine, replica, ingress and controller; parsed at the two ends only.

    question  {"schema": 1, "apply": {thresholds}, "automatic": true}
              {"schema": 1, "settings": {the fields of `scheduler.settings.LiveSettings`}, "revision": 3}
              {"schema": 1, "report": cursor}        {"schema": 1, "stats": true}
              {"schema": 1, "drain": "waiting"}      or "all": also what has begun
    answer    {"schema": 1, …}: the fields of `Ack`, `Telemetry` or `Stats`; a question that failed is answered by `Ack`

Processes of two versions meet while a deployment is upgraded. Within one schema version answers may gain keys: a reader
ignores those that it does not know. Thresholds, settings and `drain` are commands: a key that is not known is rejected.
`SCHEMA` goes up when a key is renamed, is removed or changes its meaning; commands and answers of another schema
version are not read, questions that change nothing are answered in any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from scheduler.messages import (
    SCHEMA,
    Ack,
    Apply,
    AskStats,
    ByColumn,
    Configure,
    Delivered,
    Drain,
    Report,
    Stats,
    Telemetry,
)
from scheduler.thresholds import Thresholds, parse_thresholds, shortened, thresholds_as_dict

_COMMANDS = {"apply": "automatic", "settings": "revision"}
"""Questions with values that change something: the key that may stand beside each."""
_QUESTIONS = (*_COMMANDS, "report", "stats", "drain")
_DRAINS = {"waiting": Drain(end=False), "all": Drain(end=True)}
_LONGEST_SHOWN = 200
_ADAPTERS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Ack, Telemetry, Stats)}
_DELIVERED: TypeAdapter[tuple[Delivered, ...]] = TypeAdapter(Annotated[tuple[Delivered, ...], ByColumn(Delivered)])
_Answer = TypeVar("_Answer", Ack, Telemetry, Stats)


class UnreadableMessage(ValueError):
    """A message that is not JSON or lacks expected fields; the error names them."""


class OtherSchema(UnreadableMessage):
    """A message of another schema version; nothing of it is read."""

    def __init__(self, speaker: str, version: object) -> None:
        spoken = "no schema version" if version is None else f"schema version {version}"
        super().__init__(f"{speaker} speaks {spoken}, this process version {SCHEMA}; both must run the same release")


class QuestionFailed(RuntimeError):
    """The other side could not answer; the message says why."""


# Questions to an engine.


def offer_of(thresholds: Thresholds, *, automatic: bool) -> bytes:
    """The question that offers thresholds; answered by an `Ack`."""
    return _text({"apply": thresholds_as_dict(thresholds), "automatic": automatic})


def settings_question(settings: Mapping[str, Any], revision: int) -> bytes:
    """The question that replaces an engine's settings; answered by an `Ack`."""
    return _text({"settings": settings, "revision": revision})


def telemetry_question(cursor: int | None) -> bytes:
    """The question for `Telemetry` with the records after `cursor` (None: without records)."""
    return _text({"report": cursor})


def stats_question() -> bytes:
    """The question for `Stats`."""
    return _text({"stats": True})


def drain_question(*, end: bool) -> bytes:
    """The command to drain; answered by an `Ack`."""
    return _text({"drain": next(word for word, drain in _DRAINS.items() if drain.end == end)})


def read_question(text: bytes) -> Apply | Configure | Report | AskStats | Drain:
    """The question in `text`.

    Raises:
        OtherSchema: a command of another schema version; read-only questions are answered whatever their version.
        UnreadableMessage: an unknown or malformed question.
        InvalidThresholds: an unknown field or an invalid value.
    """
    asked = _object(text)
    schema = asked.pop("schema", None)
    kind = next((kind for kind in _QUESTIONS if kind in asked), None)
    if kind is None:
        raise UnreadableMessage(f"unknown question {shortened(sorted(asked))}; ask one of {', '.join(_QUESTIONS)}")
    if kind in _COMMANDS:
        _check_command(kind, asked, schema)
        return _apply(asked) if kind == "apply" else _configure(asked)
    if kind == "drain" and schema != SCHEMA:
        raise OtherSchema("the sender of this command", schema)
    if kind == "report":
        cursor = asked["report"]
        if cursor is not None and type(cursor) is not int:
            shown = str(cursor)[:_LONGEST_SHOWN]
            raise UnreadableMessage(f"report = {shown} is not allowed; allowed: a cursor, or null")
        return Report(cursor=cursor)
    return _drain(asked) if kind == "drain" else AskStats()


def _drain(asked: dict[str, Any]) -> Drain:
    word = asked["drain"]
    if len(asked) > 1 or not isinstance(word, str) or word not in _DRAINS:
        shown = str(asked)[:_LONGEST_SHOWN]
        raise UnreadableMessage(f"{shown} is not allowed; allowed: drain alone, {' or '.join(_DRAINS)}")
    return _DRAINS[word]


def _check_command(kind: str, asked: dict[str, Any], schema: object) -> None:
    named = "thresholds" if kind == "apply" else kind
    if schema != SCHEMA:
        raise OtherSchema(f"the sender of these {named}", schema)
    if surplus := sorted(asked.keys() - {kind, _COMMANDS[kind]}):
        raise UnreadableMessage(
            f"unknown key {', '.join(surplus)[:_LONGEST_SHOWN]} beside the {named}; allowed: {_COMMANDS[kind]}"
        )


def _apply(asked: dict[str, Any]) -> Apply:
    automatic = asked.get("automatic", True)
    if not isinstance(automatic, bool):
        raise UnreadableMessage(f"automatic = {shortened(automatic)} is not allowed; allowed: true or false")
    return Apply(thresholds=parse_thresholds(asked["apply"]), automatic=automatic)


def _configure(asked: dict[str, Any]) -> Configure:
    revision, settings = asked.get("revision"), asked["settings"]
    if type(revision) is not int or revision < 1:
        raise UnreadableMessage(f"revision = {shortened(revision)} is not allowed; allowed: an integer >= 1")
    if not isinstance(settings, dict):
        raise UnreadableMessage(f"settings = {shortened(settings)} is not allowed; allowed: an object")
    return Configure(settings=settings, revision=revision)


# Answers of an engine.


def answer_of(answer: Ack | Telemetry | Stats) -> bytes:
    """An answer as JSON."""
    text: bytes = _ADAPTERS[type(answer)].dump_json(answer)
    return text


def with_delivered(telemetry: bytes, delivered: Iterable[Delivered]) -> bytes:
    """An engine's telemetry together with the outputs that its replica delivered; any other answer unchanged."""
    answer = from_json(telemetry)
    if "engine_id" not in answer:
        return telemetry
    answer["delivered"] = _DELIVERED.dump_python(tuple(delivered), mode="json")
    return to_json(answer)


def read_answer(text: bytes, kind: type[_Answer]) -> _Answer:
    """The answer to a question for `kind`; unknown keys are ignored.

    Raises:
        OtherSchema: the replica uses another schema version.
        QuestionFailed: the replica could not answer.
        UnreadableMessage: a missing key or an invalid value.
    """
    answer = _object(text)
    schema = answer.get("schema")
    if schema != SCHEMA:
        raise OtherSchema("the replica", schema)
    if kind is not Ack and answer.get("accepted") is False:
        raise QuestionFailed(str(answer.get("reason")))
    try:
        read: _Answer = _ADAPTERS[kind].validate_python(answer, extra="ignore")
    except ValidationError as error:
        raise UnreadableMessage(f"the replica's {kind.__name__.lower()} cannot be read: {_first(error)}") from error
    return read


def _text(message: dict[str, Any]) -> bytes:
    return to_json({"schema": SCHEMA, **message}, inf_nan_mode="null")


def _object(text: bytes) -> dict[str, Any]:
    try:
        message = from_json(text)
    except ValueError as error:
        raise UnreadableMessage(f"not understood: {error}") from error
    if not isinstance(message, dict):
        raise UnreadableMessage(f"not understood: {str(message)[:_LONGEST_SHOWN]} is not a JSON object")
    return message


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
