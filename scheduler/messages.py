"""The messages between an engine-core process and the rest of the cluster, besides `Thresholds`; all frozen.

Telemetry and stats leave the engine, acknowledgements answer thresholds; `scheduler.wire` is their JSON. Times are
seconds on the engine's own monotonic clock (`Telemetry.clock_s` is its "now"), so that no two machines' clocks are
ever compared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Annotated, Any, NamedTuple, get_type_hints

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from scheduler.digest import Digest
from scheduler.thresholds import EngineLimits, Thresholds, thresholds_as_dict

SCHEMA = 1
"""The version of the messages' keys; what raises it is in `scheduler.wire`."""


class Iteration(NamedTuple):
    """One executed iteration: the record from which the iteration-time model is fitted."""

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
    """One request that left the engine; `aborted`: its output is incomplete.

    cached_tokens: prompt tokens found in the prefix cache; shared_tokens: of these, the tokens in blocks that other
    requests held too. ttft_s, tpot_s: as measured in the engine (None: no token, or a single one).
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
    """One completed output, timed where it left the replica's API process (`replicas.delivery`).

    delay_s: from the engine core's first token until its chunk left; None without streaming.
    tpot_s: seconds per further token, between the first and the last chunk (None: a single token).
    """

    seq: int
    delay_s: float | None
    tpot_s: float | None


class RunningLengths(NamedTuple):
    """One running request: a right-censored observation of an output length."""

    prompt_tokens: int
    output_tokens: int


class ByColumn:
    """A tuple of records as JSON: one array for each field, under the field's name.

    As short as arrays by position, but readers of another version find each value by name: unknown columns are ignored,
    missing ones take the field's default, and a missing column without a default is an error. A record's first field
    has none.
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
    """The engine's state after its latest scheduling decision.

    running: requests that the engine computes. waiting: requests in the admission queue. held: of these, the ones held
    there for a threshold. sitting_out: admitted requests that are paused. kv_used_tokens: KV cache in use.
    """

    running: int = 0
    waiting: int = 0
    held: int = 0
    sitting_out: int = 0
    kv_used_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Totals since the engine started; a request is one choice, so `n` > 1 counts n times.

    arrivals: requests that reached the engine: completed, aborted, rejected, recalled, and those in flight.
    completed: ended as OpenAI's do. aborted: by the client, the server or an error. rejected: before any work.
    recalled: before any work, from an engine that stops. preemptions: running requests whose memory was taken.
    iterations: steps of the engine. held: requests that were held for a threshold. hold_s: seconds that released
        requests were held in the admission queue, summed.
    rejected_too_late: for a first token that would come too late. rejected_queue_full: beyond the queue limit.
    rejected_front_door: by the ingress, for this engine; with the two before it, all of rejected.
    good: completed requests that met every target active when they ended, or ended without one.
    recomputed_tokens: tokens to be computed again when preempted requests resumed.
    ttft_misses, tpot_misses, latency_misses: completed requests that missed the target active when they ended.
    audited: completed requests served although they would have been rejected; audited_met: of these, the ones that
        met every target, though some may have displaced others.
    decode_steps: with speculative decoding, steps of decoding requests that gained output tokens;
        decode_computed_tokens: tokens computed in them, drafts included; decode_gained_tokens: output tokens gained
        (without rejected drafts and without tokens past the end); decode_gained_squares: sum of their squares.
    prompt_tokens: of requests that have begun; cached_tokens: of these, found in the prefix cache.
    """

    arrivals: int = 0
    completed: int = 0
    aborted: int = 0
    rejected: int = 0
    recalled: int = 0
    rejected_too_late: int = 0
    rejected_queue_full: int = 0
    rejected_front_door: int = 0
    good: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
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
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def in_flight(self) -> int:
        """Waiting and running requests."""
        return self.arrivals - self.completed - self.aborted - self.rejected - self.recalled


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """The full report of one engine.

    iterations, arrivals, finished: records newer than the reader's cursor. cursor: what to send next time; the same
        cursor gives the same records again, so a lost answer loses nothing.
    records_lost: 1 when records were overwritten before they were read.
    running: lengths of the requests that run now.
    delivered: the latest outputs as they left the replica, whatever the cursor, numbered separately; added by the
        replica.
    draining: the engine has been asked to `Drain`.
    settings: the settings in force, as `scheduler.settings.LiveSettings` writes them (None: not known).
    digest: in place of the records, what its replica made of them.
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
    draining: bool = False
    settings: dict[str, Any] | None = None
    digest: Digest | None = None

    @property
    def kv_used_fraction(self) -> float:
        """Share of the KV cache in use, from 0 to 1."""
        return self.gauges.kv_used_tokens / self.limits.kv_capacity_tokens

    def shown(self) -> dict[str, Any]:
        """The engine's own part of a state that people and programs read: JSON-ready, without the records."""
        return {
            "engine_id": self.engine_id,
            "thresholds": thresholds_as_dict(self.thresholds),
            "from_config": self.from_config,
            "draining": self.draining,
            "settings": self.settings,
            **asdict(self.gauges),
            "kv_used_fraction": self.kv_used_fraction,
            "limits": asdict(self.limits),
            "slots": slots_of(self.limits, self.thresholds),
            "counters": asdict(self.counters) | {"in_flight": self.counters.in_flight},
            "preemptions": self.counters.preemptions,
        }


