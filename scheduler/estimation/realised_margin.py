"""The TPOT margin that finished requests would have needed, measured to correct the model's margin.

The model's margin covers its known errors. Requests are also delayed by effects outside the iteration-time model
(unlikely growth, a neighbour on the device, time outside the engine), so measured times of finished requests close the
loop. Only lasting effects count: requests hit by a sudden change are late together, and no plan would have helped. On a
machine of permanently varying speed such changes are lasting, and enter the margin.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

_BLOCK, _BLOCKS, _LEAST_BLOCKS = 100, 5, 3
_LARGEST = 0.5
"""Beyond this, requests were late for other reasons than a tight plan."""


class LastingQuantile:
    """The latest values, in five consecutive blocks of 100."""

    def __init__(self) -> None:
        self._blocks: deque[list[float]] = deque([[]], maxlen=_BLOCKS + 1)

    def observe(self, value: float) -> None:
        """One more value."""
        if len(self._blocks[-1]) == _BLOCK:
            self._blocks.append([])
        self._blocks[-1].append(value)

    def of_all_but(self, share: float) -> float | None:
        """The (1 − share) quantile of the median block; None before three blocks are full."""
        full = [block for block in self._blocks if len(block) == _BLOCK][-_BLOCKS:]
        if len(full) < _LEAST_BLOCKS:
            return None
        quantiles = np.quantile(np.array(full), 1 - share, axis=1, method="higher")
        return float(np.quantile(quantiles, 0.5, method="lower"))


class RealisedMargin:
    """The margin that all but the accepted share of the latest requests would have needed.

    Each request is compared with the plan active when it ended, so that a wider margin does not look like a faster
    engine and the loop does not oscillate.
    """

    def __init__(self) -> None:
        self._ratios = LastingQuantile()

    def observe(self, tpot_s: float, planned_s: float) -> None:
        """A request has ended with this mean time per token and this planned one (seconds)."""
        if 0 < tpot_s < math.inf and planned_s > 0:
            self._ratios.observe(tpot_s / planned_s)

    @property
    def is_known(self) -> bool:
        """Whether enough requests have ended."""
        return self._ratios.of_all_but(0.5) is not None

    def margin(self, miss_probability: float) -> float:
        """A relative margin from 0 to 0.5; 0 while too few requests have ended."""
        ratio = self._ratios.of_all_but(miss_probability)
        return 0.0 if ratio is None else min(max(ratio - 1, 0.0), _LARGEST)
