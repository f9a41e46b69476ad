"""What requests really got beside what was planned for them, and the margin that would have kept the promise.

A model's margin covers the errors that it knows of. Requests also wait for what no model of iterations sees (growth
that was unlikely, time outside the engine), so their own times per token, when they end, close the loop: the margin is
at least the one that all but the promised share of the latest requests would have needed. Each request is compared with
the plan in force when it ended, so that a wider margin does not look like a faster engine, and the loop cannot swing.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

_KEPT, _LEAST = 500, 100
_LARGEST = 0.25
"""Beyond this, requests were late for another reason than a plan that is too tight."""


class RealisedMargin:
    """The latest requests' times per token, relative to the plan."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_KEPT)

    def observe(self, tpot_s: float, planned_s: float) -> None:
        """A request has ended with this mean time per token (seconds), when the plan was that."""
        if 0 < tpot_s < math.inf and planned_s > 0:
            self._ratios.append(tpot_s / planned_s)

    def forget(self) -> None:
        """The engine has changed its speed: what requests got before says nothing any more."""
        self._ratios.clear()

    def margin(self, miss_probability: float) -> float:
        """What all but `miss_probability` of the requests would have needed, at most 0.25; 0 if too few are known."""
        if len(self._ratios) < _LEAST:
            return 0.0
        needed = float(np.quantile(np.array(self._ratios), 1 - miss_probability, method="higher")) - 1
        return min(max(needed, 0.0), _LARGEST)
