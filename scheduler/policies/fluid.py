"""`fluid`: as many requests within their targets as the hardware allows.

Decides: a request is admitted while a slot is free, memory holds what all admitted requests will grow into, and every
iteration to come stays within the planned time, both at the stated probability. An iteration computes as many prompt
tokens as the rest of that time allows, and more where the running requests can spare it. A request whose first token
cannot be in time is rejected, when it arrives if that can be foreseen, and so is one that would only lengthen a queue
that is long enough already. Without targets no request is rejected, and only memory and slots limit admission.
Parameters: `fluid` (without them only slots limit admission), `max_running` (optional).
When not to use it: with output lengths that change faster than the survival estimate follows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from itertools import islice

import numpy as np

from scheduler.fluid_params import FluidParams
from scheduler.policies.base import Decision, Policy, QueueView, Snapshot
from scheduler.policies.batch_projection import BatchProjection, Columns
from scheduler.policies.first_token import FirstToken
from scheduler.policies.tpot_slack import TpotSlack
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds

_SMALLEST_CHUNK, _SMALLEST_CHUNK_SHARE = 16, 0.05
"""Prompt tokens that an iteration computes even when it has no time for them: so many, or what takes so much of it."""
_HEADS = 4
"""Waiting requests whose prompts the coming iteration could begin with."""
_LOOK_AGAIN = 8
"""Iterations after which a full replica is looked at anew, though no request has left."""
_SPEED_MEMORY, _RECENT_MEMORY = 0.8, 0.97
_SLACK_SHARE = 1.0
"""Of the miss probability, what a prompt that uses slack may cost by expectation; most of it is made up for."""


class Fluid(Policy):
    """Admission, token budget and rejections from the state and the fluid parameters."""

    name = "fluid"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._admission = _Admission(thresholds.fluid) if thresholds.fluid else None

    def decide(self, snapshot: Snapshot) -> Decision:
        """Reject what is too late, admit from the head, reject what cannot be in time at the tail, set the budget."""
        view, slots = snapshot.waiting.get(UNKNOWN_TYPE), self._free_slots(snapshot)
        if self._admission is None:
            return Decision(admit={UNKNOWN_TYPE: slots}) if slots else Decision()
        admission = self._admission
        admission.observe(snapshot)
        room = admission.prompt_room(snapshot, view)
        if not view:
            return Decision(token_budget=admission.budget(snapshot, room))
        first = FirstToken.of(admission.fluid, snapshot, room)
        late = first.too_late(view, snapshot.now_s)
        admitted, tokens, cached = admission.admitted(view, late, slots, snapshot, room)
        budget = admission.budget(snapshot, room, cached)
        beyond = first.beyond_limit(
            view, snapshot.now_s, waiting=view.length - len(late) - admitted, tokens=view.tokens_to_compute - tokens,
            running=len(snapshot.running) + snapshot.released + admitted,
            free_slots=0 if admission.is_full else slots - admitted,
        )
        return Decision(
            admit={UNKNOWN_TYPE: admitted} if admitted else {}, token_budget=budget, reject=late, reject_last=beyond,
            drain_s=first.drain_s(view.length),
        )

    def _free_slots(self, snapshot: Snapshot) -> int:
        """Requests that may be admitted: beyond the engine's slots they would queue where none is rejected."""
        allowed = self.free_slots(snapshot)
        if snapshot.slots is None:
            return allowed
        return max(0, min(allowed, snapshot.slots - len(snapshot.running) - snapshot.released))


