"""What crosses the boundary of an engine-core process, besides `Thresholds`: one module, all of it frozen.

Telemetry and stats leave the engine, acknowledgements answer thresholds; `scheduler.wire` is their JSON. Times are
seconds on the engine's own monotonic clock (`Telemetry.clock_s` is its "now"), so that no two machines' clocks are
ever compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import Annotated, Any, NamedTuple, get_type_hints

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from scheduler.thresholds import EngineLimits, Thresholds

SCHEMA = 1
"""The version of the messages' keys; what raises it is in `scheduler.wire`."""


class Iteration(NamedTuple):
    """One executed engine step: the record that the service-time law is fitted from."""

    seq: int
    at_s: float
    seconds: float
    prefill_tokens: int
    decode_tokens: int
    kv_tokens: int
    batch_size: int


class Arrival(NamedTuple):
    """One request as it reached the engine; `known_output_tokens` is None when the client declared no length."""

    seq: int
    at_s: float
    prompt_tokens: int
    known_output_tokens: int | None


class Finished(NamedTuple):
    """One request that left the engine; `aborted` when it was cut short: its output tokens are no whole answer.

    cached_tokens: of its prompt, those that the prefix cache held; shared_tokens: of these, those in blocks that other
    requests held as well. ttft_s, tpot_s: as the engine saw them (None: no token, or a single one).
    """

    seq: int
    at_s: float
    prompt_tokens: int
    output_tokens: int
    aborted: bool
    cached_tokens: int = 0
    shared_tokens: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None


class Delivered(NamedTuple):
    """One answer that left a replica whole, as its API process saw it leave (`replicas.delivery`).

    delay_s: from the engine core's first token until the chunk with it left; None for an answer that was not streamed.
    tpot_s: per further token, between the first and the last chunk (None: a single token).
    """

    seq: int
    delay_s: float | None
    tpot_s: float | None


class RunningLengths(NamedTuple):
    """One request still in service: a right-censored observation of an output length."""

    prompt_tokens: int
    output_tokens: int


