"""How output tokens and iterations go together: several tokens a step with speculative decoding.

A step is an iteration that advances a decoding request. It computes the request's latest token and its draft tokens, of
which the model accepts a prefix, and gains one token more than it accepts.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from scheduler.messages import Counters

_PRIOR_STEPS = 100
"""Steps of one token that stand for those not seen yet."""
_LEAST_STEPS = 1000
"""Fewer than this in the window: older ones count too."""


@dataclass(frozen=True, slots=True)
class Steps:
    """How output tokens and iterations go together, as measured.

    tokens: output tokens that a request gains in an iteration that advances it, tokens_std their standard deviation;
    computed: tokens computed for it then; depth: iterations from one of its steps to the next (pipeline stages).
    """

    tokens: float = 1.0
    computed: float = 1.0
    depth: int = 1
    tokens_std: float = 0.0

    @classmethod
    def of_acceptance(cls, rate: float, draft_tokens: int) -> Steps:
        """Of a drafter that always drafts so many tokens, each accepted with this probability unless one before it was
        not. Source: Leviathan, Kalman and Matias (2023)."""
        gains = [rate**accepted for accepted in range(draft_tokens + 1)]  # P(more than so many tokens)
        mean, square = sum(gains), sum((2 * place + 1) * gain for place, gain in enumerate(gains))
        return cls(mean, 1.0 + draft_tokens, tokens_std=math.sqrt(max(square - mean**2, 0.0)))

    @property
    def computed_per_token(self) -> float:
        """Tokens computed for each output token."""
        return self.computed / self.tokens


ONE_TOKEN_A_STEP = Steps()


class StepsSeen:
    """`Steps` of one engine from its own counters, over the last `window_s` seconds of its clock."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._marks: deque[tuple[float, Counters]] = deque([(-math.inf, Counters())])

    def restart(self) -> None:
        """Another engine counts from 0."""
        self._marks.clear()
        self._marks.append((-math.inf, Counters()))

    def observe(self, at_s: float, counters: Counters) -> None:
        """The engine's totals at a second of its clock."""
        if counters.decode_steps < self._marks[-1][1].decode_steps:
            return  # late: what it tells is counted already
        if counters.decode_steps == self._marks[-1][1].decode_steps and len(self._marks) > 1:
            self._marks.pop()  # nothing was decoded meanwhile, as without speculative decoding: the time alone moves on
        self._marks.append((at_s, counters))
        while len(self._marks) > 2 and self._marks[1][0] <= at_s - self._window_s and (
            counters.decode_steps - self._marks[1][1].decode_steps >= _LEAST_STEPS
        ):
            self._marks.popleft()

    @property
    def steps(self) -> Steps:
        """What the steps gained and cost; nothing but one token each until some were counted."""
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
