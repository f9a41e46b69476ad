"""Schedulers to compare with that vLLM V1 no longer has: `VllmV0Scheduler`, the paper's baseline.

Sarathi needs no class: V1's own chunked prefill with 512 tokens an iteration is that scheduler.
"""

from __future__ import annotations

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

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """An iteration of prompts if any can enter, otherwise one of decodes."""
        if self.waiting or self.skipped_waiting:
            output = self._schedule_prompts(throttle_prefills)
            if output.total_num_scheduled_tokens:
                return output
        return self._with_seats(len(self.running), throttle_prefills)

    def _schedule_prompts(self, throttle_prefills: bool) -> SchedulerOutput:
        decoding, self.running = self.running, []
        try:
            return self._with_seats(self.max_num_running_reqs - len(decoding), throttle_prefills)
        finally:
            self.running = decoding + self.running

    def _with_seats(self, seats: int, throttle_prefills: bool) -> SchedulerOutput:
        most = self.max_num_running_reqs
        self.max_num_running_reqs = seats
        try:
            return super().schedule(throttle_prefills)
        finally:
            self.max_num_running_reqs = most
