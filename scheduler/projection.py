"""What the requests in service will grow into: KV cache and iteration time over the iterations to come.

Output lengths are unknown, so a request that has produced s tokens is there after h more iterations with probability
S(s + h)/S(s), S the survival of output lengths. Source: the survival probabilities of arXiv 2504.11320's Nested WAIT,
taken over every stage instead of a few segments.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scheduler.pace import Pace

_NEAR_HORIZONS, _FAR_HORIZONS = 16, 48
Floats = NDArray[np.float64]


class Projection:
    """Expected requests, expected KV tokens and their variance at a grid of iterations ahead, from now on.

    `reset` takes everybody in service, `fits` and `add` one newcomer at a time.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        lengths, survival = (np.array(column, dtype=float) for column in zip(*pace.survival, strict=True))
        longest = max(2, int(lengths[-1]))
        near, far = np.geomspace(1, longest, _NEAR_HORIZONS), np.linspace(0, longest, _FAR_HORIZONS)
        self._ahead: Floats = np.unique(np.round(np.concatenate([near, far]))).astype(np.float64)
        self._steps = np.diff(self._ahead)
        self._stays = _staying(np.arange(longest + 1, dtype=float), self._ahead, lengths, survival)
        self._newcomer = self._stays[0]
        self._requests: Floats = np.zeros_like(self._ahead)
        self._kv: Floats = np.zeros_like(self._ahead)
        self._variance: Floats = np.zeros_like(self._ahead)

    def reset(self, stages: NDArray[np.int64], kv_tokens: Floats) -> None:
        """Start from those in service: output tokens so far, and KV tokens with their whole prompt."""
        # Whoever outlives every length seen counts as about to end.
        stays = self._stays[np.minimum(stages, len(self._stays) - 1)]
        kv = kv_tokens[:, None] + self._ahead
        self._requests = stays.sum(axis=0)
        self._kv = (stays * kv).sum(axis=0)
        self._variance = (stays * (1 - stays) * kv**2).sum(axis=0)

    def fits(self, prompt_tokens: int) -> bool:
        """Whether one more request keeps every iteration to come within the pace, and memory within its limit."""
        pace, law = self._pace, self._pace.law
        kv = prompt_tokens + self._ahead
        total_kv = self._kv + self._newcomer * kv
        spread = np.sqrt(self._variance + self._newcomer * (1 - self._newcomer) * kv**2)
        # Between two horizons nobody is taken to leave; a last block is rarely full, and the next one is given early.
        requests = self._requests + self._newcomer
        held = total_kv[:-1] + requests[:-1] * (self._steps + pace.block_tokens)
        if float(np.max(held + pace.overflow_z * spread[:-1])) > pace.kv_limit_tokens:
            return False
        if pace.iteration_s is None:
            return True
        seconds = law.iteration_s(np.zeros(1), requests, total_kv)
        return float(np.max(seconds)) <= pace.iteration_s

    def add(self, prompt_tokens: int) -> None:
        """A newcomer enters."""
        kv = prompt_tokens + self._ahead
        self._requests = self._requests + self._newcomer
        self._kv = self._kv + self._newcomer * kv
        self._variance = self._variance + self._newcomer * (1 - self._newcomer) * kv**2


def _staying(stages: Floats, ahead: Floats, lengths: Floats, survival: Floats) -> Floats:
    """P(still there after h more | there at s), one row a stage and one column a horizon."""
    later = np.interp(stages[:, None] + ahead, lengths, survival, right=0.0)
    now = np.interp(stages, lengths, survival, right=0.0)[:, None]
    stays = np.divide(later, now, out=np.zeros_like(later), where=now > 0)
    stays[:, 0] = 1.0
    return stays
