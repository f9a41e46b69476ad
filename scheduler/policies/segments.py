"""The segments of Nested WAIT (arXiv 2504.11320, Algorithm 2): boundary queues between ranges of output length.

Segment k covers the decode stages (l'_{k-1}, l'_k]. A request whose output continues past l'_{k-1} waits there, its KV
kept, until n_k requests do; then n_k go on. n_k is the `stage_limit` of the segment's total in the segment's own
iteration count: below one request per stage it is 1 in some iterations and 0 in others. The count advances only when
the segment runs, so an incomplete group keeps its place.
Used by `nested_wait`, and by `wait` for requests of undeclared length.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection

from scheduler.model.rotation import stage_lengths, stage_limit
from scheduler.policies.base import RunningRequest, Snapshot
from scheduler.policies.holds import Holds
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds


class Segments:
    """Boundary queues of the requests of unknown length; without segments no request waits."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._ends = tuple(segment.end_output_tokens for segment in thresholds.segments)
        self._starts = (0, *self._ends[:-1])
        self._stages = stage_lengths(self._ends)
        self._totals = tuple(segment.total for segment in thresholds.segments)
        self._steps = [0] * len(self._ends)
        # The stages at which requests wait for segment k+1; no request waits beyond the last boundary.
        self._queue_at: dict[int, int] = {}
        self._widest = -1
        self._stand_within(0)
        self._max_hold_s = thresholds.max_hold_s
        self._holds = Holds()

    def _limit(self, segment: int, position: int = 0) -> int:
        """n_k at one of a segment's stages (from 0) in the segment's present iteration."""
        return stage_limit(self._totals[segment], self._stages[segment], self._steps[segment] - position)

    def entering(self, waiting: int, slots: int, *, at_once: bool) -> int:
        """Serving mode, once per iteration: number of waiting requests that enter segment 1.

        at_once: an incomplete group enters too, because its hold is over or the engine is idle.
        """
        able = min(waiting, slots)
        if not self._totals:
            return able
        n = self._limit(0)
        at_once = at_once and able > 0
        if able < n and not at_once:
            return 0
        self._steps[0] += 1
        return min(able, max(n, 1) if at_once else n)

    def _stand_within(self, tokens: int) -> None:
        """Accept a request at a boundary when it is up to `tokens` tokens past it."""
        if tokens != self._widest:
            self._widest = tokens
            self._queue_at = {
                end + beyond: index + 1 for index, end in enumerate(self._ends[:-1]) for beyond in range(tokens + 1)
            }

    def sit_out(self, snapshot: Snapshot, *, entering: bool) -> set[str]:
        """Serving mode: the requests that are held at a boundary now.

        A hold ends when n_k requests wait or after `max_hold_s`. A request with its boundary token still in flight
        may be finished: it does not count yet, and does not pass. Requests inside a segment always run. If all requests
        are at a boundary none is held, unless new requests keep the engine busy (`entering`).
        """
        if not self._queue_at:
            return set()
        # A step may cross a boundary by all of its tokens but one, and so may a step that was under way meanwhile.
        self._stand_within(2 * (snapshot.most_step_tokens - 1))
        queues: dict[int, list[RunningRequest]] = {index: [] for index in self._queue_at.values()}
        for place, stage in enumerate(snapshot.running.stages()):
            if stage in self._queue_at and (request := snapshot.running[place]).type_name == UNKNOWN_TYPE:
                queues[self._queue_at[stage]].append(request)
        self._holds.forget_all_but({one.request_id for running in queues.values() for one in running})

        held: set[str] = set()
        for index, running in queues.items():
            newcomers = [one for one in running if not self._holds.has_passed(one.request_id, index)]
            for one in newcomers:
                self._holds.stands(one.request_id, snapshot.now_s)
            passing = self._passing(index, newcomers, snapshot.now_s)
            for name in passing:
                self._holds.let_over(name, index)
            held |= {one.request_id for one in newcomers} - passing
        all_held = len(held) == len(snapshot.running)
        return set() if all_held and not entering and not snapshot.released else held

    def _passing(self, index: int, newcomers: list[RunningRequest], now_s: float) -> set[str]:
        """The requests that pass a boundary now: a full group, oldest first, and requests whose hold is over."""
        n = self._limit(index)
        standing = [one.request_id for one in newcomers if not one.tokens_in_flight]
        standing.sort(key=self._holds.since_s)
        passing = {
            one.request_id for one in newcomers if self._holds.is_over(one.request_id, now_s, self._max_hold_s)
        }
        if passing or len(standing) >= n:
            self._steps[index] += 1
        return passing.union(standing[:n]) if len(standing) >= n else passing

    def decide_strictly(self, snapshot: Snapshot) -> tuple[int, set[str]]:
        """The paper's rule: the number of requests that enter segment 1, and the requests that pause.

        Segment k runs only if n_k requests wait at its entry and every earlier segment runs; a running segment advances
        at most n_k requests per stage; a held segment holds all later ones.
        """
        view = snapshot.waiting.get(UNKNOWN_TYPE)
        waiting = view.length if view else 0
        running = [r for r in snapshot.running if r.type_name == UNKNOWN_TYPE and r.stage > 0]
        if not self._totals:
            return waiting, set()
        standing = Counter(
            self._queue_at[r.stage] for r in running if r.stage in self._queue_at and not r.tokens_in_flight
        )
        under_way = any(r.tokens_in_flight for r in running)
        for _ in range(max(self._stages)):
            running_segments = self._running_segments(waiting, standing)
            entering = min(self._limit(0), waiting) if running_segments else 0
            sit_out = self._held_strictly(running, running_segments)
            for index in range(running_segments):
                self._steps[index] += 1
            # An iteration with n_k = 0 for every request takes no time.
            if entering or len(sit_out) < len(running) or not running_segments or under_way:
                break
        return entering, sit_out

    def _running_segments(self, waiting: int, standing: Counter[int]) -> int:
        for index in range(len(self._totals)):
            if (waiting if index == 0 else standing[index]) < self._limit(index):
                return index
        return len(self._totals)

    def _held_strictly(self, running: list[RunningRequest], running_segments: int) -> set[str]:
        sit_out: set[str] = set()
        at_stage: Counter[int] = Counter()
        for request in running:
            stage, segment = request.stage, self._segment_entered_next(request.stage)
            unfinished = stage not in self._queue_at or not request.tokens_in_flight
            at_stage[stage] += unfinished
            room = segment < running_segments and at_stage[stage] <= self._limit(segment, stage - self._starts[segment])
            if not (room and unfinished):
                sit_out.add(request.request_id)
        return sit_out

    def at_boundary(self, snapshot: Snapshot, sit_out: Collection[str]) -> set[str]:
        """The paused requests at a boundary: the paper's memory repair evicts these."""
        return {
            request.request_id for request in snapshot.running
            if request.stage in self._queue_at and request.request_id in sit_out
        }

    def _segment_entered_next(self, stage: int) -> int:
        """The segment (from 0) of the next token of a request at `stage`; past the end, the last one."""
        return min(bisect_left(self._ends, stage + 1), len(self._ends) - 1)
