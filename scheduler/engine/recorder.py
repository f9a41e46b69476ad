"""Records of one engine between two reports: iterations, arrivals, finished requests, totals.

The engine's thread writes them between iterations, the channel's thread reads them: both only append to or copy bounded
deques, which CPython does atomically, so neither waits for the other.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from types import SimpleNamespace
from typing import TypeVar

from scheduler.messages import Arrival, Counters, Finished, Gauges, Iteration
from scheduler.rejection import Kind

KEPT_RECORDS = 4096
"""Records of each kind kept; at 10 ms an iteration this is 40 s, several control periods."""
_MOST_TURNED_AWAY = 8


_Record = TypeVar("_Record", Iteration, Arrival, Finished)


class Recorder:
    """Bounded records of one engine, with increasing sequence numbers."""

    def __init__(self, kept: int = KEPT_RECORDS) -> None:
        self._sequence = itertools.count(1)
        self._last_seq = 0
        self._iterations: deque[Iteration] = deque(maxlen=kept)
        self._arrivals: deque[Arrival] = deque(maxlen=kept)
        self._finished: deque[Finished] = deque(maxlen=kept)
        self._dropped_seq = self._turned_away = 0
        self.totals = SimpleNamespace(**asdict(Counters()))  # the same fields, while they still change
        self.gauges = Gauges()

    def iteration(
        self, at_s: float, seconds: float, prefill_tokens: int, decode_tokens: int, kv_tokens: int, batch_size: int
    ) -> None:
        """One executed step."""
        record = Iteration(self._next(), at_s, seconds, prefill_tokens, decode_tokens, kv_tokens, batch_size)
        self._append(self._iterations, record)
        self.totals.iterations += 1

    def arrival(self, at_s: float, prompt_tokens: int, known_output_tokens: int | None) -> None:
        """One request that reached the engine."""
        self._append(self._arrivals, Arrival(self._next(), at_s, prompt_tokens, known_output_tokens))
        self.totals.arrivals += 1

    def turned_away(self, at_s: float, count: int, prompt_tokens: int, known_output_tokens: int | None) -> None:
        """`count` requests that the ingress rejected before the one that arrives now; taken to be like it.

        They count as arrivals and as rejected. Their records are spread over the time since the latest arrival, as they
        came; more than a few are not recorded one by one, since a rate so far above capacity changes nothing more.
        """
        since_s = self._arrivals[-1].at_s if self._arrivals else at_s
        recorded = min(count, _MOST_TURNED_AWAY)
        for place in range(1, recorded + 1):
            when_s = since_s + (at_s - since_s) * place / (recorded + 1)
            self._append(self._arrivals, Arrival(self._next(), when_s, prompt_tokens, known_output_tokens))
        self.totals.arrivals += count
        self.totals.rejected += count
        self.totals.rejected_front_door += count
        self._turned_away += count

    @property
    def received(self) -> int:
        """Requests that reached this engine, without those that the ingress rejected."""
        received: int = self.totals.arrivals - self._turned_away
        return received

    def finished(
        self, at_s: float, prompt_tokens: int, output_tokens: int, *, aborted: bool, turned_away: Kind | None = None,
        cached_tokens: int = 0, shared_tokens: int = 0, ttft_s: float | None = None, tpot_s: float | None = None,
        too_late: bool = False,
    ) -> None:
        """One request that left the engine: turned away (rejected or recalled), else aborted, else completed.

        too_late: it was rejected for its own target, not for the length of the queue.
        """
        record = Finished(
            self._next(), at_s, prompt_tokens, output_tokens, aborted or turned_away is not None, cached_tokens,
            shared_tokens, ttft_s, tpot_s,
        )
        self._append(self._finished, record)
        if turned_away is Kind.REJECTED:
            self.totals.rejected += 1
            self.totals.rejected_too_late += too_late
            self.totals.rejected_queue_full += not too_late
        elif turned_away is Kind.RECALLED:
            self.totals.recalled += 1
        elif aborted:
            self.totals.aborted += 1
        else:
            self.totals.completed += 1

    def judged(self, misses: Mapping[str, bool], *, audited: bool) -> None:
        """A completed request's targets by name (ttft, tpot, latency; empty: no targets), and which it missed."""
        for name, missed in misses.items():
            setattr(self.totals, f"{name}_misses", getattr(self.totals, f"{name}_misses") + missed)
        self.totals.good += not any(misses.values())
        if audited:
            self.totals.audited += 1
            self.totals.audited_met += not any(misses.values())

    def decoded(self, computed_tokens: int, gained_tokens: int) -> None:
        """One step of one request: tokens computed, drafts included, and output tokens gained."""
        totals = self.totals
        totals.decode_steps += 1
        totals.decode_computed_tokens += computed_tokens
        totals.decode_gained_tokens += gained_tokens
        totals.decode_gained_squares += gained_tokens**2

    def released(self, held_s: float) -> None:
        """One request released after `held_s` seconds."""
        self.totals.held += 1
        self.totals.hold_s += held_s

    @property
    def latest_iteration(self) -> Iteration | None:
        """The latest executed step; None before the first."""
        return self._iterations[-1] if self._iterations else None

    def counters(self) -> Counters:
        """The totals, frozen."""
        return Counters(**vars(self.totals))

    @property
    def cursor(self) -> int:
        """The sequence number of the newest record."""
        return self._last_seq

    def since(
        self, cursor: int | None, until: int | None = None
    ) -> tuple[tuple[Iteration, ...], tuple[Arrival, ...], tuple[Finished, ...], bool]:
        """Records newer than `cursor`, up to `until`, by kind; and whether newer ones were overwritten already.

        A cursor of an earlier engine process (above every number given here) counts as 0; None: no records.
        """
        if cursor is None:
            return (), (), (), False
        if until is None:
            until = self._last_seq
        if not 0 <= cursor <= self._last_seq:
            cursor = 0
        iterations, arrivals, finished = (
            _between(self._iterations, cursor, until),
            _between(self._arrivals, cursor, until),
            _between(self._finished, cursor, until),
        )
        # Checked last, so that records overwritten during the copy count as lost.
        return iterations, arrivals, finished, self._dropped_seq > cursor

    def _next(self) -> int:
        return next(self._sequence)

    def _append(self, records: deque[_Record], record: _Record) -> None:
        if len(records) == records.maxlen:
            self._dropped_seq = max(self._dropped_seq, records[0].seq)
        records.append(record)
        self._last_seq = record.seq


def _between(records: deque[_Record], cursor: int, until: int) -> tuple[_Record, ...]:
    return tuple(record for record in tuple(records) if cursor < record.seq <= until)