class ByColumn:
    """A tuple of records as JSON: one array for each field, under the field's name.

    As short as arrays by position, but a reader of another version finds each value by its name: columns it does not
    know are ignored, missing ones take the field's default, and one that has no default is an error. A record's first
    field has none.
    """

    def __init__(self, record: Any) -> None:
        self._record = record

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        columns = core_schema.typed_dict_schema({
            name: core_schema.typed_dict_field(
                core_schema.list_schema(handler.generate_schema(hint)),
                required=name not in self._record._field_defaults,
            )
            for name, hint in get_type_hints(self._record).items()
        })
        written = core_schema.plain_serializer_function_ser_schema(self._columns, return_schema=columns)
        return core_schema.no_info_after_validator_function(self._rows, columns, serialization=written)

    def _columns(self, records: tuple[Any, ...]) -> dict[str, list[Any]]:
        columns = zip(*records, strict=True) if records else repeat(())
        return {name: list(column) for name, column in zip(self._record._fields, columns, strict=False)}

    def _rows(self, columns: dict[str, list[Any]]) -> tuple[Any, ...]:
        fields, defaults = self._record._fields, self._record._field_defaults
        count = len(columns[fields[0]])
        every = (columns[name] if name in columns else repeat(defaults[name], count) for name in fields)
        return tuple(map(self._record._make, zip(*every, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """The engine's state after its latest scheduling decision. Counts of requests, KV in tokens."""

    running: int = 0
    waiting: int = 0
    held: int = 0
    sitting_out: int = 0
    kv_used_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Totals since the engine started; `hold_s` is the time all released requests spent held at the gate.

    Each request that arrived is in one of four: completed, aborted (cut short by its client, the server or an error),
    rejected (before it had cost anything), or still in flight. A request here is one choice: `n` > 1 counts n times.
    ttft_misses, tpot_misses, latency_misses: completed requests that missed the target in force when they ended.
    audited: completed requests that would have been rejected but were served to see whether that was right;
    audited_met: those of them that met every target, though some may have taken another's place.
    decode_steps: with speculative decoding, how often a decoding request got output tokens from an iteration;
    decode_computed_tokens: tokens computed for it then, drafts included; decode_gained_tokens: output tokens that came
    of it (without refused drafts and what is beyond an answer's end), decode_gained_squares the sum of their squares.
    """

    arrivals: int = 0
    completed: int = 0
    aborted: int = 0
    rejected: int = 0
    preemptions: int = 0
    iterations: int = 0
    held: int = 0
    hold_s: float = 0.0
    ttft_misses: int = 0
    tpot_misses: int = 0
    latency_misses: int = 0
    audited: int = 0
    audited_met: int = 0
    decode_steps: int = 0
    decode_computed_tokens: int = 0
    decode_gained_tokens: int = 0
    decode_gained_squares: int = 0

    @property
    def in_flight(self) -> int:
        """Requests that wait or are in service."""
        return self.arrivals - self.completed - self.aborted - self.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """Everything one engine tells about itself.

    Records newer than the cursor that the reader sent are in `iterations`, `arrivals` and `finished`; `cursor` is what
    to send next time. Asking twice with the same cursor gives the same records, so a lost answer loses nothing;
    `records_lost` is 1 when some were overwritten before they were asked for. `running` are the lengths of the requests
    in service now. `delivered` are the latest answers as they left the replica, whatever the cursor, with numbers of
    their own; the replica adds them to what its engine tells.
    """

    schema: int = SCHEMA
    engine_id: str
    clock_s: float
    cursor: int
    limits: EngineLimits
    thresholds: Thresholds
    from_config: bool
    gauges: Gauges
    counters: Counters
    iterations: Annotated[tuple[Iteration, ...], ByColumn(Iteration)] = ()
    arrivals: Annotated[tuple[Arrival, ...], ByColumn(Arrival)] = ()
    finished: Annotated[tuple[Finished, ...], ByColumn(Finished)] = ()
    running: Annotated[tuple[RunningLengths, ...], ByColumn(RunningLengths)] = ()
    records_lost: int = 0
    delivered: Annotated[tuple[Delivered, ...], ByColumn(Delivered)] = ()

    @property
    def kv_used_fraction(self) -> float:
        """Share of the KV cache in use, from 0 to 1."""
        return self.gauges.kv_used_tokens / self.limits.kv_capacity_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What routing and readiness need of one engine: a few numbers, whatever the number of its requests.

    slots: requests that may run at once before the engine counts as full; running, waiting: requests; KV in tokens;
    thresholds_version: the version of the thresholds in force.
    """

    schema: int = SCHEMA
    engine_id: str
    slots: int
    running: int
    waiting: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    thresholds_version: int

    @classmethod
    def of_engine(cls, engine_id: str, limits: EngineLimits, thresholds: Thresholds, gauges: Gauges) -> Stats:
        """The stats of an engine under `thresholds`.

        Its slots are the cap `max_running`; without one, what the fluid parameters expect to run at capacity, so that
        a slow engine, or one with long answers, is full with fewer requests than another; else the engine's own limit.
        """
        at_capacity = thresholds.fluid.running_at_capacity if thresholds.fluid else None
        most = limits.max_num_seqs
        slots = most if at_capacity is None else min(most, max(1, round(at_capacity)))
        return cls(
            engine_id=engine_id, slots=thresholds.max_running or slots, running=gauges.running, waiting=gauges.waiting,
            kv_used_tokens=gauges.kv_used_tokens, kv_capacity_tokens=limits.kv_capacity_tokens,
            thresholds_version=thresholds.version,
        )

    @property
    def kv_used_fraction(self) -> float:
        """Share of the KV cache in use, from 0 to 1."""
        return self.kv_used_tokens / self.kv_capacity_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """The answer to thresholds: whether they were taken, and what is in force now either way.

    A rejection has a `reason` in words and a `code`: stale (an older version), pinned (by an operator), invalid (the
    values, or a question that is not understood), schema (a message of another schema version), unavailable (the engine
    does not answer). `version_in_force` is -1 where it is not known.
    """

    schema: int = SCHEMA
    accepted: bool
    version_in_force: int
    reason: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Put `thresholds` in force. `automatic` is the controller speaking; a pin set by an operator rejects it.

    `version` 0 means "one more than the version in force".
    """

    thresholds: Thresholds
    automatic: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Send telemetry with the records after `cursor`; None asks for no records, nor for what runs."""

    cursor: int | None = 0


@dataclass(frozen=True, slots=True)
class AskStats:
    """Send `Stats`."""
