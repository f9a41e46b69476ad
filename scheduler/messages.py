"""What crosses the boundary of an engine-core process, besides `Thresholds`: one module, all of it frozen.

Telemetry leaves the engine, acknowledgements answer thresholds. Times are seconds on the engine's own monotonic
clock (`Telemetry.clock_s` is its "now"), so that no two machines' clocks are ever compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import TypeAdapter

from scheduler.thresholds import EngineLimits, Thresholds


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
    `records_lost` is 1 when some were overwritten before anybody asked. `delivered` are the latest answers as they
    left the replica, whatever the cursor, with numbers of their own; the replica adds them to what its engine tells.
    """

    engine_id: str
    clock_s: float
    cursor: int
    limits: EngineLimits
    thresholds: Thresholds
    from_config: bool
    gauges: Gauges
    counters: Counters
    iterations: tuple[Iteration, ...] = ()
    arrivals: tuple[Arrival, ...] = ()
    finished: tuple[Finished, ...] = ()
    running: tuple[RunningLengths, ...] = ()
    records_lost: int = 0
    delivered: tuple[Delivered, ...] = ()

    @property
    def kv_used_fraction(self) -> float:
        """Share of the KV cache in use, from 0 to 1."""
        return self.gauges.kv_used_tokens / self.limits.kv_capacity_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """The answer to thresholds: whether they were taken, and what is in force now either way.

    A refusal has a `reason` in words and a `code`: stale (an older version), pinned (by an operator), invalid (the
    values), unavailable (the engine does not answer; `version_in_force` is -1, unknown).
    """

    accepted: bool
    version_in_force: int
    reason: str = ""
    code: Literal["", "stale", "pinned", "invalid", "unavailable"] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Put `thresholds` in force. `automatic` is the controller speaking; a pin set by an operator refuses it.

    `version` 0 means "one more than the version in force".
    """

    thresholds: Thresholds
    automatic: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Send telemetry with the records after `cursor`; None asks for no records at all."""

    cursor: int | None = 0


TELEMETRY: TypeAdapter[Telemetry] = TypeAdapter(Telemetry)
ACK: TypeAdapter[Ack] = TypeAdapter(Ack)
