"""`fluid`: as many requests within their targets as the hardware allows.

Decides: a request enters as soon as every iteration to come stays within the time per output token that was promised,
with the growth of everybody's KV cache foreseen from the survival of output lengths, and memory within its limit. An
iteration computes as many prompt tokens as the rest of that time allows. A request that cannot have its first token in
time is refused before it costs anything, and so is one that would only lengthen a queue that is long enough already.
Without targets nothing is refused and only memory limits who enters.
Parameters: `pace` (without one the gate is open), `max_in_service` (optional).
When not to use it: with output lengths that change faster than the survival estimate follows.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import islice

import numpy as np

from scheduler.headway import Headway
from scheduler.pace import Pace
from scheduler.policies.base import Decision, Policy, QueueView, Snapshot, kv_tokens_of, stages_of
from scheduler.projection import Projection
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds

_SMALLEST_CHUNK = 16
_LOOK_AHEAD = 4
_LOOK_AGAIN = 8
"""Iterations after which a full replica is looked at anew, though nobody has left."""


class Fluid(Policy):
    """Admission, token budget and refusals from the state and a pace."""

    name = "fluid"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._paced = _Paced(thresholds.pace) if thresholds.pace else None

    def decide(self, snapshot: Snapshot) -> Decision:
        """Refuse who is too late, admit from the head, refuse who would wait for nothing, set the budget."""
        view, seats = snapshot.waiting.get(UNKNOWN_TYPE), self.seats(snapshot)
        if self._paced is None:
            return Decision(admit={UNKNOWN_TYPE: seats}) if seats else Decision()
        room = self._paced.prompt_room(snapshot)
        budget = len(snapshot.running) + int(room) if math.isfinite(room) else None
        if not view:
            return Decision(token_budget=budget)
        late = self._paced.too_late(view, snapshot.now_s, room)
        admitted = self._paced.admitted(view, late, seats, snapshot, room)
        return Decision(
            admit={UNKNOWN_TYPE: admitted} if admitted else {}, token_budget=budget, refuse=late,
            refuse_last=self._paced.useless(view.length - len(late) - admitted),
            drain_s=self._paced.drain_s(view.length),
        )


class _Paced:
    """The decisions under one pace."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._projection = Projection(pace)
        self._headway = None if pace.iteration_s is None else Headway(pace.iteration_s)
        self._full_with = 0
        self._full_for = 0

    def prompt_room(self, snapshot: Snapshot) -> float:
        """Prompt tokens for which the coming iteration has time beside everybody's decode; infinite without a target.

        Never less than a small chunk, so that whoever has entered gets on. More than the promise allows, when prompts
        want it and everybody in service is ahead of theirs.
        """
        pace, law = self._pace, self._pace.law
        busy_s = law.d0_s + law.d3_s_per_decode_token * len(snapshot.running)
        busy_s += law.d1_s_per_kv_token * snapshot.kv_used_tokens
        room = pace.room_tokens(busy_s)
        if self._headway is not None:
            self._headway.started(snapshot.now_s)
            wanted_s = pace.seconds_of(snapshot.prompt_backlog_tokens + _first_prompts(snapshot) - max(room, 0.0))
            if wanted_s > 0:
                room = pace.room_tokens(busy_s - self._headway.spare_s(np.array(stages_of(snapshot.running)), wanted_s))
        return max(_SMALLEST_CHUNK, room)

    def too_late(self, view: QueueView, now_s: float, room: float) -> frozenset[str]:
        """Who has waited for so long that the first token would come too late; the oldest are looked at first."""
        pace = self._pace
        if pace.ttft_s is None:
            return frozenset()
        late = []
        for waiting in view.aged():
            if now_s - waiting.since_s + pace.first_token_s(waiting.prompt_tokens, room) <= pace.ttft_s:
                break
            late.append(waiting.request_id)
        return frozenset(late)

    def admitted(self, view: QueueView, late: Collection[str], seats: int, snapshot: Snapshot, room: float) -> int:
        """How many enter, the `late` ones left out: while there is time for their prompts and room for their growth."""
        prompts = room - snapshot.prompt_backlog_tokens
        if not seats or (prompts <= 0 and snapshot.running) or self._still_full(len(snapshot.running)):
            return 0
        residents = snapshot.running
        self._projection.reset(np.array(stages_of(residents), int), np.array(kv_tokens_of(residents), float))
        admitted = 0
        for waiting in view.heads():
            if waiting.request_id in late:
                continue
            if admitted >= seats or (prompts <= 0 and admitted + len(residents)):
                break
            if admitted + len(residents) and not self._projection.fits(waiting.prompt_tokens):
                self._full_with, self._full_for = admitted + len(residents), 0
                break
            self._projection.add(waiting.prompt_tokens)
            prompts -= waiting.prompt_tokens
            admitted += 1
        return admitted

    def drain_s(self, waiting: int) -> float:
        """Seconds in which the fluid model serves so many."""
        return waiting / self._pace.capacity_rps if self._pace.capacity_rps else 0.0

    def useless(self, waiting: int) -> int:
        """How many at the tail lengthen the queue for nothing."""
        return 0 if self._pace.queue_requests is None else max(0, waiting - self._pace.queue_requests)

    def _still_full(self, in_service: int) -> bool:
        """True when nothing fitted a moment ago and nobody has left since; spares looking at everybody again."""
        self._full_for += 1
        if self._full_with and in_service >= self._full_with and self._full_for < _LOOK_AGAIN:
            return True
        self._full_with = 0
        return False


def _first_prompts(snapshot: Snapshot) -> int:
    """Prompt tokens of the first few who wait: what the coming iteration could begin with."""
    view = snapshot.waiting.get(UNKNOWN_TYPE)
    return sum(waiting.prompt_tokens for waiting in islice(view.heads(), _LOOK_AHEAD)) if view else 0
