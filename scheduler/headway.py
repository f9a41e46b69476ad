"""How far ahead of their pace those in service are: time that a long prompt may take of them.

A promise per output token is about a request's mean, so iterations that were shorter than promised leave time over.
A request that has had s tokens in e seconds is (s − 1)·promised − e ahead; whoever is least ahead decides.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_KEPT = 4096
_IN_FLIGHT = 1
"""Tokens that count in a request's stage while their iteration still runs, with asynchronous scheduling."""


class Headway:
    """Fed with the time of every iteration's start; `spare_s` is what the next one may take beyond the promise.

    When everybody is well ahead, at light load, prompts are computed as fast as the engine can.
    """

    def __init__(self, promised_s: float) -> None:
        self._promised_s = promised_s
        self._starts_s = np.zeros(2 * _KEPT)
        self._count = 0
        self._lent_s = 0.0

    def started(self, now_s: float) -> None:
        """An iteration is about to be composed."""
        if self._count == len(self._starts_s):
            self._starts_s[:_KEPT] = self._starts_s[_KEPT:]
            self._count = _KEPT
        self._starts_s[self._count] = now_s
        self._count += 1

    def spare_s(self, stages: NDArray[np.int64], wanted_s: float) -> float:
        """Seconds, at most `wanted_s`, that the coming iteration may take beyond the promise.

        stages: output tokens so far of those in service, 0 while in prefill: a first token is not late by this promise.
        """
        most_s = wanted_s
        decoding = stages[stages > 0]
        if len(decoding):
            # What was lent to the iteration that runs now is not in its time yet.
            iterations = np.clip(np.unique(decoding) - 1 - _IN_FLIGHT, 0, self._count - 1)
            taken_s = self._starts_s[self._count - 1] - self._starts_s[self._count - 1 - iterations]
            ahead_s = float(np.min(iterations * self._promised_s - taken_s))
            most_s = min(most_s, ahead_s - self._lent_s)
        self._lent_s = max(0.0, most_s)
        return self._lent_s
