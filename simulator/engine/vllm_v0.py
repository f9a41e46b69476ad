"""Schedulers to compare with that vLLM V1 no longer has: `VllmV0Scheduler`, the paper's baseline.

Sarathi needs no class: V1's own chunked prefill with 512 tokens an iteration is that scheduler.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request


class VllmV0Scheduler(AsyncScheduler):
    """Prefill first, as vLLM V0 did: while prompts wait and fit, an iteration computes whole prompts and nothing else.

    Needs chunked prefill switched off and a token budget that holds the longest prompt. Preempted requests recompute
    what they had (V0's recompute mode) and are first in line again.
    """

    running: list[Request]
    max_num_running_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._decoding: list[Request] = []
        allocate = self.kv_cache_manager.allocate_slots

        def allocate_above_watermark(*args: Any, **kwargs: Any) -> Any:
            # vLLM keeps the watermark only beside running requests, and `_schedule_prompts` hides those.
            return allocate(*args, **kwargs | {"has_scheduled_reqs": bool(self._decoding or self.running)})

        self.kv_cache_manager.allocate_slots = allocate_above_watermark

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """An iteration of prompts if any can enter, otherwise one of decodes."""
        if self.waiting or self.skipped_waiting:
            output = self._schedule_prompts(throttle_prefills)
            if output.total_num_scheduled_tokens:
                return output
        return self._with_seats(len(self.running), throttle_prefills)

    def _schedule_prompts(self, throttle_prefills: bool) -> SchedulerOutput:
        self._decoding, self.running = self.running, []
        try:
            return self._with_seats(self.max_num_running_reqs - len(self._decoding), throttle_prefills)
        finally:
            self.running, self._decoding = self._decoding + self.running, []

    def _with_seats(self, slots: int, throttle_prefills: bool) -> SchedulerOutput:
        most = self.max_num_running_reqs
        self.max_num_running_reqs = slots
        try:
            return super().schedule(throttle_prefills)
        finally:
            self.max_num_running_reqs = most
