"""Predicted time to first token of waiting requests, and the rejection of requests that would miss their target.

The requests ahead of a waiting one enter at two rates. Until the replica is full, they enter as fast as iterations have
room for their prompts. Beyond that they enter at the prompt flow of capacity, since running requests must end first;
decoding requests end as randomly as a Poisson process.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice

from scheduler.fluid_params import ITERATIONS_UNDER_WAY, FluidParams
from scheduler.messages import Outlook
from scheduler.policies.base import QueueView, Snapshot, Waiting

_COLD_SHARE = 0.5
"""Share of the TTFT target for which a request waits at a cold engine before it is rejected."""
_TO_COME_IN, _TO_STAY = 3.0, -1.0
"""Standard deviations of the wait, added to its mean, for a request that has just come and for one that already waits.
A request comes in only if it will almost surely be in time, and stays unless it most likely will not: by the same
measure for both, whatever comes in at the limit is rejected by the next delay, after a wait that is worth nothing."""
_FORETOLD = 1.5
"""The same for what a router is told."""
_MOST_ROOM = 4096
"""A queue with more room than this has all that any ingress could use."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The present rates: seconds of an iteration, prompt tokens per second, and prompt tokens ahead of a new request.

    decoding: the requests that decode beside the prompts, and the KV tokens that they read. under_way_s: seconds until
    the iterations under way end, 0 when the engine is idle. short: whether an iteration takes no longer than what is in
    it, without a planned iteration time or when the engine is idle.
    """

    params: FluidParams
    iteration_s: float
    prompt_tokens_per_s: float
    backlog_tokens: int
    decoding: tuple[float, float]
    under_way_s: float
    short: bool

    @classmethod
    def of(cls, params: FluidParams, snapshot: Snapshot, room: float) -> FirstToken:
        """From the engine's state and `room`, the prompt tokens that fit into the next iteration."""
        decodes, read = float(snapshot.tokens_to_decode), float(snapshot.read_tokens)
        most = math.inf if snapshot.most_tokens is None else max(1.0, float(snapshot.most_tokens - decodes))
        chunk = min(max(room, params.prompt_flow_tokens), most)
        rate, seconds = math.inf, params.time_model.shortest_iteration_s
        if math.isfinite(chunk):
            seconds = params.time_model.iteration_s(chunk, decodes, read)
            if params.iteration_s is not None and not params.cold:
                seconds = max(seconds, params.iteration_s) if room <= chunk else seconds
            rate = chunk / seconds
        under_way_s = (ITERATIONS_UNDER_WAY + params.pipeline_depth - 1) * seconds
        short = math.isinf(room) and math.isfinite(chunk)
        if short:
            prompts = (float(snapshot.prompt_tokens_under_way), *[0.0] * params.pipeline_depth)
            under_way_s = sum(params.time_model.iteration_s(tokens, decodes, read) for tokens in prompts)
        if snapshot.idle:  # the request's first iteration is the next one, and holds nothing else
            under_way_s, short = 0.0, math.isfinite(chunk)
        return cls(params, seconds, rate, snapshot.prompt_backlog_tokens, (decodes, read), under_way_s, short)

    def own_s(self, waiting: Waiting) -> float:
        """Seconds from the head of the queue to the first token."""
        tokens = self.backlog_tokens + waiting.tokens_to_compute
        if math.isinf(self.prompt_tokens_per_s):
            return self.under_way_s + self.params.time_model.prefill_s(tokens)
        alone_s = self.iteration_s
        if self.short:
            alone_s = min(alone_s, self.params.time_model.iteration_s(float(tokens), *self.decoding))
        return self.under_way_s + max(tokens / self.prompt_tokens_per_s, alone_s)

    def too_late(self, view: QueueView, now_s: float) -> dict[str, int]:
        """The requests that can no longer meet their first-token limit, by id with their prompt tokens to compute; the
        oldest are checked first."""
        limit_s, late = self.params.first_token_limit_s, dict[str, int]()
        if limit_s is None:
            return late
        for waiting in view.aged():
            waited_s = now_s - waiting.since_s
            if self.params.cold:
                if waited_s <= _COLD_SHARE * limit_s:
                    break
            elif waited_s + self.own_s(waiting) <= self._limit_s(waiting, limit_s):
                break
            late[waiting.request_id] = waiting.tokens_to_compute
        return late

    def _limit_s(self, waiting: Waiting, limit_s: float) -> float:
        """Time for the first token; with a declared length and a latency target, less the time for the other tokens."""
        params = self.params
        if params.latency_s is None or math.isinf(waiting.expected_output_tokens):
            return limit_s
        token_s = params.steady_token_s or params.token_s or self.iteration_s
        rest_s = params.latency_s - (waiting.expected_output_tokens - 1) * token_s
        return (rest_s if params.ttft_s is None else min(params.ttft_s, rest_s)) - params.delivery_s

    def beyond_limit(
        self, view: QueueView, now_s: float, *, waiting: int, tokens: int, running: int, free_slots: int,
        late: Collection[str] = (),
    ) -> int:
        """Number of requests at the tail to reject: beyond the queue limit, or unlikely to meet their target.

        waiting, tokens: requests that stay in the queue, and their prompt tokens to compute; running: admitted
        requests; free_slots: slots that are free now; late: ids of requests that leave the queue anyway.
        """
        params, limit_s = self.params, self.params.first_token_limit_s
        most = math.inf if params.queue_limit is None else params.queue_limit
        free, left, seen, beyond = self._free(running, free_slots), waiting, 0, 0
        staying = (request for request in view.tail() if request.request_id not in late)
        for request in islice(staying, max(0, waiting)):
            tokens -= request.tokens_to_compute
            left -= 1  # those whose turn comes before
            if request.is_committed:
                continue
            seen += 1
            if left < most:
                if limit_s is None or params.cold:
                    break
                wait_s = self._wait_s(left, tokens, free, _TO_COME_IN if view.is_new(request) else _TO_STAY)
                if now_s - request.since_s + wait_s + self.own_s(request) <= self._limit_s(request, limit_s):
                    break
            beyond = seen
        return beyond

    def _wait_s(self, ahead: int, tokens: int, free: float, deviations: float) -> float:
        """Seconds until `ahead` requests with `tokens` prompt tokens have entered: the mean and so many standard
        deviations.

        free: number of them that enter before the replica is full.
        """
        params, slow = self.params, max(0.0, ahead - free)
        if not ahead:
            return 0.0
        wait_s = (1 - slow / ahead) * tokens / self.prompt_tokens_per_s
        if not slow or not params.capacity_rps:
            return wait_s
        flow_per_s = params.prompt_flow_tokens / params.iteration_s if params.iteration_s else 0.0
        wait_s += slow / ahead * tokens / flow_per_s if flow_per_s else slow / params.capacity_rps
        return max(0.0, wait_s + deviations * math.sqrt(params.variability * slow) / params.capacity_rps)

    def room(self, waiting: int, tokens: int, running: int, free_slots: int) -> int:
        """Requests like those that wait which could still join the queue before one would be rejected.

        waiting, tokens: requests in the queue, and their prompt tokens to compute; running: admitted requests;
        free_slots: slots that are free now. An empty queue takes at least one: only the engine knows that one's length.
        """
        params, limit_s = self.params, self.params.first_token_limit_s
        free = self._free(running, free_slots)
        most = _MOST_ROOM if params.queue_limit is None else int(params.queue_limit - waiting + free)
        each = tokens / waiting if waiting else self._usual_prompt_tokens
        usual = Waiting(round(each), 0.0)

        def seconds(more: int) -> float:
            ahead = waiting + more - 1
            return self._wait_s(ahead, round(tokens + (more - 1) * each), free, _TO_COME_IN) + self.own_s(usual)

        if limit_s is not None:  # the wait grows with the place in the queue
            most = bisect_right(range(1, max(0, most) + 1), limit_s, key=seconds)
        return max(most, 0 if waiting else 1)

    @property
    def _usual_prompt_tokens(self) -> float:
        params = self.params
        per_iteration = params.capacity_rps * (params.iteration_s or 0.0)
        return params.prompt_flow_tokens / per_iteration if per_iteration else 0.0

    def outlook(self, waiting: int, tokens: int, running: int, free_slots: int, more: int, idle: bool) -> Outlook:
        """What the next request has to expect. waiting to free_slots: as for `room`; more: requests that have arrived
        since; idle: there are none now, whatever there was then."""
        params, (decodes, read), each = self.params, self.decoding, self.params.computed_per_step
        usual_tokens, wait_s = self._usual_prompt_tokens, 0.0
        if idle:
            decodes, read, waiting = each, usual_tokens, 0
        else:
            tokens += round(more * usual_tokens)
            free = self._free(running, free_slots)
            wait_s = self.under_way_s + self._wait_s(waiting + more, tokens, free, _FORETOLD)
            if math.isfinite(self.prompt_tokens_per_s):
                wait_s += self.backlog_tokens / self.prompt_tokens_per_s
        steps = params.pipeline_depth / params.tokens_per_step  # iterations for an output token
        model = params.time_model
        added_s = steps * model.added_s(
            decode_tokens=each, kv_tokens=read * each / decodes if decodes else usual_tokens
        )
        # Above the floor from the first request on: a replica with fewer counts as faster also where all are as fast.
        now_s = steps * (model.shortest_iteration_s + model.added_s(decode_tokens=decodes, kv_tokens=read))
        token_s = now_s + (waiting + more) * added_s
        return Outlook(
            wait_s, model.prefill_s(1.0), token_s, added_s, params.token_s or 0.0, params.survival.mean
        )

    def _free(self, running: int, free_slots: int) -> float:
        """Requests that enter before the replica is full."""
        at_capacity = self.params.running_at_capacity
        return max(0.0, min(free_slots, (math.inf if at_capacity is None else at_capacity) - running))

    def drain_s(self, waiting: int) -> float:
        """Seconds in which the fluid model serves `waiting` requests."""
        return waiting / self.params.capacity_rps if self.params.capacity_rps else 0.0
