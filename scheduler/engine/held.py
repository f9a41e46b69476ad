"""Running requests that pause for an iteration: hidden from vLLM, and the first to be preempted.

Where blocks run short, vLLM preempts the latest admitted running request. Requests paused by a threshold make no use of
their memory, so they are preempted before the others, the latest admitted first. Source:
the memory repair of arXiv 2504.11320 (June 2026), which evicts the most recently admitted prompt that stands at a
boundary queue and is not selected, and never a selected one.

Part of the fence around vLLM's non-public surface: `tests/scheduler/test_vllm_seam.py` fails when an upgrade moves it.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any, Protocol

from vllm.v1.request import Request, RequestStatus

from scheduler.engine.admission_queue import AdmissionQueue
from scheduler.engine.running_requests import in_admission_order


class AdmittingScheduler(Protocol):
    """The interface used here: vLLM's scheduler with its waiting queue in `admission_queue`."""

    running: list[Request]
    admission_queue: AdmissionQueue
    kv_cache_manager: Any
    scheduler_config: Any
    num_spec_tokens: int
    max_num_running_reqs: int
    requires_kv_delivery: bool

    def _preempt_request(self, request: Request, timestamp: float, *, drop_stale_output: bool) -> None: ...


class HeldRequests:
    """Takes requests out of a scheduler's `running` for one iteration and puts back those that kept their KV cache."""

    def __init__(self, scheduler: AdmittingScheduler) -> None:
        self._scheduler = scheduler
        self._paused: list[tuple[int, Request]] = []
        self._victims: list[Request] = []
        self._strict = False
        self._allocate_slots = scheduler.kv_cache_manager.allocate_slots

    def take_out(self, sit_out: Collection[str], evict_first: Collection[str], *, strict: bool) -> int:
        """Hide the requests in `sit_out` from vLLM until `put_back`; returns their number.

        evict_first: the ones preempted before the others. strict: released requests also evict paused ones, and an
        evicted request returns to the admission queue; else only running requests do, and an evicted request is the
        next to resume.
        """
        if not sit_out:
            return 0
        running, self._strict = self._scheduler.running, strict
        self._paused = [(place, request) for place, request in enumerate(running) if request.request_id in sit_out]
        self._scheduler.running = [request for request in running if request.request_id not in sit_out]
        if self._scheduler.num_spec_tokens and self._scheduler.scheduler_config.async_scheduling:
            for _, request in self._paused:
                request.spec_token_ids = []  # the worker keeps drafts for one iteration
        order = {request.request_id: place for place, request in self._paused}
        self._victims = sorted(
            (request for _, request in self._paused),
            key=lambda one: (one.request_id in evict_first, one.priority, order[one.request_id]),
        )
        self._scheduler.kv_cache_manager.allocate_slots = self._allocate
        return len(self._paused)

    def put_back(self) -> int:
        """Put paused requests back into `running`, except evicted ones; returns their number."""
        if not self._paused:
            return 0
        merged = in_admission_order(self._scheduler.running, self._paused)
        kept = len(self._victims)
        if kept < len(self._paused):
            merged = [request for request in merged if request.status == RequestStatus.RUNNING]
        self._scheduler.running, self._paused, self._victims = merged, [], []
        self._scheduler.kv_cache_manager.allocate_slots = self._allocate_slots
        return kept

    def _allocate(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """vLLM's `allocate_slots`; evicts paused requests until a selected one has its blocks.

        If that is not enough, vLLM preempts running requests as usual.
        """
        blocks = self._allocate_slots(request, *args, **kwargs)
        while blocks is None and self._victims and (self._strict or request.status == RequestStatus.RUNNING):
            self._evict(self._victims.pop())
            blocks = self._allocate_slots(request, *args, **kwargs)
        return blocks

    def _evict(self, victim: Request) -> None:
        scheduler = self._scheduler
        scheduler._preempt_request(victim, time.monotonic(), drop_stale_output=scheduler.requires_kv_delivery)
        if self._strict:
            scheduler.admission_queue.take_back(victim)
            scheduler.max_num_running_reqs += 1
        else:  # as after any preemption, the iteration admits none, or the evicted request would resume at once
            scheduler.max_num_running_reqs = len(scheduler.running)
