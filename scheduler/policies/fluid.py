"""`fluid`: as many requests within their latency targets (SLO) as the hardware allows.

Decides: a request is admitted while a slot is free, the projected memory of all admitted requests fits, and every
projected iteration stays within the planned time, both at the stated probability. An iteration computes as many prompt
tokens as fit into that time beside the decodes, and more if the running requests have TPOT slack. A request that cannot
meet its first-token limit is rejected, on arrival if that can be predicted, and so is the tail beyond the queue limit.
Without targets no request is rejected, and only memory and slots limit admission.
Parameters: `fluid` (without them only slots limit admission), `max_running` (optional).
When not to use it: with output lengths that change faster than the survival estimate follows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from functools import partial
from itertools import islice

import numpy as np

from scheduler.fluid_params import LEAST_PROMPT_SHARE, FluidParams
from scheduler.policies.base import Decision, Policy, QueueView, Snapshot
from scheduler.policies.batch_projection import BatchProjection, Columns
from scheduler.policies.first_token import FirstToken
from scheduler.policies.tpot_slack import TpotSlack
from scheduler.thresholds import UNKNOWN_TYPE, Thresholds

_SMALLEST_CHUNK = 16
"""Prompt tokens that an iteration computes even without time for them: at most this many, or what fits into
`LEAST_PROMPT_SHARE` of it."""
_HEADS = 4
"""Waiting requests whose prompts the next iteration could start."""
_LOOK_AGAIN = 8
"""Iterations after which a full replica is checked again although no request has ended."""
_ANY_NUMBER = 1 << 20
_SPEED_MEMORY, _RECENT_MEMORY = 0.8, 0.97
_SLACK_SHARE, _LAST_SLACK_SHARE = 1.0, 5.0
"""What a prefill which uses slack may cost in expectation, as a multiple of the miss probability; most of it is
regained. More where all prompts that wait fit into `_LAST_ITERATIONS` token budgets: few of them will want it."""
_LAST_ITERATIONS = 2


class Fluid(Policy):
    """Admission, token budget and rejections from the state and the fluid parameters."""

    name = "fluid"

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__(thresholds)
        self._admission = _Admission(thresholds.fluid) if thresholds.fluid else None

    def decide(self, snapshot: Snapshot) -> Decision:
        """Reject requests that cannot meet TTFT, admit from the head, reject the tail, set the token budget."""
        view, slots = snapshot.waiting.get(UNKNOWN_TYPE), self._free_slots(snapshot)
        if self._admission is None:
            return Decision(admit={UNKNOWN_TYPE: slots}) if slots else Decision()
        admission = self._admission
        admission.observe(snapshot)
        room = admission.prompt_room(snapshot, view, slots)
        taken = len(snapshot.running) + snapshot.released
        if not view:
            spare = FirstToken.of(admission.fluid, snapshot, room)
            queue = (0, 0, taken, self._spare_slots(snapshot, taken))
            return Decision(
                token_budget=admission.budget(snapshot, room), outlook=partial(spare.outlook, *queue),
                room=partial(spare.room, *queue) if admission.rejects else None,
            )
        first = FirstToken.of(admission.fluid, snapshot, room)
        late = first.too_late(view, snapshot.now_s)
        if late and admission.tries_again(snapshot):
            late.pop(next(iter(view.heads())).request_id, None)
        admitted, tokens, cached = admission.admitted(view, late, slots, snapshot, room)
        budget = admission.budget(snapshot, room, cached)
        waiting = view.length - len(late) - admitted
        tokens = max(0, view.tokens_to_compute - sum(late.values()) - tokens)
        beyond = first.beyond_limit(
            view, snapshot.now_s, waiting=waiting, tokens=tokens, running=taken + admitted,
            free_slots=0 if admission.is_full else slots - admitted, late=late,
        )
        left = waiting - beyond
        each = tokens / waiting if waiting else 0.0
        spare_slots = 0 if admission.is_full else self._spare_slots(snapshot, taken + admitted)
        queue = (left, round(left * each), taken + admitted, spare_slots)
        return Decision(
            admit={UNKNOWN_TYPE: admitted} if admitted else {}, token_budget=budget, reject=late.keys(),
            reject_last=beyond, drain_s=first.drain_s(left + admitted),
            room=partial(first.room, *queue) if admission.rejects else None, outlook=partial(first.outlook, *queue),
        )

    def _spare_slots(self, snapshot: Snapshot, taken: int) -> int:
        """Slots that nothing waits for."""
        most = min(filter(None, (self.thresholds.max_running, snapshot.slots)), default=_ANY_NUMBER)
        return max(0, most - taken)

    def _free_slots(self, snapshot: Snapshot) -> int:
        """Free slots: beyond the engine's own, admitted requests would queue where they can no longer be rejected."""
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
        self._measured_at_s: float | None = None

    @property
    def is_full(self) -> bool:
        """Whether the latest check found no memory or time for one more request."""
        return self._full_with > 0

    @property
    def rejects(self) -> bool:
        """Whether the tail of the queue is rejected under these parameters."""
        params = self.fluid
        return not params.cold and (params.queue_limit is not None or params.first_token_limit_s is not None)

    def observe(self, snapshot: Snapshot) -> None:
        """Update the moving means of measured seconds and of measured over predicted seconds."""
        latest = snapshot.latest
        if self._measured_at_s is None:
            self._measured_at_s = snapshot.now_s
        if latest is None or latest.seq == self._seen:
            return
        self._seen, self._measured_at_s = latest.seq, snapshot.now_s
        self._round_s.append(latest.seconds)  # the slowest batch sets a pipeline's speed
        self._recent_s = _RECENT_MEMORY * self._recent_s + (1 - _RECENT_MEMORY) * max(self._round_s)
        predicted_s = self.fluid.time_model.iteration_s(
            float(latest.prefill_tokens), float(latest.decode_tokens), float(latest.kv_tokens)
        )
        ratio = latest.seconds / predicted_s
        self._speed = ratio if not self._speed else _SPEED_MEMORY * self._speed + (1 - _SPEED_MEMORY) * ratio

    def tries_again(self, snapshot: Snapshot) -> bool:
        """Whether the engine has been idle for as long as a first token may take; then it serves one request that its
        model calls late: alone it harms no other request, and only an iteration can correct a model that is wrong."""
        limit_s = self.fluid.first_token_limit_s
        if not snapshot.idle or limit_s is None or self._measured_at_s is None:
            return False
        return snapshot.now_s - self._measured_at_s >= limit_s

    @property
    def _iteration_s(self) -> float | None:
        """The planned iteration time in the model's seconds; None (no limit) on a cold engine before any measurement.

        The margin covers an engine that is that much slower than its model. Beyond it, the time per token is limited to
        the target itself, before the controller adapts.
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

    def prompt_room(self, snapshot: Snapshot, view: QueueView | None, slots: int) -> float:
        """Prompt tokens that fit into the next iteration beside every decode; infinite without a target.

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
        heads = view if slots else None  # without a slot no waiting prompt can start
        wanted_tokens = _wanted_tokens(snapshot, heads, most) - max(room, 0.0) if may_lend else 0.0
        wanted_s = params.time_model.prefill_s(wanted_tokens)
        if wanted_s <= 0:
            self._slack.use_none()
        else:
            ahead = min(heads.length, _HEADS) if heads else 0
            outstanding = snapshot.prompt_backlog_tokens + (heads.tokens_to_compute if heads else 0)
            share = _LAST_SLACK_SHARE if outstanding <= _LAST_ITERATIONS * most else _SLACK_SHARE
            prompts = ahead + (snapshot.prompt_backlog_tokens > 0)
            # A longer batch delays the batches behind it in every stage of a pipeline.
            spare_s = self._slack.spare_s(
                np.array(snapshot.running.stages()),
                np.array(snapshot.running.first_token_s()),
                snapshot.now_s,
                wanted_s * params.pipeline_depth,
                gain_s=gain_s,
                misses=share * params.miss_probability * prompts,
            )
            room = params.prompt_tokens_within(limit_s + spare_s / params.pipeline_depth, running, read)
        return max(self._smallest_chunk, min(room, most))

    def budget(self, snapshot: Snapshot, room: float, cached_tokens: int = 0) -> int | None:
        """Token budget of the next iteration; cached prompt tokens are read but not computed."""
        if math.isinf(room):
            return None
        prompt_s = self.fluid.time_model.prefill_s(1.0)
        read = self.fluid.time_model.added_s(kv_tokens=float(cached_tokens)) / prompt_s if prompt_s else 0.0
        return snapshot.tokens_to_decode + int(max(self._smallest_chunk, room - read) + 1e-6)

    def _steps(self, snapshot: Snapshot) -> float:
        """Running requests in the model's terms: the next iteration's decode tokens over those of a usual step."""
        if snapshot.decode_tokens is None:
            return float(len(snapshot.running))
        return snapshot.decode_tokens / self.fluid.computed_per_step

    def admitted(
        self, view: QueueView, late: Collection[str], slots: int, snapshot: Snapshot, room: float
    ) -> tuple[int, int, int]:
        """Number of requests admitted (`late` ones skipped), their prompt tokens to compute, and their cached tokens.

        Admits while there is a slot, time for the prompt and memory for the growth. An idle engine admits the first
        request. A pipeline admits into iterations with fewer requests, so that all have about equally many.
        """
        prompts = room - snapshot.prompt_backlog_tokens
        taken = len(snapshot.running) + snapshot.released
        if not slots or (prompts <= 0 and taken) or snapshot.next_is_fuller or self._still_full(taken):
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
        # Memory beyond the requests' own blocks is shared, and stays while any of them runs.
        shared = max(0.0, snapshot.kv_used_tokens - allocated) if columns.shared.any() else 0.0
        self._projection.reset(columns, shared)

    def _still_full(self, taken: int) -> bool:
        """True when no request fitted in the latest check and none has ended since; saves checking again."""
        self._full_for += 1
        if self._full_with and taken >= self._full_with and self._full_for < _LOOK_AGAIN:
            return True
        self._full_with = 0
        return False


def _wanted_tokens(snapshot: Snapshot, view: QueueView | None, most: float) -> float:
    """Prompt tokens that the next iteration could compute, at most `most`."""
    wanted = snapshot.prompt_backlog_tokens
    for waiting in islice(view.heads(), _HEADS) if view else ():
        if wanted >= most:
            break
        wanted += waiting.tokens_to_compute
    return min(float(wanted), most)


def _smallest_chunk(params: FluidParams) -> int:
    """The least prompt tokens of an iteration: on a slow device even a small chunk can take as long as all decodes."""
    prompt_s = params.time_model.prefill_s(1.0)
    if params.iteration_s is None or not prompt_s:
        return _SMALLEST_CHUNK
    return max(1, min(_SMALLEST_CHUNK, int(LEAST_PROMPT_SHARE * params.iteration_s / prompt_s)))
