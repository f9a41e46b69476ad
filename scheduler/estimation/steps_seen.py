"""Tokens gained and computed per step, from an engine's counters."""

from __future__ import annotations

import math
from collections import deque

from scheduler.messages import Counters
from scheduler.model.steps import ONE_TOKEN_A_STEP, Steps

_PRIOR_STEPS = 100
"""Prior: steps of one token, as if observed."""
_LEAST_STEPS = 1000
"""Fewest steps to average; with fewer in the window, older ones count too."""


class StepsSeen:
    """`Steps` of one engine from its counters, over the last `window_s` seconds of its clock."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._marks: deque[tuple[float, Counters]] = deque([(-math.inf, Counters())])

    def follow(self, window_s: float) -> None:
        """Average over another window from now on."""
        self._window_s = window_s

    def restart(self) -> None:
        """Another engine counts from 0."""
        self._marks.clear()
        self._marks.append((-math.inf, Counters()))

    def observe(self, at_s: float, counters: Counters) -> None:
        """The engine's totals at a second of its clock."""
        if counters.decode_steps < self._marks[-1][1].decode_steps:
            return  # a late report is counted already
        if counters.decode_steps == self._marks[-1][1].decode_steps and len(self._marks) > 1:
            self._marks.pop()  # nothing decoded since, as without speculative decoding: only the time advances
        self._marks.append((at_s, counters))
        while len(self._marks) > 2 and self._marks[1][0] <= at_s - self._window_s and (
            counters.decode_steps - self._marks[1][1].decode_steps >= _LEAST_STEPS
        ):
            self._marks.popleft()

    @property
    def number(self) -> int:
        """Steps averaged."""
        return self._marks[-1][1].decode_steps - self._marks[0][1].decode_steps

    @property
    def steps(self) -> Steps:
        """Tokens gained and computed per step; one each until steps were counted."""
        before, now = self._marks[0][1], self._marks[-1][1]
        seen = now.decode_steps - before.decode_steps
        if not seen:
            return ONE_TOKEN_A_STEP
        gained, squares, computed = (
            (getattr(now, name) - getattr(before, name) + _PRIOR_STEPS) / (seen + _PRIOR_STEPS)
            for name in ("decode_gained_tokens", "decode_gained_squares", "decode_computed_tokens")
        )
        return Steps(
            max(gained, 1.0), max(computed, 1.0), tokens_std=math.sqrt(max(squares - gained**2, 0.0))
        )