class _Admission:
    """The decisions under one set of parameters."""

    def __init__(self, params: FluidParams) -> None:
        self.fluid = params
        self._projection = BatchProjection(params)
        self._slack = None if params.token_s is None else TpotSlack(
            params.token_s, self._projection.survives, params.pipeline_depth
        )
        self._smallest_chunk = _smallest_chunk(params)
        self._speed = 0.0 if params.cold else 1.0
        self._recent_s = params.iteration_s or 0.0
        self._round_s: deque[float] = deque(maxlen=params.pipeline_depth)
        self._seen = 0
        self._full_with = 0
        self._full_for = 0

    @property
    def is_full(self) -> bool:
        """Whether the latest look found no memory or time for one more request."""
        return self._full_with > 0

    def observe(self, snapshot: Snapshot) -> None:
        """Follow the measured iterations: their mean, and measured over predicted seconds."""
        latest = snapshot.latest
        if latest is None or latest.seq == self._seen:
            return
        self._seen = latest.seq
        self._round_s.append(latest.seconds)  # a pipeline is as slow as the slowest of the batches in it
        self._recent_s = _RECENT_MEMORY * self._recent_s + (1 - _RECENT_MEMORY) * max(self._round_s)
        predicted_s = self.fluid.time_model.iteration_s(
            float(latest.prefill_tokens), float(latest.decode_tokens), float(latest.kv_tokens)
        )
        ratio = latest.seconds / predicted_s
        self._speed = ratio if not self._speed else _SPEED_MEMORY * self._speed + (1 - _SPEED_MEMORY) * ratio

    @property
    def _iteration_s(self) -> float | None:
        """The planned time of an iteration in the model's seconds; before any measurement a guess closes no gate.

        The margin covers an engine that is as much slower than its model. When it is slower still, the time per token
        is held to the target itself, sooner than the controller learns of it.
        """
        params, speed = self.fluid, self._speed
        if params.iteration_s is None or (params.cold and not speed):
            return None
        limit_s = params.iteration_s
        if params.cold:
            limit_s /= speed
        elif params.tpot_s is not None:
            limit_s = min(limit_s, params.tpot_s * params.tokens_per_step / params.pipeline_depth / speed)
        return max(limit_s, params.decode_iteration_s(1.0, 1.0))

    def prompt_room(self, snapshot: Snapshot, view: QueueView | None) -> float:
        """Prompt tokens for which the coming iteration has time beside every decode; infinite without a target.

        At least a small chunk, so that prefills always progress. More than planned when prefills want it and the
        running requests have slack.
        """
        params, running, limit_s = self.fluid, self._steps(snapshot), self._iteration_s
        if limit_s is None:
            return math.inf
        read = snapshot.read_tokens
        room = params.prompt_tokens_within(limit_s, running, read)
        assert self._slack is not None
        most = math.inf if snapshot.most_tokens is None else max(0.0, snapshot.most_tokens - snapshot.tokens_to_decode)
        decode_s = params.time_model.iteration_s(0.0, float(snapshot.tokens_to_decode), float(read))
        busy_s = max(decode_s, params.steady_s, self._recent_s)
        gain_s = (limit_s - busy_s) * params.pipeline_depth / params.tokens_per_step
        may_lend = gain_s > 0 and room < most and not (self.is_full and view)
        wanted_tokens = _wanted_tokens(snapshot, view, most) - max(room, 0.0) if may_lend else 0.0
        wanted_s = params.time_model.prefill_s(wanted_tokens)
        if wanted_s <= 0:
            self._slack.use_none()
        else:
            ahead = min(view.length, _HEADS) if view else 0
            prompts = ahead + (snapshot.prompt_backlog_tokens > 0)
            # A longer batch delays those behind it in each of a pipeline's stages.
            spare_s = self._slack.spare_s(
                np.array(snapshot.running.stages()),
                np.array(snapshot.running.first_token_s()),
                snapshot.now_s,
                wanted_s * params.pipeline_depth,
                gain_s=gain_s,
                misses=_SLACK_SHARE * params.miss_probability * prompts,
            )
            room = params.prompt_tokens_within(limit_s + spare_s / params.pipeline_depth, running, read)
        return max(self._smallest_chunk, min(room, most))

    def budget(self, snapshot: Snapshot, room: float, cached_tokens: int = 0) -> int | None:
        """Tokens of the coming iteration; prompts that are found cached are read though not computed."""
        if math.isinf(room):
            return None
        prompt_s = self.fluid.time_model.prefill_s(1.0)
        read = self.fluid.time_model.added_s(kv_tokens=float(cached_tokens)) / prompt_s if prompt_s else 0.0
        return snapshot.tokens_to_decode + int(max(self._smallest_chunk, room - read) + 1e-6)

    def _steps(self, snapshot: Snapshot) -> float:
        """Running requests, each with the drafts that it usually has: the coming iteration knows how many there are."""
        if snapshot.decode_tokens is None:
            return float(len(snapshot.running))
        return snapshot.decode_tokens / self.fluid.computed_per_step

    def admitted(
        self, view: QueueView, late: Collection[str], slots: int, snapshot: Snapshot, room: float
    ) -> tuple[int, int, int]:
        """How many are admitted, the `late` ones left out, and of these the prompt tokens to compute and the cached.

        While there is a slot, time for their prompts and room for their growth. An idle engine takes the first. Of a
        pipeline's iterations an emptier one takes them, so that all of them have about as many requests.
        """
        prompts = room - snapshot.prompt_backlog_tokens
        taken = len(snapshot.running) + snapshot.released
        if not slots or (prompts <= 0 and taken) or snapshot.next_is_emptier or self._still_full(taken):
            return 0, 0, 0
        self._reset_projection(snapshot)
        admitted = tokens = cached = 0
        for waiting in view.heads():
            if waiting.request_id in late:
                continue
            if admitted >= slots or (prompts <= 0 and admitted + taken):
                break
            if admitted + taken and not self._projection.fits(waiting, self._iteration_s):
                self._full_with, self._full_for = admitted + taken, 0
                break
            self._projection.add(waiting)
            prompts -= waiting.tokens_to_compute
            tokens += waiting.tokens_to_compute
            cached += waiting.cached_tokens
            admitted += 1
        return admitted, tokens, cached

    def _reset_projection(self, snapshot: Snapshot) -> None:
        columns = Columns(snapshot.running)
        allocated = float(columns.kv.sum() - columns.shared.sum())
        if snapshot.released_requests:
            columns = columns.joined(Columns(snapshot.released_requests))
        # What is allocated beyond the requests' own blocks is shared, and stays for as long as any of them runs.
        shared = max(0.0, snapshot.kv_used_tokens - allocated) if columns.shared.any() else 0.0
        self._projection.reset(columns, shared)

    def _still_full(self, taken: int) -> bool:
        """True when none fitted a moment ago and no request has left since; spares looking at all of them again."""
        self._full_for += 1
        if self._full_with and taken >= self._full_with and self._full_for < _LOOK_AGAIN:
            return True
        self._full_with = 0
        return False


def _wanted_tokens(snapshot: Snapshot, view: QueueView | None, most: float) -> float:
    """Prompt tokens that the coming iteration could compute; no more requests are looked at than fill it."""
    wanted = snapshot.prompt_backlog_tokens
    for waiting in islice(view.heads(), _HEADS) if view else ():
        if wanted >= most:
            break
        wanted += waiting.tokens_to_compute
    return min(float(wanted), most)


def _smallest_chunk(params: FluidParams) -> int:
    """A chunk that is small for a GPU would take a CPU as long as all decodes of an iteration."""
    prompt_s = params.time_model.prefill_s(1.0)
    if params.iteration_s is None or not prompt_s:
        return _SMALLEST_CHUNK
    return max(1, min(_SMALLEST_CHUNK, int(_SMALLEST_CHUNK_SHARE * params.iteration_s / prompt_s)))
