"""The segments of Nested WAIT (arXiv 2504.11320, Algorithm 2): who waits at which output-length boundary.

Segment k covers the decode stages (l'_{k-1}, l'_k]. A request whose answer is not over at l'_{k-1} queues there, its KV
kept, until n_k of them do. Used by `nested_wait`, and by `wait` for the requests whose length nobody declared.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection

from scheduler.policies.base import Snapshot, stages_of
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds


class Segments:
    """Boundary queues of the requests of unknown length; without segments nobody ever waits."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._n = tuple(segment.n for segment in thresholds.segments)
        self._ends = tuple(segment.end_output_tokens for segment in thresholds.segments)
        # The stage at which segment k+1's queue stands; beyond the last boundary nobody waits.
        self._queue_at = {end: index + 1 for index, end in enumerate(self._ends[:-1])}
        self._max_hold_s = thresholds.max_hold_s
        self._held_since_s: dict[str, float] = {}
        self._passed: dict[str, int] = {}

    @property
    def entry_n(self) -> int | None:
        """n_1, the group size at the entry; None without segments."""
        return self._n[0] if self._n else None

    def sit_out(self, snapshot: Snapshot, *, entering: bool) -> set[str]:
        """Serving mode: who is held at a boundary now. Each hold ends when n_k stand there or after `max_hold_s`.

        Requests inside a segment always run, and if everybody stood at a boundary nobody would be held (`entering`
        tells that new requests keep the engine busy).
        """
        if not self._queue_at:
            return set()
        queues: dict[int, list[str]] = {}
        for place, stage in enumerate(stages_of(snapshot.running)):
            if stage in self._queue_at and (resident := snapshot.running[place]).type_name == UNKNOWN_TYPE:
                queues.setdefault(self._queue_at[stage], []).append(resident.request_id)
        self._forget_all_but(queues)

        held: set[str] = set()
        for index, request_ids in queues.items():
            newcomers = [name for name in request_ids if self._passed.get(name) != index]
            for name in newcomers:
                self._held_since_s.setdefault(name, snapshot.now_s)
            complete = len(newcomers) >= self._n[index]
            for name in newcomers:
                if complete or snapshot.now_s - self._held_since_s[name] >= self._max_hold_s:
                    self._passed[name] = index
                else:
                    held.add(name)
        everybody_held = len(held) == len(snapshot.running)
        return set() if everybody_held and not entering and not snapshot.released else held

    def decide_strictly(self, snapshot: Snapshot) -> tuple[int, set[str]]:
        """The paper's letter: how many enter segment 1, and who sits out.

        Segment k runs only if n_k stand at its queue and every earlier segment runs; a running segment advances at most
        n_k requests per stage; a held segment holds all later ones.
        """
        view = snapshot.waiting.get(UNKNOWN_TYPE)
        waiting = view.length if view else 0
        residents = [r for r in snapshot.running if r.type_name == UNKNOWN_TYPE and r.stage > 0]
        if not self._n:
            return waiting, set()
        standing = Counter(self._queue_at[r.stage] for r in residents if r.stage in self._queue_at)
        running_segments = 0
        for index, n in enumerate(self._n):
            if (waiting if index == 0 else standing[index]) < n:
                break
            running_segments += 1

        sit_out: set[str] = set()
        at_stage: Counter[int] = Counter()
        for resident in residents:
            segment = self._segment_entered_next(resident.stage)
            at_stage[resident.stage] += 1
            if segment >= running_segments or at_stage[resident.stage] > self._n[segment]:
                sit_out.add(resident.request_id)
        return (min(self._n[0], waiting) if running_segments else 0), sit_out

    def at_boundary(self, snapshot: Snapshot, sit_out: Collection[str]) -> set[str]:
        """Of those who sit out, those that stand at a boundary: the paper's memory repair evicts these."""
        return {
            resident.request_id for resident in snapshot.running
            if resident.stage in self._queue_at and resident.request_id in sit_out
        }

    def _segment_entered_next(self, stage: int) -> int:
        """The segment (from 0) that the next token of a request at `stage` belongs to; past the end, the last."""
        return min(bisect_left(self._ends, stage + 1), len(self._ends) - 1)

    def _forget_all_but(self, queues: dict[int, list[str]]) -> None:
        if self._held_since_s:
            present = {name for names in queues.values() for name in names}
            self._held_since_s = {name: since for name, since in self._held_since_s.items() if name in present}
            self._passed = {name: index for name, index in self._passed.items() if name in present}