def slots_of(limits: EngineLimits, thresholds: Thresholds) -> int:
    """The requests that may run before an engine counts as full: `max_running`.

    Without it, the running requests at capacity by the fluid parameters, so that a slow engine, or one with long
    outputs, is full with fewer requests; else the engine's own limit.
    """
    at_capacity = thresholds.fluid.running_at_capacity if thresholds.fluid else None
    most = limits.max_num_seqs
    slots = most if at_capacity is None else min(most, max(1, round(at_capacity)))
    return thresholds.max_running or slots


class Room(NamedTuple):
    """What an admission queue takes; the fields are those of `Stats`."""

    room: int | None = None
    drain_rps: float = 0.0
    retry_after_s: float = 0.0


class Outlook(NamedTuple):
    """What a request has to expect that arrives at an engine now; seconds.

    wait_s: until its prompt's turn. prompt_s: for each prompt token, where nothing else is computed. token_s: for each
    output token. added_s: by how much each request that is sent there makes every output token take longer. limit_s:
    the planned time for an output token, of which prompts get what `token_s` leaves (0: prompts wait for nothing).
    output_tokens: output tokens of a usual request.
    """

    wait_s: float
    prompt_s: float
    token_s: float
    added_s: float
    limit_s: float
    output_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The figures of one engine that routing and readiness need; of constant size.

    slots: requests that may run before the engine counts as full; running, waiting: requests; KV in tokens;
    thresholds_version: version of the active thresholds. steps: scheduling decisions since the engine started; while it
        has requests, a working engine takes one each iteration (`replicas.engine_health`). draining: nothing more is
        admitted.
    room: how many more requests the admission queue takes now before it rejects one (None: it rejects none); drain_rps:
        requests per second that leave the queue while it is full (0: not known); retry_after_s: seconds in which the
        queue drains, for a `Retry-After` without its jitter. outlook: of a request that arrives now (None: the policy
        does not predict it). prompt_tokens, cached_tokens: as in `Counters`.
    """

    schema: int = SCHEMA
    engine_id: str
    slots: int
    running: int
    waiting: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    thresholds_version: int
    steps: int = 0
    draining: bool = False
    room: int | None = None
    drain_rps: float = 0.0
    retry_after_s: float = 0.0
    outlook: Outlook | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @classmethod
    def of_engine(
        cls, engine_id: str, limits: EngineLimits, thresholds: Thresholds, gauges: Gauges, steps: int = 0,
        room: Room | None = None, outlook: Outlook | None = None, *, draining: bool = False, prompt_tokens: int = 0,
        cached_tokens: int = 0,
    ) -> Stats:
        """The stats of an engine under `thresholds`."""
        return cls(
            engine_id=engine_id, slots=slots_of(limits, thresholds), running=gauges.running, waiting=gauges.waiting,
            kv_used_tokens=gauges.kv_used_tokens, kv_capacity_tokens=limits.kv_capacity_tokens,
            thresholds_version=thresholds.version, steps=steps, draining=draining, outlook=outlook,
            prompt_tokens=prompt_tokens, cached_tokens=cached_tokens, **(room._asdict() if room else {}),
        )

    @property
    def kv_used_fraction(self) -> float:
        """Share of the KV cache in use, from 0 to 1."""
        return self.kv_used_tokens / self.kv_capacity_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """The answer to offered thresholds or settings: accepted or not, and the version that is active now.

    A rejection has a `reason` in words and a `code`: stale (an older version), pinned (by an operator), invalid (the
    values, or an unreadable question), schema (a message of another schema version), unavailable (the engine does not
    answer). active_version: the active version; -1: not known.
    """

    schema: int = SCHEMA
    accepted: bool
    active_version: int
    reason: str = ""
    code: str = ""

    @classmethod
    def without_version(cls, reason: str, code: str = "unavailable") -> Ack:
        """Not accepted, and the active version is not known: the engine does not answer, or not this question."""
        return cls(accepted=False, active_version=-1, reason=reason, code=code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Make `thresholds` active. automatic: sent by the controller, and rejected while an operator's pin is set.

    Version 0 means the active version plus one.
    """

    thresholds: Thresholds
    automatic: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Configure:
    """Replace the engine's settings. settings: an object that `scheduler.settings.LiveSettings` reads; revision: grows
    with each change, so that a late message undoes nothing."""

    settings: dict[str, Any]
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Send telemetry with the records after `cursor`; None: without records and running requests."""

    cursor: int | None = 0


@dataclass(frozen=True, slots=True)
class AskStats:
    """Send `Stats`."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Admit nothing more, and send back at once what has not begun; what has begun runs to its end.

    end: end that too, with an error.
    """

    end: bool = False
