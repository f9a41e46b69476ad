"""What requests really got beside what was planned for them, and the margin that would have kept the promise.

A model's margin covers the errors that it knows of. Requests also wait for what no model of iterations sees (growth
that was unlikely, time outside the engine), so their own times per token, when they end, close the loop: the margin is
at least the one that all but the promised share of the latest requests would have needed. Each request is compared with
the plan in force when it ended, so that a wider margin does not look like a faster engine, and the loop cannot swing.
Only what lasts counts: requests that a change catches unprepared are late together, and no margin would have helped.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

_BLOCK, _BLOCKS, _LEAST_BLOCKS = 100, 5, 3
_LARGEST = 0.25
"""Beyond this, requests were late for another reason than a plan that is too tight."""


class RealisedMargin:
    """The latest requests' times per token, relative to the plan, in blocks of those that ended one after the other."""

    def __init__(self) -> None:
        self._blocks: deque[list[float]] = deque([[]], maxlen=_BLOCKS + 1)

    def observe(self, tpot_s: float, planned_s: float) -> None:
        """A request has ended with this mean time per token (seconds), when the plan was that."""
        if not (0 < tpot_s < math.inf and planned_s > 0):
            return
        if len(self._blocks[-1]) == _BLOCK:
            self._blocks.append([])
        self._blocks[-1].append(tpot_s / planned_s)

    def forget(self) -> None:
        """The engine has changed its speed: what requests got before says nothing any more."""
        self._blocks.clear()
        self._blocks.append([])

    def margin(self, miss_probability: float) -> float:
        """What all but `miss_probability` of the requests would have needed in the median block, at most 0.25.

        0 before three blocks are full.
        """
        full = [block for block in self._blocks if len(block) == _BLOCK][-_BLOCKS:]
        if len(full) < _LEAST_BLOCKS:
            return 0.0
        needed = np.quantile(np.array(full), 1 - miss_probability, axis=1, method="higher")
        return min(max(float(np.quantile(needed, 0.5, method="lower")) - 1, 0.0), _LARGEST)
