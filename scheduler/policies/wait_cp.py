"""`wait_cp`: WAIT with chunked prefill, as in the experiments of its authors (arXiv 2504.11320).

Source: `general_nested_chunked` in the authors' repository. Segments as in `nested_wait`, but each is judged alone.
Decides: segment k takes B_k div δ_k requests from its entry in an iteration, one more in B_k mod δ_k of every δ_k
(`scheduler.model.rotation`), and never contains more than B_k; requests inside a segment move on. The entry of segment
1 is the admission queue, that of a later one its boundary queue. With `wait_gate` an entry opens only when as many
requests wait there as may enter in this iteration, or when the segment is full. A prompt is computed in chunks of
`prefill_chunk_tokens`, and `token_gate` gives the tokens of an iteration.
In `strict` mode a closed wait gate stops the whole segment, as in the authors' code, except prompts in progress and the
entry of segment 1. In `serving` mode only entries wait, at a boundary at most `max_hold_s` whatever the wait gate and
B_k, and an idle engine admits a request at once.
Parameters: `segments` (boundary and B_k each), `max_running` (the authors' total limit), `wait_gate`,
`prefill_chunk_tokens`, `token_budget`, `max_hold_s`.
When not to use it: below the load at which the cap is reached, where it only delays admission.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field

from scheduler.model.rotation import stage_lengths, stage_limit
from scheduler.policies.base import Decision, Policy, RunningRequest, Snapshot
from scheduler.policies.holds import Holds
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds


def token_gate(cap: int, *, prefill_chunks: float, output_tokens: float, chunk_tokens: int) -> int:
    """Tokens of an iteration: those of `cap` running requests spread evenly over their stages.

    prefill_chunks: iterations that a prompt takes, K = ⌈l/cs⌉, and output_tokens, l', both means over requests. Of the
    cap tl, P = tl/(K + l') are in each stage: ⌈(tl − P·K) + P·K·cs⌉.
    """
    prefilling = cap / (prefill_chunks + output_tokens) * prefill_chunks
    return math.ceil(cap - prefilling + prefilling * chunk_tokens - 1e-9)


@dataclass(slots=True)
class _Segment:
    """The requests of a segment: inside, standing at its entry, and arriving there with a token still in flight.

    In segment 1 the arriving requests are the prompts in progress. waiting: these and the admission queue.
    """

    standing: list[str] = field(default_factory=list)
    arriving: list[str] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)
    waiting: int = 0

    @property
    def entry_count(self) -> int:
        return self.waiting + len(self.standing)


class WaitCp(Policy):
    """Entries by rotation, a cap on every segment, and the wait gate."""

    name = "wait_cp"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._ends = tuple(segment.end_output_tokens for segment in thresholds.segments)
        self._stages = stage_lengths(self._ends)
        self._caps = tuple(segment.total for segment in thresholds.segments)
        self._iteration = 0
        self._holds = Holds()

    def decide(self, snapshot: Snapshot) -> Decision:
        """Choose the requests that enter each segment; a request at a boundary that does not enter pauses."""
        view, slots = snapshot.waiting.get(UNKNOWN_TYPE), self.free_slots(snapshot)
        waiting = view.length if view else 0
        if not self._ends:
            return Decision({UNKNOWN_TYPE: slots} if slots else {})
        limits = [
            stage_limit(cap, stages, self._iteration) for cap, stages in zip(self._caps, self._stages, strict=True)
        ]
        self._iteration += 1
        segments = self._segments(snapshot, waiting)
        opened = [
            not self.thresholds.wait_gate or segment.entry_count >= limit
            or segment.entry_count + len(segment.inside) >= cap
            for segment, limit, cap in zip(segments, limits, self._caps, strict=True)
        ]
        sit_out: set[str] = set()
        for index in range(1, len(segments)):
            room = min(limits[index], self._caps[index] - len(segments[index].inside))
            sit_out |= self._held_at(index, segments[index], max(0, room) if opened[index] else 0, snapshot.now_s)
        entering = min(limits[0], max(0, self._caps[0] - self._occupied(segments[0])), slots)
        if self.strict:
            for segment, is_open in zip(segments, opened, strict=True):
                sit_out.update(() if is_open else segment.inside)
        else:
            if view is None or (not opened[0] and not self.hold_is_over(view, snapshot)):
                entering = 0
            if snapshot.idle:
                entering = max(1, entering)
            entering = min(entering, slots)
            if len(sit_out) == len(snapshot.running) and not entering and not snapshot.released:
                sit_out -= self._one_of(segments)  # all segments are empty, so no cap is reached
        admit = {UNKNOWN_TYPE: entering} if entering else {}
        return Decision(admit, sit_out, evict_first=self._boundary(segments, sit_out) if self.strict else ())

    def _segments(self, snapshot: Snapshot, waiting: int) -> list[_Segment]:
        segments = [_Segment() for _ in self._ends]
        present: set[str] = set()
        for request in (*snapshot.running, *snapshot.released_requests):
            self._place(request, segments, present)
        segments[0].waiting += waiting
        self._holds.forget_all_but(present)
        return segments

    def _place(self, request: RunningRequest, segments: list[_Segment], present: set[str]) -> None:
        name, stage = request.request_id, request.stage
        if stage == 0:
            segments[0].waiting += 1
            segments[0].arriving.append(name)
            return
        index = bisect_left(self._ends, stage)
        if index < len(self._ends) - 1 and stage == self._ends[index]:
            present.add(name)
            segment = segments[index + 1]
            if self._holds.has_passed(name, index + 1):
                segment.inside.append(name)
            elif request.tokens_in_flight:  # it may be finished
                segment.arriving.append(name)
            else:
                segment.standing.append(name)
        else:
            segments[min(index, len(segments) - 1)].inside.append(name)

    def _occupied(self, first: _Segment) -> int:
        return len(first.arriving) + len(first.inside)

    def _held_at(self, index: int, segment: _Segment, room: int, now_s: float) -> set[str]:
        """The requests of a boundary queue that do not enter now; the longest hold enters first."""
        held: set[str] = set(segment.arriving)
        for name in segment.standing + segment.arriving:
            self._holds.stands(name, now_s)
        for name in sorted(segment.standing, key=self._holds.since_s):
            over = not self.strict and self._holds.is_over(name, now_s, self.thresholds.max_hold_s)
            if room > 0 or over:
                room -= 1
                self._holds.let_over(name, index)
            else:
                held.add(name)
        return held

    def _one_of(self, segments: list[_Segment]) -> set[str]:
        """The longest-held request, which goes on when all others are held too."""
        standing = [(self._holds.since_s(name), index, name) for index in range(1, len(segments))
                    for name in segments[index].standing]
        if not standing:
            return set()
        _, index, name = min(standing)
        self._holds.let_over(name, index)
        return {name}

    @staticmethod
    def _boundary(segments: list[_Segment], sit_out: Collection[str]) -> set[str]:
        return {name for segment in segments[1:] for name in segment.standing if name in sit_out}
