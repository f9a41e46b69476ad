"""Measures the seconds of each iteration, of which several may be under way at once."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from scheduler.engine.running_requests import BatchWork

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class Executed(NamedTuple):
    """One executed iteration: its seconds and its work."""

    seconds: float
    work: BatchWork


class IterationTimer:
    """The iterations under way, oldest first; `depth` is the number of pipeline stages.

    more_to_run: whether requests were left to run after the latest iteration; then the engine was never idle.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._under_way: deque[tuple[SchedulerOutput, float, BatchWork]] = deque()
        self._outputs_s = deque([0.0] * depth, maxlen=depth)
        self.more_to_run = False

    @property
    def busy(self) -> bool:
        """Whether an iteration is under way."""
        return bool(self._under_way)

    @property
    def prompt_tokens_under_way(self) -> int:
        """Prompt tokens that the iterations under way compute."""
        return sum([work.prefill_tokens for _, _, work in self._under_way])

    def composed(self, output: SchedulerOutput, work: BatchWork, now_s: float) -> None:
        """Start the clock of an iteration that has just been scheduled, unless its batch is empty."""
        if output.total_num_scheduled_tokens:
            # The engine's work between two iterations counts for the second one, unless the engine was idle.
            free_s = self._outputs_s[-1] if self.more_to_run else now_s
            self._under_way.append((output, free_s, work))
        elif not self._under_way:
            self.more_to_run = False

    def finished(self, output: SchedulerOutput, now_s: float) -> Executed | None:
        """The iteration whose results have just come; None for an empty batch."""
        executed = None
        if self._under_way and self._under_way[0][0] is output:
            _, free_s, work = self._under_way.popleft()
            # Asynchronous scheduling queues the next step while this one runs. Batches leave a full pipeline one
            # slowest stage's time apart; a single batch takes the time of all stages.
            last_s, round_ago_s = self._outputs_s[-1], self._outputs_s[0]
            seconds = min(now_s - max(free_s, last_s), (now_s - max(free_s, round_ago_s)) / self._depth)
            executed = Executed(seconds, work)
        if executed or (self._depth > 1 and self._under_way):
            self._outputs_s.append(now_s)  # an empty batch is a turn in the pipeline too
        return executed
