"""Goodput by the second in which requests arrive, and how long a fault lowers it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.faults.outcomes import Seen

WINDOW_S = 10
"""Seconds over which goodput is averaged: one second holds a handful of requests."""
SETTLED = 0.9


def goodput_by_second(requests: Iterable[Seen], seconds: int) -> list[int]:
    """Of the requests that arrive in each second, the good ones. By arrival, because open-loop arrivals are even while
    completions come in bursts."""
    good = np.zeros(seconds, dtype=int)
    for seen in requests:
        if seen.good and 0 <= seen.arrival_s < seconds:
            good[int(seen.arrival_s)] += 1
    return [int(count) for count in good]


def goodput_before(by_second: Sequence[int], fill_s: int, fault_s: int, settle_s: int) -> float:
    """Mean requests/s from `fill_s` until `settle_s` before the fault.

    What arrives in the last seconds before the fault is caught by it in flight, and is not the state before it.

    Raises:
        ValueError: no second is left.
    """
    span = by_second[fill_s : fault_s - settle_s]
    if not span:
        raise ValueError(f"no second between {fill_s} s and {fault_s - settle_s} s")
    return float(np.mean(span))


def seconds_to(by_second: Sequence[int], before_rps: float, fault_s: int, share: float = SETTLED) -> int | None:
    """Seconds from the fault until the goodput of the next WINDOW_S seconds is `share` of that before; 0: it never fell
    that far; None: not within what was watched, or there was no goodput to lose."""
    if before_rps <= 0:
        return None
    after = np.asarray(by_second[fault_s:], dtype=float)
    if after.size < WINDOW_S:
        return None
    means = np.convolve(after, np.ones(WINDOW_S) / WINDOW_S, mode="valid")
    reached = np.flatnonzero(means >= share * before_rps - 1e-9)
    return int(reached[0]) if reached.size else None


def share_kept(by_second: Sequence[int], before_rps: float, fault_s: int) -> float | None:
    """Goodput from the fault on, over that before; None without goodput before."""
    after = by_second[fault_s:]
    return float(np.mean(after)) / before_rps if after and before_rps > 0 else None
