"""What requests really got: the margin that would have met the target, and the time tokens spend outside the engine.

A model's margin covers the errors that it knows of. Requests also wait for what no model of iterations sees (growth
that was unlikely, a neighbour on the device, time outside the engine), so what they got, when they end, closes the
loop. Only what lasts counts: requests that a change catches unprepared are late together, and no plan would have
helped. It needs no other memory of changes: on a machine whose speed never rests, they are what has to be planned for.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

_BLOCK, _BLOCKS, _LEAST_BLOCKS = 100, 5, 3
_LARGEST = 0.5
"""Beyond this, requests were late for another reason than a plan that is too tight."""


class LastingQuantile:
    """The latest values, in blocks of 100 that came one after the other; five blocks are kept."""

    def __init__(self) -> None:
        self._blocks: deque[list[float]] = deque([[]], maxlen=_BLOCKS + 1)

    def observe(self, value: float) -> None:
        """One more value."""
        if len(self._blocks[-1]) == _BLOCK:
            self._blocks.append([])
        self._blocks[-1].append(value)

    def of_all_but(self, share: float) -> float | None:
        """What all but this share of the values stay below in the median block; None before three blocks are full."""
        full = [block for block in self._blocks if len(block) == _BLOCK][-_BLOCKS:]
        if len(full) < _LEAST_BLOCKS:
            return None
        quantiles = np.quantile(np.array(full), 1 - share, axis=1, method="higher")
        return float(np.quantile(quantiles, 0.5, method="lower"))


class RealisedMargin:
    """The margin that all but the accepted share of the latest requests would have needed.

    Each request is compared with the plan that was active when it ended, so that a wider margin does not look like a
    faster engine, and the loop cannot swing.
    """

    def __init__(self) -> None:
        self._ratios = LastingQuantile()

    def observe(self, tpot_s: float, planned_s: float) -> None:
        """A request has ended with this mean time per token (seconds), when the plan was that."""
        if 0 < tpot_s < math.inf and planned_s > 0:
            self._ratios.observe(tpot_s / planned_s)

    def margin(self, miss_probability: float) -> float:
        """A relative margin from 0 to 0.5; 0 while too few requests have ended to say."""
        ratio = self._ratios.of_all_but(miss_probability)
        return 0.0 if ratio is None else min(max(ratio - 1, 0.0), _LARGEST)
