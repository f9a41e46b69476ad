"""Replicas that requests keep: none is taken away from under one, nor from one that waits for a first replica."""

from __future__ import annotations

import math


def kept_replicas(requests: float, slots: float, present: int) -> int:
    """Of `present` replicas, as many as have the slots for all requests that run or wait; one, if there is none yet.

    slots: requests that one replica runs at once.
    """
    return min(math.ceil(requests / slots), max(present, int(requests > 0)))
